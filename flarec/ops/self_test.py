"""Whether the Triton kernels compute on a card what PyTorch does there: asked once where nobody tried them.

They were tested on cards of compute capability 9.0 (`TRIED`). On another one every kind of site of a model is run on
small random inputs before the first use, forward and backward or as a decode step, and compared with the torch form in
float64; so are the kernels that choose tokens and those of the losses. What passed is remembered in the user's cache,
by card, versions and source of the kernels. What does not is an error: no other kernel takes its place in silence.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.user_cache import is_own, user_cache
from ..errors import FlarecWarning, PassError, first_line
from ..layout import Block, Layout, build_layout
from .mixer import TORCH, TRITON, Mixer, Site

TRIED = frozenset({(9, 0)})
"""Compute capabilities on which the kernels' own tests passed."""
ROWS, CACHED, PENDING, CAPACITY = 2, (9, 5), 2, 128
PREFILL = 66
"""Clean rows of a step that is too wide for the step kernels."""
VOCABULARY = 2500
STEPS, LEAST = 8, 1e-4
"""Relative error that is allowed: so many rounding steps of the dtype, at least this much."""
_passed: set[str] = set()


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device; None for others, where kernels run in Triton's interpreter if they do."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def require(sites: Iterable[tuple[Mixer, Site, bool]], device: torch.device) -> None:
    """Raise `PassError` if kernels give other numbers than PyTorch on a card that was not tried.

    sites: (op, site, clean tokens take no gradient) that the Triton forms are to compute; without any only what chooses
    tokens is looked at.
    """
    found = capability(device)
    if found is None or found in TRIED:
        return
    tests: dict[str, Any] = {"sampling": functools.partial(_sampling, device)}
    for mixer, site, frozen in sites:
        tests["row_losses"] = functools.partial(_row_losses, device)
        tests[signature(mixer, site, frozen)] = functools.partial(_site, mixer, site, frozen, device)
    open_ones = {name: test for name, test in tests.items() if not _known(_key(name, found, device))}
    if open_ones:
        card = f"{_name(device)} (compute capability {found[0]}.{found[1]})"
        warnings.warn(
            f"the kernels were not tried on {card}: they are compared with PyTorch once, which takes a while",
            FlarecWarning, stacklevel=2,
        )
    for name, test in open_ones.items():
        try:
            reason = test()
        except Exception as error:  # Triton's own: what does not compile, or finds no room, is no kernel either
            reason = f"{type(error).__name__}: {first_line(error)}"
        if reason:
            cure = "take another device" if name == "sampling" else f"use --kernels {TORCH}"
            raise PassError(f"the Triton kernels cannot be used on {card}: {name.split('|')[0]} {reason}; {cure}")
        _remember(_key(name, found, device))


def signature(mixer: Mixer, site: Site, frozen: bool) -> str:
    """What of a site decides how its kernels are compiled: sizes that do not depend on the input, dtypes, options."""
    operands = [
        f"{name}={[size if type(size) is int else '*' for size in value.shape]}{value.dtype}"
        if _is_tensor(value) else f"{name}={value!r}"
        for name, value in site.operands.items() if name not in ("layout", "accepted", "clean_positions")
    ]
    use = "step" if site.step else "frozen" if frozen else "train"
    return "|".join([mixer.name, use, str(site.chunk_size), *operands])


def _site(mixer: Mixer, site: Site, frozen: bool, device: torch.device) -> str:
    """Why the Triton form of a site is not what the torch form is; empty if it is."""
    layouts = _step_layouts() if site.step else [_training_layout()]
    for layout in layouts:
        inputs = _inputs(mixer, site, layout, device)
        run = _step if site.step else functools.partial(_train, frozen=frozen)
        got = run(mixer, TRITON, site, inputs, layout.to(device))
        wide = {name: _widened(value) for name, value in inputs.items()}
        exact = run(mixer, TORCH, _site_of(site, wide), wide, layout.to(device))
        if reason := _difference(got, exact, _dtype_of(inputs)):
            return reason
    return ""


