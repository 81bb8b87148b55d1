"""Masters, gradients and moments of the trained parameters, a part of them on each rank (ZeRO, stage 2).

Every rank holds all parameters, as its program computes with them. What training keeps beside them is cut in equal
parts: the parameters of a decoder layer that have one dtype stand one behind the other, in buckets, of which each rank
has its part; so do those of no layer. During a backward pass the gradients are added up over the ranks in float32,
bucket by bucket, so that each gets the sum of its part, and are freed; the optimizer changes the part's masters, and
all ranks gather the parameters that are rounded from them.

Elementwise nothing differs from one rank: AdamW does not see where a tensor is cut, and the norm is that of all.
`flarec.train.gathering` cuts the parameters themselves, too, over the same buckets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .moments import BLOCK, KINDS, STEP, MomentKind, kinds
from .precision import Weights
from .ranks.group import Ranks
from .saves import SavedState

BUCKET_ELEMENTS = 1 << 25
"""Of one collective: enough to use the links between GPUs well, and little beside the weights."""
AT_ONCE = 2
"""Buckets that are added up while the backward pass goes on."""


@dataclass(frozen=True)
class Span:
    """Elements `start .. stop` of a flattened parameter, which stand from `at` on in something longer."""

    name: str
    start: int
    stop: int
    at: int

    @property
    def place(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)

    def by(self, unit: int) -> Span:
        """Of tensors that have one value for every `unit` elements, of which `start` and `at` are multiples."""
        return Span(self.name, self.start // unit, -(-self.stop // unit), self.at // unit)


def cut(sizes: Mapping[str, int], start: int, stop: int, unit: int = 1) -> list[Span]:
    """What stands at `start .. stop` of the parameters, one behind the other; places count from `start`. unit: each
    parameter begins at a multiple of it."""
    found, at = [], 0
    for name, size in sizes.items():
        first, last = max(start, at), min(stop, at + size)
        if first < last:
            found.append(Span(name, first - at, last - at, first - start))
        at += _up(size, unit)
    return found


def _up(size: int, unit: int) -> int:
    """To a multiple."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Stretch:
    """Parameters of one dtype and layer at `start .. start + length`, padded to a multiple of the ranks; of those whose
    moments are codes every part begins with a block.

    spans   where the parameters stand in it
    pieces  where they stand in this rank's part of it [length / size]
    layer   that of the parameters, None for those of no layer
    coded   whether the moments of the parameters are codes
    """

    dtype: torch.dtype
    length: int
    spans: list[Span]
    pieces: list[Span]
    layer: int | None
    coded: bool = False

    @staticmethod
    def all_of(
        parameters: Mapping[str, nn.Parameter], layers: Mapping[str, int], ranks: Ranks, elements: int,
        coded: frozenset[str] = frozenset(),
    ) -> Iterator[Stretch]:
        """Of all parameters, `elements` long where there are as many. layers: of the parameters that have one."""
        groups: dict[tuple[int | None, torch.dtype, bool], dict[str, int]] = {}
        for name, value in parameters.items():
            groups.setdefault((layers.get(name), value.dtype, name in coded), {})[name] = value.numel()
        for (layer, dtype, in_codes), sizes in groups.items():
            unit = BLOCK if in_codes else 1
            total, most = sum(_up(size, unit) for size in sizes.values()), _up(elements, unit)
            for start in range(0, total, most):
                end = min(start + most, total)
                part = _up(-(-(end - start) // ranks.size), unit)
                first = start + ranks.rank * part
                pieces = cut(sizes, first, min(first + part, end), unit)
                yield Stretch(dtype, part * ranks.size, cut(sizes, start, end, unit), pieces, layer, in_codes)

    @torch.no_grad()
    def fill(self, part: Tensor, values: Mapping[str, Tensor]) -> None:
        """This rank's part from whole parameters."""
        for span in self.pieces:
            part[span.place].copy_(values[span.name].detach().reshape(-1)[span.start : span.stop])


class Bucket:
    """A stretch with what training keeps of it.

    master, grad   this rank's part: float32 for 16-bit parameters, else in their dtype
    tensors        by name what the optimizer changes: the pieces of `master`
    kinds          what the optimizer keeps of them
    """

    def __init__(self, stretch: Stretch, ranks: Ranks, device: torch.device) -> None:
        self.stretch = stretch
        self.dtype, self.length, self.layer = stretch.dtype, stretch.length, stretch.layer
        self.spans, self.pieces = stretch.spans, stretch.pieces
        self.wide = torch.float32 if self.dtype.itemsize == 2 else self.dtype
        part = self.length // ranks.size
        self.master, self.grad = (torch.zeros(part, dtype=self.wide, device=device) for _ in range(2))
        self.tensors = {span.name: nn.Parameter(self.master[span.place]) for span in self.pieces}
        self.kinds = kinds(self.wide, stretch.coded)

    def rounded(self) -> Tensor:
        """This rank's part of the parameters."""
        return self.master.detach().to(self.dtype)


@dataclass(frozen=True)
class _Running:
    """A bucket that is being added up: in `space`, to `part`; `wait` before they are used."""

    bucket: Bucket
    space: Tensor
    part: Tensor
    wait: Callable[[], None]


class ShardedWeights(Weights):
    """As `Weights`, over several ranks. Every method is called by all of them, in the same order.

    layers: by name the decoder layer of the parameters that have one.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], exact: Mapping[str, Tensor] | None, ranks: Ranks,
        layers: Mapping[str, int] | None = None, coded: frozenset[str] = frozenset(),
    ) -> None:
        self.ranks = ranks
        self.parameters = dict(parameters)
        self.coded = coded
        self.masters = {}  # no rank has whole ones
        for parameter in self.parameters.values():
            parameter.data = parameter.data.contiguous()
        self.moved = dict.fromkeys(self.parameters, 0)
        """By name how many steps the optimizer has taken with it."""
        self._learns: set[str] = set()
        place = {name: number for number, name in enumerate(self.parameters)}
        stretches = Stretch.all_of(self.parameters, layers or {}, ranks, BUCKET_ELEMENTS, coded)
        self._device = next(iter(self.parameters.values())).device
        self.buckets = [
            Bucket(stretch, ranks, self._device)
            for stretch in sorted(stretches, key=lambda stretch: place[stretch.spans[0].name])
        ]
        values = {name: (exact or {}).get(name, parameter) for name, parameter in self.parameters.items()}
        for bucket in self.buckets:
            bucket.stretch.fill(bucket.master, values)
        most = max(bucket.length * bucket.wide.itemsize for bucket in self.buckets)
        self._spaces = deque(torch.empty(most, dtype=torch.uint8, device=self._device) for _ in range(AT_ONCE))
        self._running: deque[_Running] = deque()
        self._left = self._in_order()
        self._arrived: set[str] = set()
        for name, parameter in self.parameters.items():
            self.hook(name, parameter)
        self.round()

    def _in_order(self) -> list[Bucket]:
        """The buckets, the one that is added up first at the end: a backward pass ends where the parameters begin."""
        return [*self.buckets]

    @property
    def optimized(self) -> list[nn.Parameter]:
        return [tensor for bucket in self.buckets for tensor in bucket.tensors.values()]

    @property
    def optimized_in_codes(self) -> list[nn.Parameter]:
        return [tensor for bucket in self.buckets if bucket.stretch.coded for tensor in bucket.tensors.values()]

    @property
    def moment_bytes(self) -> int:
        """Of this rank."""
        return sum(kind.nbytes(len(bucket.master)) for bucket in self.buckets for kind in bucket.kinds.values())

    def _whole(self, bucket: Bucket, kind: MomentKind) -> Tensor:
        """Space for a whole bucket, with any values."""
        return self._spaces[0][: kind.nbytes(bucket.length)].view(kind.dtype)

    def backward(self, loss: Tensor) -> None:
        """As `Weights.backward`. A bucket is added up over the ranks as soon as its gradients are there."""
        self._arrived.clear()
        super().backward(loss)

    def arrive(self, name: str) -> None:
        self._arrived.add(name)
        while self._left and all(span.name in self._arrived for span in self._left[-1].spans):
            self._reduce(self._left.pop())

    def collect(self) -> None:
        """Add the gradients of a backward pass, summed over the ranks, to those of this rank's part."""
        while self._left:
            self._reduce(self._left.pop())
        while self._running:
            self._finish()
        self._left = self._in_order()

    @torch.no_grad()
    def _reduce(self, bucket: Bucket) -> None:
        """Start to add up a bucket. All ranks take them in one order (`_in_order`)."""
        if not self._spaces:
            self._finish()
        space = self._spaces.popleft()
        whole = space[: bucket.length * bucket.wide.itemsize].view(bucket.wide).zero_()
        for span in bucket.spans:
            parameter = self.parameters[span.name]
            if parameter.grad is not None:
                whole[span.place].copy_(parameter.grad.reshape(-1)[span.start : span.stop])
                self._learns.add(span.name)
                if span.start == 0:  # the buckets of what comes behind have it already
                    parameter.grad = None
        part = torch.empty_like(bucket.grad)
        self._running.append(_Running(bucket, space, part, self.ranks.reduce_scatter(part, whole)))

    @torch.no_grad()
    def _finish(self) -> None:
        """Take what the oldest of the running sums gave."""
        first = self._running.popleft()
        first.wait()
        first.bucket.grad += first.part
        self._spaces.append(first.space)

    def clip(self, limit: float) -> Tensor:
        """As `Weights.clip`; also settles, for all ranks, which parameters have a gradient."""
        names = list(self.parameters)
        flags = self.ranks.union([name in self._learns for name in names])
        learns = {name for name, flag in zip(names, flags, strict=True) if flag}
        for name in learns:
            self.moved[name] += 1
        for bucket in self.buckets:
            for span in bucket.pieces:
                bucket.tensors[span.name].grad = bucket.grad[span.place] if span.name in learns else None
        tensors = [tensor for tensor in self.optimized if tensor.grad is not None]
        norm = nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        total = norm.to(self._device, torch.float64).square()
        self.ranks.sum(total)
        total = total.sqrt().to(self.buckets[0].wide)
        nn.utils.clip_grads_with_norm_(tensors, limit, total)
        return total

    def forget(self) -> None:
        self._learns.clear()
        for parameter in self.parameters.values():
            parameter.grad = None
        for bucket in self.buckets:
            bucket.grad.zero_()
            for tensor in bucket.tensors.values():
                tensor.grad = None

    @torch.no_grad()
    def round(self) -> None:
        for bucket in self.buckets:
            self._spread(bucket)

    def _spread(self, bucket: Bucket) -> None:
        """The parameters of a bucket on every rank, from the masters of all."""
        whole = self._whole(bucket, MomentKind(bucket.dtype))
        self.ranks.all_gather(whole, bucket.rounded())
        for span in bucket.spans:
            self.parameters[span.name].view(-1)[span.start : span.stop].copy_(whole[span.place])

    @torch.no_grad()
    def widen(self) -> None:
        """As `Weights.widen`, on the first rank; the others keep what they have."""
        for name, value in self._masters(self._device).items():
            parameter = self.parameters[name]
            if value.dtype != parameter.dtype:
                parameter.data = value

    @property
    def kinds(self) -> dict[str, Tensor]:
        wide = {span.name: bucket.wide for bucket in self.buckets for span in bucket.spans}
        return {name: torch.empty_like(value, dtype=wide[name], device="meta")
                for name, value in self.parameters.items()}

    @torch.no_grad()
    def saved(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As `Weights.saved`, on the host of the first rank; nothing on the others."""
        host = torch.device("cpu")
        model = self._masters(host)
        moments: dict[str, Tensor] = {}
        for name in KINDS:
            parts = [(bucket, bucket.kinds[name], self._moment(bucket, optimizer, name))
                     for bucket in self.buckets if name in bucket.kinds]
            whole = self._gathered(parts, host)
            moments |= {f"{owner}.{name}": value for owner, value in whole.items() if self.moved[owner]}
        if self.ranks.first:
            moments |= {f"{name}.step": torch.tensor(float(steps)) for name, steps in self.moved.items() if steps}
        return model, moments

    def _part(self, bucket: Bucket, kind: MomentKind) -> Tensor:
        """Zeros for this rank's part of what the optimizer keeps."""
        return torch.zeros(len(bucket.master) // kind.unit, dtype=kind.dtype, device=self._device)

    def _moment(self, bucket: Bucket, optimizer: torch.optim.Optimizer, name: str) -> Tensor:
        """This rank's part of a moment, or of its scales, 0 where there is none."""
        kind = bucket.kinds[name]
        part = self._part(bucket, kind)
        for span in bucket.pieces:
            state = optimizer.state.get(bucket.tensors[span.name], {})
            if name in state:
                part[span.by(kind.unit).place].copy_(state[name])
        return part

    def _masters(self, device: torch.device) -> dict[str, Tensor]:
        return self._gathered([(bucket, MomentKind(bucket.wide), bucket.master) for bucket in self.buckets], device)

    def _gathered(
        self, parts: Iterable[tuple[Bucket, MomentKind, Tensor]], device: torch.device
    ) -> dict[str, Tensor]:
        """Whole tensors by name from the parts of buckets, on the first rank; nothing on the others."""
        found: dict[str, Tensor] = {}
        for bucket, kind, part in parts:
            whole = self.ranks.gather(part)
            if whole is None:
                continue
            for span in (span.by(kind.unit) for span in bucket.spans):
                if span.name not in found:
                    shape = kind.shape(self.parameters[span.name])
                    found[span.name] = torch.empty(shape, dtype=kind.dtype, device=device)
                found[span.name].view(-1)[span.start : span.stop].copy_(whole[span.place])
        return found

    @torch.no_grad()
    def load(self, state: SavedState, optimizer: torch.optim.Optimizer) -> None:
        """As `Weights.load`; the state is the first rank's, and not read on the others."""
        counted = {name: state.optimizer.get(f"{name}.step") for name in self.parameters}
        self.moved = self.ranks.from_first(lambda: {name: int(step or 0) for name, step in counted.items()})
        for bucket in self.buckets:
            self._scatter(bucket.master, bucket, MomentKind(bucket.wide), state.model, "")
            moments = {name: self._part(bucket, kind) for name, kind in bucket.kinds.items()}
            for name, part in moments.items():
                self._scatter(part, bucket, bucket.kinds[name], state.optimizer, f".{name}")
            for span in bucket.pieces:
                if steps := self.moved[span.name]:
                    optimizer.state[bucket.tensors[span.name]] = {
                        STEP: torch.tensor(float(steps), device=self._device),
                        **{name: part[span.by(kind.unit).place].clone()
                           for (name, kind), part in zip(bucket.kinds.items(), moments.values(), strict=True)},
                    }
        self.round()

    def _scatter(
        self, part: Tensor, bucket: Bucket, kind: MomentKind, tensors: Mapping[str, Tensor], suffix: str
    ) -> None:
        """A bucket of the first rank's whole tensors, the part of each rank to it; 0 where there is none."""
        if not self.ranks.first:
            self.ranks.scatter(part, None)
            return
        whole = self._whole(bucket, kind).zero_()
        for span in (span.by(kind.unit) for span in bucket.spans):
            value = tensors.get(f"{span.name}{suffix}")
            if value is not None:
                whole[span.place].copy_(value.reshape(-1)[span.start : span.stop])
        self.ranks.scatter(part, whole)

    @property
    def _training_bytes(self) -> int:
        """Of masters, gradients and moments of this rank."""
        return 2 * sum(bucket.master.nbytes for bucket in self.buckets) + self.moment_bytes

    @property
    def bytes(self) -> int:
        """Of this rank."""
        kept = sum(tensor.nbytes for tensor in (*self.parameters.values(), *self._spaces))
        return kept + self._training_bytes
