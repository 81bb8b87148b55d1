"""The prefill of linear attention through the training kernels: outputs and pending rows of the cached reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flarec.kernels.linear_attention.reference_step import reference_step
from flarec.kernels.linear_attention.tiles.schedule import TileSchedule
from flarec.layout import PADDING, Block, build_layout
from tests.kernels.linear_attention.cases import Case

triton_prefill = pytest.importorskip("flarec.kernels.linear_attention.tiles.prefill")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    Case("scalar", True, True, 2, seed=1), Case("channel", True, False, 1, seed=2),
    Case("scalar", False, False, 2, seed=3), Case("none", True, True, 1, seed=4),
]


def result_names(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("out", "state", "pending_k", "pending_d", "pending_g"), results, strict=False))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.gate}-{case.delta}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_cached_reference(case: Case, dtype: torch.dtype) -> None:
    """Rows of unequal length, NaN on padding, pending rows of which some are accepted, blocks inside and at the end."""
    layout = build_layout(
        [[37], [20], [0]],
        [[Block(0, 5 + 37, 3, 0, "causal")], [Block(0, 29, 2), Block(0, 20, 2)], [Block(0, 4, 3)]],
        cached=[5, 9, 4],
    )
    inputs: dict[str, Any] = case.inputs(layout)
    pending: dict[str, Any] = case.inputs(build_layout([[3]] * 3, [[]] * 3))
    accepted = torch.tensor([0, 3, 2])
    padding = layout.token_document() == PADDING
    low = {n: None if x is None else x.detach().to(dtype) for n, x in inputs.items()}
    cache = [inputs["initial_state"].detach().float(), *(
        None if x is None else x.detach().float() for x in (pending["k"], pending["v"], pending["g"])
    )]

    def spoiled(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.masked_fill(padding.view(*padding.shape, *[1] * (x.ndim - 2)), float("nan")).to(DEVICE)

    got = triton_prefill.linear_attention_prefill(
        *(spoiled(low[name]) for name in ("q", "k", "v", "g", "beta")),
        *(None if x is None else x.to(DEVICE) for x in cache),
        accepted.to(DEVICE),
        TileSchedule.from_layout(layout, 16, 16).to(DEVICE),
        clean_padding=padding[:, : layout.clean_length].to(DEVICE),
        **case.options(),
    )
    wide: list[Any] = [None if (x := low[n]) is None else x.double() for n in ("q", "k", "v", "g", "beta")]
    old: list[Any] = [None if x is None else x.double() for x in cache]
    names = ("q", "k", "v", "g", "beta", "state", "pending_k", "pending_d", "pending_g")
    named: dict[str, Any] = dict(zip(names, (*wide, *old), strict=True))
    exact = reference_step(**named, accepted=accepted, layout=layout, **case.options())
    assert len(got) == len(exact) == (4 if case.gate == "none" else 5)
    for name, wanted in result_names(exact).items():
        mine = result_names(got)[name].cpu()
        assert bool(mine.isfinite().all()), name
        assert mine.dtype == (dtype if name == "out" else torch.float32)
        allowed = torch.finfo(mine.dtype).eps * (1 if mine.dtype.itemsize == 2 else 50)
        if dtype == torch.bfloat16 and mine.dtype == torch.float32:
            allowed = 2**-14  # sums of numbers of 16 bits
        assert float((mine.double() - wanted).norm()) <= allowed * float(wanted.norm()), name


def test_no_tensor_of_all_rows_is_copied_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read the rows where they lie, parts of a larger tensor, and write what is left pending; nothing else of
    this size is made."""
    launched: list[str] = []
    monkeypatch.setattr(triton_prefill.Problem, "launch", lambda p, name, *given, **more: launched.append(name))
    monkeypatch.setattr(triton_prefill.triton.knobs.runtime, "interpret", False)
    layout = build_layout([[80]], [[]], cached=[0])
    q, k, v = torch.zeros(1, 80, 3, 2, 32, dtype=torch.bfloat16).unbind(2)
    g, beta, state = torch.zeros(1, 80, 2), torch.zeros(1, 80, 2, dtype=torch.bfloat16), torch.zeros(1, 2, 32, 32)
    made: list[tuple[str, int]] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend((str(func), x.numel()) for x in pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    with Noting():
        triton_prefill.linear_attention_prefill(
            q, k, v, g, beta, state, k[:, :0].float(), v[:, :0].float(), g[:, :0], torch.zeros(1, dtype=torch.int64),
            TileSchedule.from_layout(layout, 16), clean_padding=torch.zeros(1, 80, dtype=torch.bool), scale=1.0,
            delta=True, l2norm=True,
        )
    large = {name for name, count in made if count >= q.numel()}
    assert large <= {"aten.empty.memory_format", "aten.new_empty.default"}
    assert launched[-4:] == ["prefill_solve", "prefill_states", "clean_outputs", "noisy_outputs"]