def _difference(got: Mapping[str, Tensor], exact: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    allowed = max(LEAST, STEPS * torch.finfo(dtype).eps)
    for name, right in exact.items():
        norm = float(right.double().norm().clamp_min(1e-3))
        error = float((got[name].double() - right.double()).norm()) / norm
        if not error <= allowed:
            return f"is off by {error:.1e} in {name} ({str(dtype).removeprefix('torch.')}, allowed {allowed:.1e})"
    return ""


def _training_layout() -> Layout:
    """Two rows, more clean tokens than a chunk holds, blocks of both readouts and two views."""
    documents = [[45, 40], [70]]
    blocks = [
        [Block(document, anchor, 3, view, readout) for document, anchor, view, readout in row]
        for row in (
            [(0, 20, 0, "causal"), (0, 23, 0, "causal"), (0, 20, 1, "causal"), (1, 37, 0, "block_end")],
            [(0, 1, 0, "block_end"), (0, 66, 0, "causal"), (0, 66, 1, "block_end"), (0, 67, 1, "causal")],
        )
    ]
    return build_layout(documents, blocks)


def _step_layouts() -> list[Layout]:
    """A draft-and-verify step, and a prefill behind what is cached."""
    blocks = [[Block(0, start + row + 1, 3, 0, "causal") for row in range(3)] for start in CACHED]
    return [
        build_layout([[3]] * ROWS, blocks, cached=CACHED),
        build_layout([[PREFILL]] * ROWS, [[]] * ROWS, cached=CACHED),
    ]


def _inputs(mixer: Mixer, site: Site, layout: Layout, device: torch.device) -> dict[str, Any]:
    """Random operands of a site for a layout, and of a step its slots."""
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return mixer.ordinary(name, torch.randn(*shape, generator=generator)).to(dtype).to(device)

    found: dict[str, Any] = {}
    for name in mixer.bind((), {}):
        value = site.operands[name]
        found[name] = tensor(name, _shape(mixer, name, value, layout), value.dtype) if _is_tensor(value) else value
    for slot in mixer.slots(site) if site.step else ():
        sizes = {"batch": ROWS, "capacity": CAPACITY, "pending": PENDING}
        shape = [sizes[size] if isinstance(size, str) else size for size in slot.shape]
        shape[-1] += PENDING if slot.kind == "conv" else 0
        found[slot.operand] = tensor(slot.operand, shape, slot.dtype)
    if any(not slot.in_place for slot in (mixer.slots(site) if site.step else ())):
        found["accepted"] = torch.tensor([2, 1], device=device)
    return found


def _shape(mixer: Mixer, name: str, spec: Any, layout: Layout) -> list[int]:
    """Sizes of an operand: rows and tokens are the layout's."""
    tokens = {"B": layout.rows, "L": layout.length}
    axes = next((a for a in mixer.axes.get(name, "").split("|") if len(a) == len(spec.shape)), "*" * len(spec.shape))
    return [tokens[axis] if axis in tokens else int(size) for axis, size in zip(axes, spec.shape, strict=True)]


def _call(
    mixer: Mixer, implementation: str, site: Site, given: Mapping[str, Any], layout: Layout, frozen: bool
) -> Any:
    """As `lower-mixers` has the graph call it."""
    form, given = mixer.forms[implementation], dict(given)
    derivation = form.derivation(site)
    if derivation is not None:
        schedule = derivation.build(layout, CAPACITY if site.step else None)
        given[derivation.operand] = schedule.to(layout.cached.device)
    if derivation is None or site.step:
        given["layout"] = layout
    if frozen:
        given["clean_positions"] = layout.clean_position
    return mixer.call(implementation, site.step, frozen)(**given)


def _train(
    mixer: Mixer, implementation: str, site: Site, inputs: Mapping[str, Any], layout: Layout, *, frozen: bool
) -> dict[str, Tensor]:
    """The output and every gradient; over a frozen clean stream those of noisy tokens."""
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if isinstance(value, Tensor)}
    out = _call(mixer, implementation, site, inputs, layout, frozen)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)
    counted = layout.token_document() >= 0  # what stands at padding is nobody's business
    output = _of_tokens(out.detach(), mixer.output, counted)
    if frozen:
        counted[:, : layout.clean_length] = False
    weights = _of_tokens(weights, mixer.output, counted)
    gradients = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    found = {"its output": output}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        axes = next((a for a in mixer.axes.get(name, "").split("|") if len(a) == leaf.dim()), "")
        if frozen and "L" not in axes:
            continue  # of weights: whose tokens count is the form's own matter
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        found[f"the gradient of {name}"] = _of_tokens(gradient, axes, counted) if "L" in axes else gradient
    return found


