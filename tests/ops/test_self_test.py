"""On a card that nobody tried the Triton kernels are compared with PyTorch once: right ones pass and are remembered,
wrong ones are refused in one sentence. The card is made up; the kernels run in Triton's interpreter."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flarec.errors import FlarecWarning, PassError
from flarec.kernels import row_losses
from flarec.layout import Block, build_layout
from flarec.ops import self_test
from flarec.passes import AdaptNoisyStream, lower
from tests.models import FAMILIES, captured

pytest.importorskip("triton")
MODULES = {
    "short_conv": ("flarec.kernels.short_conv.triton_conv", "two_stream", "step_of_layout"),
    "softmax_attention": ("flarec.kernels.softmax_attention.triton_attention", "two_stream", ""),
    "linear_attention": ("flarec.kernels.linear_attention.triton_decode", "", "step"),
}


def small_layout() -> Any:
    """As the test's own, but for its size: interpreted kernels are slow."""
    blocks = [[Block(0, 3, 2, 0, "causal"), Block(0, 4, 2, 1, "block_end")], [Block(0, 5, 2, 0, "causal")]]
    return build_layout([[6, 3], [7]], blocks)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[tuple[int, int] | None], None]:
    """Makes up the compute capability; nothing is known of any card."""
    monkeypatch.setenv("FLAREC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(self_test, "_passed", set())
    monkeypatch.setattr(self_test, "_training_layout", small_layout)
    monkeypatch.setattr(self_test, "PREFILL", 4)
    monkeypatch.setattr(self_test, "VOCABULARY", 60)

    def choose(found: tuple[int, int] | None) -> None:
        monkeypatch.setattr(self_test, "capability", lambda device: found)

    choose((12, 0))
    return choose


@pytest.fixture
def mixers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What chooses tokens and computes losses is taken for right: interpreted, it takes seconds."""
    for name in ("_sampling", "_row_losses"):
        monkeypatch.setattr(self_test, name, lambda device: "")


@pytest.fixture
def tests_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compared."""
    ran: list[str] = []
    for name in ("_site", "_sampling", "_row_losses"):
        test = getattr(self_test, name)

        def counted(*arguments: Any, test: Any = test, name: str = name) -> str:
            ran.append(arguments[0].name if name == "_site" else name)
            return str(test(*arguments))

        monkeypatch.setattr(self_test, name, counted)
    return ran


@pytest.fixture(autouse=True)
def no_notice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlarecWarning)
        yield


def test_right_kernels_pass_once(card: Any, tests_run: list[str], tmp_path: Path) -> None:
    program = captured("lfm2")
    lower(program, "train", kernels="triton")
    assert tests_run == ["_sampling", "_row_losses", "short_conv", "softmax_attention"], "sites of a kind are one"
    lower(program, "train", kernels="triton")
    lower(program, "decode", kernels="triton")
    assert tests_run[4:] == ["short_conv", "softmax_attention"], "steps are other kernels"
    self_test._passed.clear()  # another process
    lower(program, "train", kernels="triton")
    assert len(tests_run) == 6
    card((10, 0))
    lower(program, "decode", kernels="triton")
    assert len(tests_run) == 10, "another card is asked anew"


def test_what_a_card_was_tried_for(card: Any, tests_run: list[str]) -> None:
    for found in ((9, 0), None):
        card(found)
        lower(captured("lfm2"), "train", kernels="triton")
    assert tests_run == []
    card((12, 0))
    lower(captured("lfm2"), "decode", kernels="torch")
    assert tests_run == ["_sampling"], "PyTorch's mixers, but tokens are chosen by a kernel"
    with pytest.warns(FlarecWarning, match=r"not tried on cpu \(compute capability 10\.3\)"):
        card((10, 3))
        lower(captured("lfm2"), "decode", kernels="torch")


