"""The ranks of one run: what they tell each other, and how all of them stop when one does.

`joined` sets up torch.distributed from the environment of a launcher: gloo for what is on the host, NCCL for what is on
a GPU. Collectives are called by every rank, in the same order; one that fails raises `TrainingError` with the rank that
is to blame, if it is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ...errors import FlarecError, FlarecWarning, ToldElsewhere, TrainingError, UsageError, first_line
from .launch import Launch
from .watch import RankWatch

T = TypeVar("T")

JOIN_LIMIT, CALL_LIMIT = timedelta(minutes=10), timedelta(minutes=60)
"""How long ranks wait for each other: at the start (schedulers start nodes one after the other), and in a collective
(while the first rank evaluates, or writes a save). The end of a rank is noticed much earlier, by `RankWatch`."""
REASON_SECONDS = 3.0
"""How long a rank whose collective failed looks for the reason."""


class Ranks:
    """A process that trains alone: rank 0 of 1, for whom every collective is what it is for one."""

    def __init__(self, device: str, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, evaluates and tells."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` things, a multiple of the ranks, are this one's."""
        assert count % self.size == 0, f"{count} over {self.size} ranks"
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def wait(self) -> None:
        """Until every rank is here."""
        self.union([False])

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return self.union([flag])[0]

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is set on any rank."""
        return list(flags)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank made, on every rank (pickled); the others make nothing."""
        return make()

    def instruct(self, number: int) -> int:
        """The number that the first rank gives."""
        return number

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise `UsageError` naming the first key whose JSON value is another one on another rank."""

    def sum(self, tensor: Tensor) -> None:
        """Over the ranks, in place, on the tensor's device."""

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        """part [n] becomes this rank's of the sum of whole [size * n], once what is returned was called."""
        part.copy_(whole)
        return lambda: None

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        """whole [size * n] becomes the parts [n] of all ranks, one behind the other."""
        whole.copy_(part)

    def gather(self, part: Tensor) -> Tensor | None:
        """The parts [n] of all ranks as [size * n] on the first one, None on the others."""
        return part

    def scatter(self, part: Tensor, whole: Tensor | None) -> None:
        """part [n] becomes this rank's of whole [size * n], which the first rank has."""
        assert whole is not None
        part.copy_(whole)


