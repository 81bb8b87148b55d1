"""Adapters go to peft and come from it. The witness: peft's model with an adapter on all rows is our noisy stream.

A block that is anchored at 0, shows all of its tokens and reads them causally reads what the model reads of a text, and
every one of its rows goes through the adapter. So its logits are those of peft's model for that text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flarec.checkpoint.adapter import CONFIG, WEIGHTS, read_adapter
from flarec.checkpoint.directory import open_checkpoint
from flarec.frontend.export import capture
from flarec.ir.program import Program
from flarec.layout import Block, build_layout
from flarec.passes import AdaptNoisyStream, lower
from flarec.passes.adapt_noisy_stream import adapter_parameters
from flarec.verify.inputs import all_logits
from tests.checkpoints import adapted
from tests.models import FAMILIES, TOKENS

TEXT = torch.randint(3, TOKENS, (1, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, checkpoint with an adapter)"""
    return adapted(tmp_path_factory.mktemp("peft"), request.param)


def noisy_logits(source: Path, folder: Path, adapter: AdaptNoisyStream) -> tuple[Program, Tensor]:
    """The captured source with the adapter of a folder, and its noisy logits for `TEXT`, [length, V]."""
    program = capture(open_checkpoint(source).load_model(torch.float32))
    tensors = read_adapter(folder, torch.float32, "cpu")
    program.extra.update({name: torch.nn.Parameter(value) for name, value in tensors.items() if "lora" in name})
    train = lower(program, "train", adapter=adapter, debug=True)
    length = TEXT.shape[1]
    layout = build_layout([[length]], [[Block(0, 0, length, 0, "causal")]]).validate()
    with torch.no_grad():
        logits = all_logits(train, torch.cat([TEXT, TEXT], dim=1), layout)[0]
    return program, logits[length:]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1000 * torch.finfo(torch.float32).eps * float(b.abs().max()))


def test_peft_opens_ours(made: tuple[Path, Path], recwarn: pytest.WarningsRecorder) -> None:
    source, out = made
    plain = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        before = plain(TEXT).logits[0]
    model = peft.PeftModel.from_pretrained(plain, out / "adapter")
    texts = [str(warning.message) for warning in recwarn]
    (told,) = [text for text in texts if "issing" in text or "nexpected" in text]
    assert told.startswith("Unexpected keyword arguments ['flarec_noisy_rows_only'] for class LoraConfig"), "our mark"
    stored = {name.replace(".default.", "."): value for name, value in model.named_parameters() if "lora_" in name}
    ours = read_adapter(out / "adapter", None, "cpu")
    assert stored.keys() == {f"base_model.model.{name}" for name in ours if "lora" in name}
    assert all(torch.equal(value, ours[name.removeprefix("base_model.model.")]) for name, value in stored.items())
    with torch.no_grad():
        theirs = model(TEXT).logits[0]
    _, noisy = noisy_logits(source, out / "adapter", AdaptNoisyStream(rank=4, alpha=8.0))
    assert close(noisy, theirs)
    assert not close(theirs, before), "on all rows the adapter changes the text: why peft must not be used"


def test_ours_opens_what_peft_made(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    names = adapter_parameters_of(out)
    modules = sorted({name.removesuffix(".lora_A.weight") for name in names if name.endswith("lora_A.weight")})
    config: Any = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {CONFIG, WEIGHTS}
    with torch.no_grad():
        theirs = model(TEXT).logits[0]
    program, noisy = noisy_logits(source, tmp_path, AdaptNoisyStream(rank=3, alpha=5.0))
    assert adapter_parameters(program).keys() == names
    assert close(noisy, theirs)


def adapter_parameters_of(out: Path) -> set[str]:
    return {name for name in read_adapter(out / "adapter", None, "cpu") if "lora" in name}


def test_transformers_finds_no_adapter(made: tuple[Path, Path]) -> None:
    """With peft installed transformers looks for one beside the model, and there is none."""
    source, out = made
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (source, out))
    assert not getattr(after, "_hf_peft_config_loaded", False)
    with torch.no_grad():
        assert torch.equal(before(TEXT).logits, after(TEXT).logits)
