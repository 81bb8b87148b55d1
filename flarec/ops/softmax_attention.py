"""Softmax attention with a causal mask, an optional sliding window and soft cap (docs/semantics.md section 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..kernels.softmax_attention.reference import reference, reference_step
from ..layout import Layout
from .mixer import Form, Mixer, Site, Slot, plain_layout

if TYPE_CHECKING:
    from ..kernels.softmax_attention.attention_schedule import AttentionSchedule


def _captured(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    layout = plain_layout(q.shape[0], q.shape[2], q.device)
    return reference(q, k, v, layout, scale=scale, window=window, softcap=softcap)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _suffix(window: int | None) -> str:
    return "" if window is None else f"_{window}"


def _described(window: int | None) -> str:
    return f", sliding window {window}" if window else ""


@dataclass(frozen=True)
class SoftmaxMask:
    """[rows, T, S] bool: what every token may attend to; S = T, or cache slots and noisy tokens with a cache."""

    window: int | None = None
    operand: ClassVar[str] = "mask"

    @property
    def name(self) -> str:
        return f"softmax_mask{_suffix(self.window)}"

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        from ..kernels.softmax_attention.mask import visibility

        return visibility(layout, window=self.window, cache_length=capacity)

    def describe(self) -> str:
        return f"softmax visibility{_described(self.window)}"


@dataclass(frozen=True)
class AttentionIntervals:
    """`AttentionSchedule`: the intervals of slots that every token reads, and who reads each tile of keys (Triton)."""

    window: int | None = None
    operand: ClassVar[str] = "schedule"
    on_host: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"attention_intervals{_suffix(self.window)}"

    def build(self, layout: Layout, capacity: int | None) -> AttentionSchedule:
        from ..kernels.softmax_attention.attention_schedule import AttentionSchedule

        return AttentionSchedule.from_layout(layout, window=self.window)

    def describe(self) -> str:
        return f"attention intervals{_described(self.window)}"


def _slots(site: Site) -> Iterator[Slot]:
    for operand, cache, kind in (("k", "k_cache", "keys"), ("v", "v_cache", "values")):
        shape = ("batch", site.size(operand, 1), "capacity", site.size(operand, 3))
        yield Slot(cache, shape, site.dtype(operand), kind)


def _options(site: Site) -> Iterator[str]:
    for name in ("window", "softcap"):
        if site[name] is not None:
            yield f"{name} {site[name]}"
    yield f"scale {site['scale']:.4g}"


def _refuses(site: Site) -> str | None:
    from ..kernels.softmax_attention.triton_attention import supports

    heads, key_heads, key_dim, value_dim = (site.size(*at) for at in (("q", 1), ("k", 1), ("q", 3), ("v", 3)))
    return supports(site.dtype("q"), heads, key_heads, key_dim, value_dim, scale=site["scale"])


SOFTMAX_ATTENTION = Mixer(
    name="softmax_attention",
    captured=_captured,
    fake=_fake,
    mixing="attention",
    axes={"q": "BHLD", "k": "BGLD", "v": "BGLV"},
    output="BLHV",
    sees="clean: causal per document; noisy: clean before the anchor + own block",
    streams=reference,
    cached=reference_step,
    slots=_slots,
    options=_options,
    forms={
        "torch": Form(
            train="flarec.kernels.softmax_attention.torch_sdpa:two_stream",
            step="flarec.kernels.softmax_attention.torch_sdpa:cached",
            reads=lambda site: SoftmaxMask(site["window"]),
            omits=("window",),
            frozen=True,
        ),
        "triton": Form(
            train="flarec.kernels.softmax_attention.triton_attention:two_stream",
            step="flarec.kernels.softmax_attention.step.launch:step",
            reads=lambda site: None if site.step else AttentionIntervals(site["window"]),
            refuses=_refuses,
            omits=("window",),
            step_omits=(),
            in_place=("q", "k", "v"),
            frozen=True,
        ),
    },
)
"""q [B,H,L,Dqk], k [B,Hkv,L,Dqk], v [B,Hkv,L,Dv] -> [B,L,H,Dv]; slots k_cache, v_cache [B,Hkv,M,D]."""