class _Joined(Ranks):
    """One of several ranks."""

    def __init__(self, launch: Launch) -> None:
        super().__init__("cpu", launch.rank, launch.size)
        place = f"{launch.host}:{launch.port}"
        try:
            self.store, *_ = next(rendezvous("env://", launch.rank, launch.size, timeout=JOIN_LIMIT))
            mine = PrefixStore("flarec-watch", self.store.clone())
            self.watch = RankWatch(mine, launch.rank, launch.size)
            self._await_all()
        except RuntimeError as error:
            raise UsageError(
                f"rank {launch.rank} cannot meet the others at {place} ({first_line(error)}); check MASTER_ADDR and "
                "MASTER_PORT, and that no other run uses the port"
            ) from error
        self.watch.start()

    def _await_all(self) -> None:
        keys = [f"flarec-watch/member/{rank}" for rank in range(self.size)]
        try:
            self.store.wait(keys, JOIN_LIMIT)
        except RuntimeError:
            missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
            if not missing:
                raise
            raise UsageError(
                f"of {self.size} ranks {', '.join(missing)} did not come within {JOIN_LIMIT.seconds // 60} minutes"
            ) from None

    def connect(self, device: str) -> None:
        """Set up the process group for a device."""
        self.device = device
        on_gpu = device.startswith("cuda")
        if on_gpu and not dist.is_nccl_available():
            raise UsageError("this torch has no NCCL, which ranks on GPUs need; use --device cpu")
        if on_gpu:
            torch.cuda.set_device(torch.device(device))
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=PrefixStore("flarec-group", self.store),
                rank=self.rank, world_size=self.size, timeout=CALL_LIMIT,
            )
        except RuntimeError as error:
            raise UsageError(
                f"rank {self.rank} cannot set up torch.distributed ({first_line(error)}); if the machine has several "
                "networks, name one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            ) from error

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        if self.watch.failure is not None:
            raise TrainingError(str(self.watch.failure))
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.watch.wait_for(lambda: self.watch.look() is not None, REASON_SECONDS)
            if self.watch.failure is not None:
                raise TrainingError(str(self.watch.failure)) from error
            raise TrainingError(
                f"the ranks lost each other ({first_line(error)}); start all of them again, with --resume if there "
                "is a save"
            ) from error

    def union(self, flags: Sequence[bool]) -> list[bool]:
        values = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        with self._together():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values.tolist()]

    def from_first(self, make: Callable[[], T]) -> T:
        given: list[Any] = [make() if self.first else None]
        with self._together():
            dist.broadcast_object_list(given, src=0, device=torch.device("cpu"))
        made: T = given[0]
        return made

    def instruct(self, number: int) -> int:
        given = torch.tensor([number])
        with self._together():
            dist.broadcast(given, src=0)
        return int(given)

    def check_same(self, values: Mapping[str, Any]) -> None:
        digests = {key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
                   for key, value in values.items()}
        known = self.from_first(lambda: digests)
        other = [key for key in {**known, **digests} if known.get(key) != digests.get(key)]
        if other:
            raise UsageError(
                f"{other[0]} on rank {self.rank} is not that of rank 0; start all ranks with the same arguments, "
                "model and data"
            )
        self.wait()

    def sum(self, tensor: Tensor) -> None:
        with self._together():
            dist.all_reduce(tensor)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Callable[[], None]:
        with self._together():
            work = _reduce_scatter(part, whole, async_op=True)

        def wait() -> None:
            with self._together():
                work.wait()

        return wait

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        with self._together():
            _all_gather(whole, part)

    def gather(self, part: Tensor) -> Tensor | None:
        whole = part.new_empty(self.size, len(part)) if self.first else None
        with self._together():
            dist.gather(part, None if whole is None else list(whole.unbind()), dst=0)
        return None if whole is None else whole.flatten()

    def scatter(self, part: Tensor, whole: Tensor | None) -> None:
        parts = None if whole is None else list(whole.view(self.size, len(part)).unbind())
        with self._together():
            dist.scatter(part, parts, src=0)

    def leave(self) -> None:
        """The orderly end of all ranks."""
        self.wait()
        self.watch.leave()
        dist.destroy_process_group()

    def fail(self, error: BaseException) -> NoReturn:
        """The end of a rank that cannot go on, or that heard of one. Only one of the ranks tells why."""
        self.watch.report(_reason(error))
        self.watch.stop()
        if dist.is_initialized() and not self.device.startswith("cuda"):  # of NCCL it would wait for the others
            dist.destroy_process_group()  # whoever waits for this rank in a collective is free
        telling = self.watch.tells()
        if telling or not isinstance(error, (FlarecError, KeyboardInterrupt)):
            raise error
        raise ToldElsewhere(str(error), int(getattr(error, "exit_code", 1))) from error


# torch 2.13 renamed them
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _reason(error: BaseException) -> str:
    if isinstance(error, FlarecError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "it was interrupted"
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of the launcher that started this process, one alone without any; `device` is the user's choice.

    Raises `UsageError` for an environment that names no such rank, and if they cannot meet. Within the context every
    error of one rank ends all of them; the first rank raises it, the others `ToldElsewhere`.
    """
    launch = Launch.of_environment()
    if launch is None or launch.size == 1:
        yield Ranks(device if launch is None else launch.device(device))
        return
    if dist.is_initialized():
        raise UsageError("torch.distributed is set up in this process already; flarec sets it up itself")
    ranks = _Joined(launch)
    with warnings.catch_warnings():
        if not ranks.first:
            warnings.simplefilter("ignore", FlarecWarning)
        try:
            ranks.connect(launch.device(device))
            yield ranks
            ranks.leave()
        except BaseException as error:
            ranks.fail(error)
