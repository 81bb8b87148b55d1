"""From a checkpoint and texts to the checkpoint with a horizon head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...base.files import check_apart
from ...checkpoint.directory import Checkpoint, context_of, open_checkpoint
from ...checkpoint.horizon import manifest_with
from ...checkpoint.lowered import lowered, pipeline_of
from ...checkpoint.own import check_destination
from ...checkpoint.write import write_horizon_checkpoint
from ...device import resolve_kernels, torch_device, torch_dtype
from ...errors import DataError, UsageError
from ...frontend.export import capture
from ...ir.program import Program
from ...passes import PredictHorizon
from ...threads import settle
from ..data.document import PackedRow
from ..data.packing import RowStream
from ..data.sources import TokenSource, hold_out, load_sources, parse_source
from ..prepare import check_ids
from ..progress import Reporter
from .arguments import HeadArguments
from .head import named, new_head, scores, train
from .measure import Places, measure

FEWEST = 16
"""Places to learn from, and to measure on: fewer say nothing."""
LOOKAHEAD = 64
MARGIN = 0.1
"""Nats by which a head may be behind one that looks at nothing: where all places are alike, looking gains nothing."""


def train_head(arguments: HeadArguments, reporter: Reporter) -> Path:
    """Measure drafts, train the head on frozen weights, and write the checkpoint with it; returns its directory.

    Raises `UsageError` and its kin for bad input, before anything is written.
    """
    given = arguments
    checkpoint = open_checkpoint(given.checkpoint, adapter=given.adapter)
    size = _check(checkpoint, given)
    device = torch_device(given.device)
    dtype = torch_dtype(given.dtype) or (torch.float32 if device.type == "cpu" else None)
    kernels = resolve_kernels(given.kernels, device)
    sources, held = _texts(checkpoint, given, reporter)
    reporter.note(f"loading {given.checkpoint} on {device}, kernels {kernels}")
    model = checkpoint.load_model(dtype, device)
    settle(sum(parameter.numel() for parameter in model.parameters()))
    captured = capture(model, cache=True)
    captured.extra.update(checkpoint.load_extra(captured.dtype, device))
    program = lowered(checkpoint, captured, "train", kernels=kernels)
    stream = RowStream(sources, max_length=_length(checkpoint, given), seed=given.seed, lookahead=LOOKAHEAD)
    learned, unseen = (
        _places(program, rows, checkpoint, reporter) for rows in (stream.rows(given.rows), held)
    )
    head = new_head(learned.hidden.shape[1], given.width, size, given.seed)
    reporter.note(f"training the head for {given.steps} steps")
    train(
        head, learned, sigma=given.sigma, steps=given.steps, batch=given.batch, lr=given.lr, seed=given.seed,
        device=device,
    )
    found = scores(head, unseen, given.sigma)
    reporter.note(
        f"held out: KL {found['kl']:.3f} (looking at nothing {found['constant_kl']:.3f}), {found['drafts']:.2f} drafts "
        f"of {found['safe_drafts']:.2f} safe ones, too many at {found['too_many']:.1%} of the places"
    )
    if found["kl"] > found["constant_kl"] + MARGIN:
        reporter.warn(
            "on held-out documents the head says less than one that looks at nothing, and mode elastic trusts it: "
            "measure more rows, take more steps, or give texts of the model's own (flarec answers)"
        )
    data = {
        "sources": {f"{number}: {Path(s.stats.source).name}": s.stats.documents for number, s in enumerate(sources, 1)},
        "rows": given.rows, "places": len(learned.safe), "held_out_documents": len(held), "steps": given.steps,
        "sigma": given.sigma, "seed": given.seed,
    }
    assert checkpoint.manifest is not None
    steps = pipeline_of(checkpoint.manifest, "decode", kernels=kernels)
    manifest = manifest_with(checkpoint.manifest, steps, PredictHorizon(size, given.width), data, found)
    made = write_horizon_checkpoint(
        given.out, checkpoint.home, checkpoint.path, manifest, named(head), link=given.link,
        carried=checkpoint.carried(model), overwrite=given.overwrite, note=reporter.note,
    )
    reporter.note(f"checkpoint: {made}")
    return made


def _places(program: Program, rows: Sequence[PackedRow], checkpoint: Checkpoint, reporter: Reporter) -> Places:
    """What is measured in some rows. Raises `UsageError` for a model without hidden rows, `DataError` for texts that
    say nothing."""
    if program.head is None:
        raise UsageError(
            f"the head of {checkpoint.path} cannot be split off (flarec inspect shows why), and a horizon head reads "
            "what goes into it; this model decodes in the other modes"
        )
    manifest = checkpoint.manifest
    assert manifest is not None
    reporter.note(f"measuring drafts in {len(rows)} rows")
    size = manifest.decode.block_size
    found = measure(program, rows, size, manifest.mask, lambda done, total: reporter.working("rows", done, total))
    share = len(found.safe) / max(1, found.places)
    reporter.note(f"{len(found.safe):,} of {found.places:,} places ({share:.0%}) say what the model would say")
    if len(found.safe) < FEWEST:
        raise DataError(
            f"only {len(found.safe)} places of {len(rows)} rows go on as the model itself would; give its own answers "
            "(flarec answers), or more of them"
        )
    return found


def _check(checkpoint: Checkpoint, given: HeadArguments) -> int:
    """Positions of a block. Raises `UsageError` for a checkpoint that takes no head, and for an output in the way."""
    manifest = checkpoint.manifest
    if manifest is None or checkpoint.foreign or not manifest.files:
        raise UsageError(f"{given.checkpoint} is not a checkpoint of flarec; convert it first (flarec convert)")
    readout = manifest.decode.readouts.get("ar-trust")
    if readout != "causal":
        raise UsageError(
            f"the drafts of {given.checkpoint} read their whole block ({readout}), so that no part of them stands "
            "alone; a horizon head needs causal ones: convert with the recipe fluid, adapter or draft"
        )
    check_apart([given.out], [checkpoint.path, checkpoint.home, *(parse_source(text).path for text in given.data)])
    check_destination(given.out, given.overwrite)
    return manifest.decode.block_size


def _length(checkpoint: Checkpoint, given: HeadArguments) -> int:
    recipe = checkpoint.manifest.recipe if checkpoint.manifest is not None else {}
    stated = recipe.get("data", {}).get("max_length", 2048) if isinstance(recipe.get("data", {}), dict) else 2048
    return given.max_length or int(stated)


def _texts(
    checkpoint: Checkpoint, given: HeadArguments, reporter: Reporter
) -> tuple[list[TokenSource], list[PackedRow]]:
    """Texts to learn from, and rows of a document each to measure on. Raises `DataError`, `UsageError`."""
    length, config, tokenizer = _length(checkpoint, given), checkpoint.load_config(), checkpoint.load_tokenizer()
    context = context_of(config, tokenizer)
    if length > context:
        raise UsageError(
            f"rows of {length} tokens are longer than the model's context of {context} positions; use a smaller "
            "--max-length"
        )
    sources = load_sources(
        [parse_source(text) for text in given.data], tokenizer, max_length=length, skip_bad_lines=given.skip_bad_lines,
        end_ids=checkpoint.eos_ids(config, tokenizer),
    )
    sources, held = hold_out(sources, given.held_out, given.seed)
    for source in sources:
        reporter.note(str(source.stats))
    if not held:
        raise DataError(
            f"there are too few documents to hold {given.held_out} of them out; give more, or a smaller --held-out"
        )
    assert checkpoint.manifest is not None
    check_ids(sources, held, config, checkpoint.manifest.mask)
    return sources, [PackedRow((document,)) for document in held]