def _of_tokens(tensor: Tensor, axes: str, counted: Tensor) -> Tensor:
    """With zeros where a token is not `counted` [B, T]."""
    shape = [size if axis in "BL" else 1 for axis, size in zip(axes, tensor.shape, strict=True)]
    return torch.where(counted.view(shape), tensor, torch.zeros_like(tensor))


def _step(
    mixer: Mixer, implementation: str, site: Site, inputs: Mapping[str, Any], layout: Layout
) -> dict[str, Tensor]:
    """The output and the next value of every slot."""
    given = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    slots = list(mixer.slots(site))
    with torch.no_grad():
        results = _call(mixer, implementation, site, given, layout, frozen=False)
    out, *rest = results if isinstance(results, tuple) else (results,)
    later = dict(zip([slot.operand for slot in slots if not slot.in_place], rest, strict=True))
    later |= {slot.operand: given[slot.operand] for slot in slots if slot.in_place}
    return {"its output": out, **{f"its {name}": value for name, value in later.items()}}


def _sampling(device: torch.device) -> str:
    """Tokens are the same bits by every implementation."""
    from ..kernels.sampling import choose

    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(8, VOCABULARY, generator=generator)).to(device)
    rows = torch.arange(8, device=device)
    options = (
        torch.tensor([0.0, 0.3, 0.7, 1.0, 1.0, 1.5, 2.0, 1.0], device=device),
        torch.tensor([2**62, 2**62, 40, 3, 2**62, 1, 500, 2**62], device=device),
        torch.tensor([1.0, 1.0, 0.9, 1.0, 0.5, 1.0, 0.95, 0.1], device=device),
    )
    triton, plain = (choose(logits, *options, 7 * rows, rows + 3, implementation=name) for name in (TRITON, TORCH))
    same = all(torch.equal(a, b) for a, b in zip(triton, plain, strict=True))
    return "" if same else "chooses other tokens"


def _row_losses(device: torch.device) -> str:
    from ..kernels.row_losses import RowWeights, implementation

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(10, VOCABULARY, generator=generator)
    target = torch.randint(6, VOCABULARY, (10,), generator=generator).to(device)
    found: list[dict[str, Tensor]] = []
    for name, dtype in ((TRITON, torch.float32), (TORCH, torch.float64)):
        one = torch.ones(10, dtype=dtype, device=device)
        weights = RowWeights(one, 4, kl=one[:4], tv=0.5 * one[:4])
        result = implementation(name)(logits.to(device, dtype, copy=True), target, weights, suppress=5)
        assert result.gradient is not None
        found.append({"the loss": result.nll, "the divergence": result.kl, "the gradient": result.gradient})
    got, exact = found
    return _difference(got, exact, torch.float32)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _widened(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if wide else value


def _site_of(site: Site, inputs: Mapping[str, Any]) -> Site:
    return Site({**site.operands, **inputs}, site.step, site.chunk_size)


def _dtype_of(inputs: Mapping[str, Any]) -> torch.dtype:
    """The coarsest among the operands: what outputs are rounded to."""
    floats = [value.dtype for value in inputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _key(name: str, found: tuple[int, int], device: torch.device) -> str:
    versions = [f"{package} {_version(package)}" for package in ("torch", "triton")]
    return hashlib.sha256("\n".join([name, _name(device), str(found), *versions, _source()]).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "?"


@functools.cache
def _source() -> str:
    """A hash of the kernels."""
    from .. import kernels

    digest = hashlib.sha256()
    folder = Path(next(iter(kernels.__path__)))
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _record(key: str) -> Path | None:
    home = user_cache()
    return None if home is None else home / "kernels" / key


def _known(key: str) -> bool:
    if key in _passed:
        return True
    path = _record(key)
    try:
        return path is not None and is_own(os.lstat(path))
    except OSError:
        return False


def _remember(key: str) -> None:
    _passed.add(key)
    path = _record(key)
    if path is not None:
        with contextlib.suppress(OSError):  # it is asked again
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
