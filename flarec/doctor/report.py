"""What `flarec doctor` found, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of.

    wrapper   the multimodal model whose text model this is, "" if there is none
    layers    (classes or mixers of a layer, number of such layers)
    """

    model: str
    wrapper: str
    family: str
    known_family: bool
    parameters: int
    layers: tuple[tuple[str, int], ...]
    vocab_size: int


@dataclass(frozen=True)
class SiteKind:
    """One kind of mixer site under `--kernels triton`.

    choice   "triton"; "torch" where there is no Triton form; "refused" where Triton is an error (use --kernels torch)
    why      not Triton, "" if it is
    """

    target: str
    mixer: str
    operands: str
    count: int
    choice: str
    why: str


@dataclass(frozen=True)
class Memory:
    """Bytes. `total` is the most that lives at one moment; the parts add up to it."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Speed:
    """Time of one step, extrapolated: counted work over measured rates.

    flops, bytes, calls   counted arithmetic, memory traffic and operations of the step
    """

    step: str
    seconds: float
    flops: int
    bytes: int
    calls: int


@dataclass(frozen=True)
class Rates:
    """Measured on the device. flops: kind -> floating point operations per second; bytes: kind -> bytes per second,
    for traffic that fits the caches and traffic that does not; call: seconds that an operation takes if it does nothing
    """

    device: str
    dtype: str
    threads: int
    flops: Mapping[str, float]
    near: Mapping[str, float]
    far: Mapping[str, float]
    call: float


@dataclass(frozen=True)
class DataReport:
    """What one source of training data is in the model's tokens. Counts are those of `DataStats`, in rows of the
    report's length.

    text           these counts in a line
    lengths        tokens that a share of the documents has at most, uncut, by the share in words
    longest        (tokens, place) of the longest documents
    repeats        documents that stand there before, token for token; most_repeated: (times, first place) of one
    rows           of an epoch, at least; epochs: of the recipe's run, about
    """

    source: str
    text: str
    documents: int
    tokens: int
    targets: int
    turns: int
    truncated: int
    truncated_tokens: int
    lost_turns: int
    dropped: int
    bad_lines: int
    lengths: Mapping[str, int]
    longest: tuple[tuple[int, str], ...]
    repeats: int
    most_repeated: tuple[int, str] | None
    rows: int
    epochs: float
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything. `reason` is None if the model converts, else the sentence that says why not.

    convert, serve        memory; None where the model does not convert
    cache_bytes           of a served request, and of each position that it can hold
    kernels_note          why no Triton kernel runs on the device, "" otherwise
    estimate_note         why memory or time is missing although the model converts, "" otherwise
    memory                bytes that the device has, None where nothing says it
    memory_note           what train.memory means there, "" if everything is kept
    advice                what to do if that is too little; empty if it is enough
    data                  what the given training data are, a source each
    pays                  a sentence: from how many tokens per forward on AR-Trust is faster than causal decoding
    """

    source: str
    converts: bool
    reason: str | None
    anatomy: Anatomy | None
    capture_seconds: float | None
    length: int
    batch: int
    recipe: str
    block_size: int
    train_dtype: str
    serve_dtype: str
    convert: Memory | None = None
    serve: Memory | None = None
    cache_bytes: tuple[int, int] = (0, 0)
    rates: tuple[Rates, ...] = ()
    speed: tuple[Speed, ...] = ()
    sites: tuple[SiteKind, ...] = ()
    kernels_note: str = ""
    estimate_note: str = ""
    memory: int | None = None
    memory_note: str = ""
    advice: tuple[str, ...] = ()
    pays: str = ""
    data: tuple[DataReport, ...] = ()
