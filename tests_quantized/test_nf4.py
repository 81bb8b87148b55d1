"""nf4: the codes are those of the QLoRA paper, and an adapter learns over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flarec.checkpoint.manifest import Manifest
from flarec.ops.quantized import QuantizedWeight, quantize, quantized_linear
from flarec.train.options import Options
from flarec.train.prepare import prepare
from flarec.train.progress import Reporter
from tests.checkpoints import tree
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import tiny_checkpoint

DTYPES = [torch.float32, torch.bfloat16]


def normal_float() -> Tensor:
    """[16] the values of NF4 as https://arxiv.org/abs/2305.14314 makes them (section 3, appendix E): quantiles of the
    normal distribution, seven below and eight above an exact zero, scaled to -1 ... 1."""
    last = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(last, 0.5, count + 1, dtype=torch.float64)[:-1]) for count in (8, 7)
    )
    values = torch.cat([above, torch.zeros(1, dtype=torch.float64), -below])
    return (values / values.abs().max()).sort().values


def test_the_oracle_is_the_table_of_the_paper() -> None:
    printed = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
               0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(normal_float(), torch.tensor(printed, dtype=torch.float64), rtol=0, atol=3e-5)


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_values_of_the_table_come_back(scale: float) -> None:
    """Where all blocks have one scale, its 8-bit code is exact, too."""
    order = torch.cat([torch.randperm(16, generator=torch.Generator().manual_seed(n)) for n in range(4 * 128)])
    values = (scale * normal_float()[order]).float().reshape(64, 128)
    found = quantize(values, "nf4")
    torch.testing.assert_close(found.weight(torch.float32), values, rtol=1e-4, atol=3e-5 * scale)
    assert found.nbytes * 8 / values.numel() < 4.14


def test_a_weight_becomes_the_nearest_value_of_its_block() -> None:
    """Within half the distance of neighbours, times the largest of the block, whose code may be off by a hundredth."""
    values = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    found = quantize(values, "nf4").weight(torch.float32).flatten()
    blocks = [*zip(values.flatten().split(64), found.split(64), strict=True)]
    table = normal_float().float()
    for block, codes in blocks:
        largest = block.abs().max()
        nearest = table[(block[:, None] / largest - table).abs().argmin(1)] * largest
        assert ((codes - nearest).abs() <= 0.02 * largest).float().mean() > 0.98  # some lie between two values
        assert ((codes - block).abs() <= 0.175 * largest).all()


def layer(x: Tensor, held: QuantizedWeight) -> Tensor:
    result: Tensor = quantized_linear(x, None, held.codes, held.scale, held.nested, held.offset, held.shape[0])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 40), (7, 9), (64, 64)])
def test_the_layer_is_linear_over_what_codes_stand_for(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    held = quantize(torch.randn(shape, dtype=dtype), "nf4")
    empty = quantize(torch.randn(shape, dtype=dtype, device="meta"), "nf4")
    assert [value.shape for value in empty.parts.values()] == [value.shape for value in held.parts.values()]
    x = torch.randn(2, 3, shape[1], dtype=dtype, requires_grad=True)
    ours, theirs = layer(x, held), torch.nn.functional.linear(x, held.weight(dtype))
    assert torch.equal(ours, theirs)
    seed = torch.randn_like(ours)
    one, other = (torch.autograd.grad(result, x, seed)[0] for result in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_has_the_same_codes(kind: str, dtype: torch.dtype) -> None:
    values = torch.randn(512, 384, dtype=dtype)
    here, there = quantize(values, kind), quantize(values.cuda(), kind)  # type: ignore[arg-type]
    same = (here.weight(dtype) - there.weight(dtype).cpu()).abs() <= 0.01 * values.abs().max()
    assert same.float().mean() > 0.999
    x = torch.randn(2, 5, 384, dtype=dtype, device="cuda", requires_grad=True)
    found = layer(x, there)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, there.weight(dtype)))
    found.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


RECIPE = ["--recipe", "draft", "--set", "adapter.rank=4", "--set", "objective.ar_weight=0", "--set", "adapter.base=nf4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantized")
    write_data(place / "data.jsonl")
    tiny_checkpoint(place, "qwen3_5_text")
    return place


def test_a_conversion_leaves_the_weights_as_they_are(place: Path) -> None:
    before = tree(place / "qwen3_5_text")
    result = flarec("convert", place / "qwen3_5_text", "--data", place / "data.jsonl", "--out", place / "out", *QUICK,
                    *RECIPE)
    assert result.exit_code == 0, result.output
    after = tree(place / "out")
    assert before == {name: after[name] for name in before}
    manifest = Manifest.read(place / "out")
    assert manifest is not None and str(manifest.data["base"]).startswith("nf4 (bitsandbytes 0.")


def test_a_step_in_bfloat16_is_finite_and_small(place: Path) -> None:
    options = Options(
        source=str(place / "qwen3_5_text"), data=(str(place / "data.jsonl"),), out=place / "bf16", device="cpu",
        recipe="draft", kernels="torch",
        overrides=("adapter.rank=4", "objective.ar_weight=0", "adapter.base=nf4", "optimizer.precision=bf16",
                   "evaluation.every=0", "data.max_length=96"),
    )
    run = prepare(options, Reporter())
    step = run.trainer.advance().read(run.tokenizer)
    assert step["gradient_norm"] > 0
    assert run.captured.quantized and not [n for n in run.trainer.program.parameters() if n in run.captured.quantized]
