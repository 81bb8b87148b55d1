"""lower-mixers with the Triton kernels: the same losses, gradients and texts as with the torch kernels, and refusals.

On a machine without a GPU the kernels run in Triton's interpreter (tests/conftest.py).
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import fx

from flarec import ops
from flarec.decode import Engine
from flarec.errors import PassError
from flarec.ir.pipeline import run_pipeline
from flarec.ir.program import Program, target_name
from flarec.kernels.linear_attention.step.schedule import StepSchedule
from flarec.kernels.linear_attention.tiles.schedule import TileSchedule
from flarec.layout import build_layout
from flarec.ops.linear_attention import StepTiles, Tiles
from flarec.ops.short_conv import ConvOrder
from flarec.ops.softmax_attention import AttentionIntervals
from flarec.passes import lower
from flarec.passes.lower_mixers import CONTIGUOUS, LowerMixers
from flarec.passes.properties import CHECKS
from tests.checkpoints import MASK_ROW
from tests.models import ALL_FAMILIES, FAMILIES, PLAIN_FAMILIES, captured, captured_few, captured_float64
from tests.passes.snippets import before_and_after, count, example

pytest.importorskip("triton")

MIXERS = (ops.SOFTMAX_ATTENTION, ops.SHORT_CONV, ops.LINEAR_ATTENTION)
"""Ops with a Triton form, for training and for decoding."""


def triton_calls(program: Program, mixer: ops.Mixer, step: bool = False) -> int:
    return len(program.calls(mixer.call("triton", step)))


def names(program: Program) -> set[str]:
    return {target_name(node) for node in program.graph.nodes if node.op == "call_function"}


def test_every_site_of_the_training_graph_gets_its_triton_form() -> None:
    before, after = before_and_after("lower-mixers", "kimi_linear", "train", kernels="triton")
    assert triton_calls(after, ops.LINEAR_ATTENTION) == 2
    assert triton_calls(after, ops.SHORT_CONV) == 2
    assert triton_calls(after, ops.SOFTMAX_ATTENTION) == 2
    assert after.derivations["attention_intervals"] == AttentionIntervals(None)
    assert after.derivations["conv_order_4"] == ConvOrder(4)
    assert after.derivations["state_tiles"] == Tiles(64)
    assert "softmax_mask" not in after.derivations
    assert after.calls(ops.MOE_EXPERTS.call("torch")), "experts have no Triton form"
    assert "lowered_triton.short_conv" in names(after), "the record of the pass says what became what"
    assert after.history[-1].delta["lowered_triton.short_conv"] == 2
    assert triton_calls(before, ops.SHORT_CONV) == 0


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (*ALL_FAMILIES, *PLAIN_FAMILIES)]
)
def test_no_mixer_of_any_family_is_refused(family: str) -> None:
    """What has a Triton form takes it; the rest is torch by rule, not because a size did not fit."""
    for target, mixers, step in (("train", MIXERS, False), ("decode", MIXERS, True)):
        after = lower(captured(family), target, kernels="triton")
        before = lower(captured(family), target, kernels="torch")
        for mixer in mixers:
            assert triton_calls(after, mixer, step) == len(before.calls(mixer.call("torch", step)))
            assert not after.calls(mixer.call("torch", step))


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_read_projections_without_a_copy(family: str) -> None:
    """A copy before a kernel goes where its form reads operands in place; the torch forms keep theirs."""
    for target, step in (("train", False), ("decode", True)):
        before, after = before_and_after("lower-mixers", family, target, kernels="triton")
        copies = {
            (mixer.name, name) for mixer in MIXERS for node in after.calls(mixer.call("triton", step))
            for name, value in node.kwargs.items() if isinstance(value, fx.Node) and value.target is CONTIGUOUS
        }
        assert not copies and count(before, "contiguous") >= 3 + count(after, "contiguous")
        for node in after.calls(ops.SHORT_CONV.call("triton", step)):
            x: Any = node.kwargs["x"]
            assert x.target is torch.ops.aten.transpose.int
        _, torch_forms = before_and_after("lower-mixers", family, target, kernels="torch")
        assert count(torch_forms, "contiguous") == count(before, "contiguous")


def test_attention_over_the_cache_reads_the_layout_and_derives_nothing() -> None:
    _, after = before_and_after("lower-mixers", "bamba", kernels="triton")
    assert triton_calls(after, ops.LINEAR_ATTENTION, step=True) == 2
    assert triton_calls(after, ops.SHORT_CONV, step=True) == 2
    attention = after.calls(ops.SOFTMAX_ATTENTION.call("triton", step=True))
    assert len(attention) == 2 and all(node.kwargs["layout"].name == "layout" for node in attention)  # type: ignore[union-attr]
    assert after.derivations["step_tiles"] == StepTiles(64)
    assert "softmax_mask" not in after.derivations


# a fixed decay, a conv of width 3, soft caps with windows, a recurrence without a Triton form, mixers side by side
OTHER_MIXERS = ("minimax", "lfm2", "gemma2", "recurrent_gemma", "falcon_h1")


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_MIXERS])
def test_losses_and_gradients_are_those_of_the_torch_kernels(family: str) -> None:
    programs = [lower(captured_few(family), "train", kernels=kernels) for kernels in ("triton", "torch")]
    ids, layout = example(3, rows=1)
    real = (layout.token_document()[0] >= 0).nonzero().squeeze(1)
    target = torch.randint(0, 300, (len(real),), generator=torch.Generator().manual_seed(0))
    results = []
    for program in programs:
        logits = program(ids, layout=layout, head_rows=real)
        loss = torch.nn.functional.cross_entropy(logits, target)
        parameters = program.parameters()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        results.append((loss.detach(), dict(zip(parameters, grads, strict=True))))
    (loss, gradients), (expected, expected_gradients) = results
    assert float((loss - expected).abs()) < 1e-5
    for name, wanted in expected_gradients.items():
        got = gradients[name]
        assert (got is None) == (wanted is None), name
        if wanted is not None and got is not None:
            assert float((got - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-7, name


LONG = list(range(3, 69))
"""More tokens than a step kernel takes, so that the prefill runs the training kernels."""
SHORT = [[5, 9, 42, 7, 100], [8, 3]]


def generate(family: str, kernels: str, mode: str, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    program = lower(captured_few(family), "decode", kernels=kernels)
    engine = Engine(
        program,
        mask_token_id=MASK_ROW,
        block_size=3,
        readouts={"ar-trust": "causal", "diffusion-trust": "block_end"},
        eos_ids=(),
        max_positions=1024,
        suppress=[MASK_ROW],
    )
    results = engine.generate(prompts, mode=mode, seed=3, max_new_tokens=3, **options)
    return [result.token_ids for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_texts_are_those_of_the_torch_kernels(family: str) -> None:
    assert generate(family, "triton", "ar-trust", [LONG]) == generate(family, "torch", "causal", [LONG])


@pytest.mark.slow
def test_denoising_steps_are_those_of_the_torch_kernels() -> None:
    options: dict[str, Any] = {"prompts": SHORT, "threshold": 0.5}
    expected = generate("bamba", "torch", "diffusion-trust", **options)
    assert generate("bamba", "triton", "diffusion-trust", **options) == expected


def test_a_site_that_the_kernels_cannot_run_is_named() -> None:
    message = r"cannot run node '\w+' \(.*linear_attention\) in .*float64.*use --kernels torch"
    with pytest.raises(PassError, match=message):
        lower(captured_float64("bamba"), "train", kernels="triton")


def test_other_chunk_sizes_are_refused() -> None:
    before, _ = before_and_after("lower-mixers", "bamba")
    with pytest.raises(PassError, match="chunks of 16, 32, 64 tokens, not 48"):
        run_pipeline(before, [LowerMixers(implementation="triton", chunk_size=48)], CHECKS)


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    """What the pass says where a package is hidden. In a fresh process: whether kernels are interpreted is decided when
    they are defined; a child of it for each package, which finds torch there."""
    code = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import torch, transformers, torch.export
for hidden in ("", "triton"):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name == hidden:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Hidden())
    from flarec.ops.linear_attention import StepTiles, Tiles
    from flarec.ops.short_conv import ConvOrder
    from flarec.ops.softmax_attention import AttentionIntervals, SoftmaxMask
    from flarec.passes import lower
    from flarec.errors import PassError
    from tests.models import captured
    try:
        lower(captured("lfm2"), "train", kernels="triton")
    except PassError as error:
        print(f"{hidden}: {error}", flush=True)
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert found.keys() == {"", "triton"}, done.stderr
    return found


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ("", "the Triton kernels run on CUDA devices, and this model is on 'cpu'; use --device cuda or --kernels"),
        ("triton", "the Triton kernels need the package triton; install flarec[gpu], or use --kernels torch"),
    ],
)
def test_where_triton_cannot_run(hidden: str, message: str, refusals: dict[str, str]) -> None:
    assert message in refusals[hidden]


@pytest.mark.parametrize(("dtype", "channels", "narrow"), [
    (torch.bfloat16, 32, True), (torch.float16, 16, True), (torch.bfloat16, 64, False), (torch.float32, 32, False),
])
def test_steps_of_narrow_heads_are_prefills(dtype: torch.dtype, channels: int, narrow: bool) -> None:
    """More than 16 slots of 16-bit heads under 128 bytes do not run in the step kernel."""
    q = torch.empty(1, 4, 2, channels, dtype=dtype, device="meta")
    g = torch.empty(1, 4, 2, device="meta")
    site = ops.Site({"q": q, "k": q, "v": q, "g": g, "beta": g, "scale": 1.0, "delta": True, "l2norm": True}, step=True)
    form = ops.LINEAR_ATTENTION.forms["triton"]
    assert form.reads is not None
    derivation = form.reads(site)
    assert derivation == StepTiles(64, narrow=narrow)
    for rows, prefill in ((16, False), (17, narrow), (64, narrow), (65, True)):
        schedule = derivation.build(build_layout([[rows]], [[]]), 128)
        assert isinstance(schedule, TileSchedule if prefill else StepSchedule)