def test_nothing_is_remembered_where_that_is_switched_off(
    card: Any, mixers_only: None, tests_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAREC_CACHE_DIR", "off")
    for _ in range(2):
        lower(captured("lfm2"), "decode", kernels="torch")
        self_test._passed.clear()
    assert tests_run == ["_sampling"] * 2


@pytest.mark.parametrize(
    "family", ["qwen3_5_text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kimi_linear", "bamba"))]
)
def test_steps_of_every_kind(card: Any, mixers_only: None, tests_run: list[str], family: str) -> None:
    """Scalar and channel gates, with and without the delta rule; a prefill too."""
    lower(captured(family), "decode", kernels="triton")
    assert {"short_conv", "softmax_attention", "linear_attention"} <= {*tests_run}


def test_gradients_over_a_frozen_clean_stream(card: Any, mixers_only: None, tests_run: list[str]) -> None:
    adapter = AdaptNoisyStream(rank=4, alpha=4.0)
    lower(captured("lfm2"), "train", kernels="triton", mask_vector=True, adapter=adapter)
    assert tests_run[-1] == "softmax_attention"


@pytest.mark.parametrize(
    ("mixer", "target"),
    [("short_conv", "train"), ("short_conv", "decode"), ("softmax_attention", "train"), ("linear_attention", "decode")],
)
def test_a_wrong_kernel_is_refused(
    card: Any, mixers_only: None, monkeypatch: pytest.MonkeyPatch, mixer: str, target: str
) -> None:
    module, *names = MODULES[mixer]
    name = names[target == "decode"]
    right = getattr(importlib.import_module(module), name)

    def wrong(**operands: Any) -> Any:
        results = right(**operands)
        return (1.01 * results[0], *results[1:]) if isinstance(results, tuple) else 1.01 * results

    monkeypatch.setattr(importlib.import_module(module), name, wrong)
    with pytest.raises(PassError) as raised:
        lower(captured("bamba" if mixer == "linear_attention" else "lfm2"), target, kernels="triton")
    assert str(raised.value).startswith("the Triton kernels cannot be used on cpu (compute capability 12.0): " + mixer)
    assert "in its output" in str(raised.value) and str(raised.value).endswith("; use --kernels torch")
    lower(captured("lfm2"), target, kernels="torch")


def test_a_kernel_that_does_not_run_is_refused(card: Any, mixers_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**operands: Any) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nRequired: 262144")

    monkeypatch.setattr(importlib.import_module(MODULES["short_conv"][0]), "two_stream", broken)
    with pytest.raises(PassError, match="short_conv RuntimeError: out of resource: shared memory; use --kern"):
        lower(captured("lfm2"), "train", kernels="triton")


def test_a_wrong_gradient_is_refused(card: Any, mixers_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is right."""
    module = importlib.import_module(MODULES["softmax_attention"][0])
    right = module.two_stream

    def wrong(**operands: Any) -> torch.Tensor:
        k = operands["k"]
        return right(**{**operands, "k": 0.9 * k + 0.1 * k.detach()})

    monkeypatch.setattr(module, "two_stream", wrong)
    with pytest.raises(PassError, match=r"softmax_attention is off by .* in the gradient of k"):
        lower(captured("lfm2"), "train", kernels="triton")


def test_wrong_tokens_and_losses(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    implementation = row_losses.implementation
    monkeypatch.setattr(
        row_losses, "implementation",
        lambda name: implementation("torch") if name == "torch" else _halved(implementation("torch")),
    )
    with pytest.raises(PassError, match="row_losses is off by"):
        lower(captured("lfm2"), "train", kernels="triton")
    monkeypatch.setattr(self_test, "_sampling", lambda device: "chooses other tokens")
    self_test._passed.clear()
    card((11, 0))
    with pytest.raises(PassError, match="sampling chooses other tokens; take another device"):
        lower(captured("lfm2"), "decode", kernels="torch")


def _halved(losses: Any) -> Any:
    def wrong(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return losses(logits / 2, *arguments, **options)

    return wrong


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "lfm2"])
def test_kernels_pass_on_this_card(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype) -> None:
    """Also on one that was tried."""
    from flarec.frontend.export import capture
    from tests.models import tiny_model

    monkeypatch.setenv("FLAREC_CACHE_DIR", "off")
    monkeypatch.setattr(self_test, "TRIED", frozenset())
    program = capture(tiny_model(family).to("cuda", dtype))
    for target in ("train", "decode"):
        lower(program, target, kernels="triton")
