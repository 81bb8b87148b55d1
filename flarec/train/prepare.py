"""Everything before the first step: inputs are checked, the model is captured and lowered; nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.heap import give_back_large_blocks
from ..checkpoint.carried import Carried
from ..checkpoint.directory import Checkpoint, context_of, open_checkpoint, refuse_converted
from ..checkpoint.write import check_shard_size
from ..device import resolve_compile, resolve_kernels, torch_device
from ..errors import DataError, UsageError
from ..frontend.export import capture
from ..ir.pipeline import Pass, pipeline_text
from ..ir.program import Program
from ..passes import AFTER, PASSES, AdaptNoisyStream, OutlineRegions, lower, passes_by_name, pipeline, placed
from ..passes.lower_mixers import IMPLEMENTATIONS
from ..passes.plugins import load_plugins
from ..passes.split_head import SplitHead, head_refusal
from ..recipe import Reading, Recipe
from ..threads import said, settle
from .adapter import adapter_of, start_adapter
from .advice import about_repeats, before_training
from .data.document import Document
from .data.packing import RowStream
from .data.sources import TokenSource, hold_out, load_sources, parse_source
from .feed import micro_rows_of
from .heldout import HeldOut
from .loop import Trainer
from .mask_token import MaskToken, choose_mask_token, initialise_mask_token
from .memory import MemoryChoice, as_given, choose
from .options import Options
from .precision import DTYPES, Precision, exact_weights, keep_float32, resolve_precision
from .progress import Reporter
from .quantized_base import STORED, check_base, open_quantized
from .ranks.group import Ranks
from .state import MICRO_ROWS


@dataclass(frozen=True)
class Run:
    """A conversion that is ready to train. `held_out` is None if nothing is evaluated, `carried` if the source is no
    multimodal checkpoint. ends: ids that end a text, that of the data first. memory: how its steps are computed; the
    trainer has it in its recipe."""

    options: Options
    recipe: Recipe
    source: Checkpoint
    tokenizer: Any
    model: Any
    carried: Carried | None
    captured: Program
    mask: MaskToken
    sources: Sequence[TokenSource]
    ends: tuple[int, ...]
    held_documents: int
    trainer: Trainer
    held_out: HeldOut | None
    pipelines: dict[str, str]
    plugins: dict[str, str]
    precision: Precision
    memory: MemoryChoice


def epochs_of(rows: RowStream, recipe: Recipe) -> list[float]:
    """How often a run passes over each source, about: by its weight, and as if every step were the next one. The stream
    stays where it is."""
    position, sources = rows.state_dict(), rows.mixture.sources
    drawn = sum(row.length for row in rows.rows(recipe.optimizer.batch_rows)) * recipe.optimizer.steps
    rows.load_state_dict(position)
    weights = sum(source.weight for source in sources)
    tokens = [int((source.starts[1:] - source.starts[:-1])[source.members].sum()) for source in sources]
    return [drawn * source.weight / weights / own for source, own in zip(sources, tokens, strict=True)]


def prepare(
    options: Options,
    reporter: Reporter,
    ranks: Ranks | None = None,
    trainer_class: type[Trainer] = Trainer,
    trains: bool = True,
) -> Run:
    """Check and load everything; on several ranks each of them calls, for its device. trains: whether steps are taken.

    Raises `UsageError` and its kin for bad input, `CaptureError` for an unknown model.
    """
    ranks = ranks or Ranks(options.device)
    recipe = _recipe(options, ranks, reporter)
    check_base(recipe)
    load_plugins(options.plugins)
    device = torch_device(ranks.device)
    check_shard_size(options.max_shard_size)
    options.check_shards(recipe)
    options = _with_kernels(options, device, reporter)
    precision = resolve_precision(recipe.optimizer.precision, device)
    reporter.note(f"precision: {precision}")
    source = _open_source(options.location, dequantize=options.dequantize and options.plain is None)
    if ranks.first:  # what another machine has under that name does not matter
        options.check_output(source.path)
    tokenizer = source.load_tokenizer()
    empty = source.load_model(device="meta")  # the configuration and the family, without weights
    source.check_weights()
    config, carried = empty.config, _carried(source, empty, recipe, reporter)
    context = _context(config, tokenizer, recipe)
    mask = _mask_token(source, recipe, tokenizer, reporter)

    reporter.note("reading data")
    eos_ids = source.eos_ids(config, tokenizer)
    sources, held = _read_data(options, recipe, tokenizer, eos_ids)
    ends = _ends(sources, tokenizer, eos_ids, reporter)
    check_ids([*sources], held, config, mask)

    reporter.note(f"loading {options.source} on {device}")
    model, captured, exact = _captured(source, recipe, precision, device, reporter)
    if source.manifest is None or mask.kind != "row":
        initialise_mask_token(mask, model, captured, tokenizer, exact)
    start_adapter(captured, recipe, options.seed, reporter.note)
    steps = _pipelines(captured, mask, options, recipe, reporter)
    regions = _regions(recipe, device, reporter)  # how it is run: not in the checkpoint's pipeline
    train = lower(captured, "train", steps=[*steps["train"], *regions], debug=options.debug)
    decode = lower(captured, "decode", steps=steps["decode"], debug=options.debug)
    data = recipe.data
    rows = RowStream(sources, max_length=data.max_length, seed=options.seed, lookahead=data.lookahead)
    memory = _memory(train, recipe, mask, options, ranks, trains, reporter)
    trainer = trainer_class(train, memory.apply(recipe), mask, rows, options.seed, exact, ranks)
    causal = partial(_causal, captured, decode, steps["decode"])
    held_out = HeldOut(held, train, decode, recipe, mask, ends, context, causal) if held else None
    for made, epochs in zip(sources, epochs_of(rows, recipe), strict=True):
        for line in about_repeats(Path(made.stats.source).name, len(made), epochs):
            reporter.warn(line)
    return Run(
        options, recipe, source, tokenizer, model, carried, captured, mask, sources, ends, len(held), trainer, held_out,
        {target: pipeline_text(chosen) for target, chosen in steps.items()}, _origins(options, recipe),
        precision, memory,
    )


def _captured(
    source: Checkpoint, recipe: Recipe, precision: Precision, device: torch.device, reporter: Reporter
) -> tuple[Any, Program, dict[str, Tensor]]:
    """The model, what is captured of it, and float32 values of weights that bfloat16 rounds. One whose matrices become
    codes never lies on the device as a whole."""
    dtype, stored = DTYPES[precision], recipe.adapter.base == STORED
    start = device if stored else torch.device("cpu")
    model = source.load_model(dtype, start)
    codes = {} if stored else open_quantized(model, source.load_model(dtype, "meta"), recipe, device, reporter.note)
    reporter.note("capturing and lowering the model (a graph that was captured before is found again)")
    settle(sum(parameter.numel() for parameter in model.parameters()))
    reporter.note(said())
    captured = capture(model, cache=True)
    captured.quantized |= codes
    exact = exact_weights(source, model, start) if precision == "bf16" else {}
    keep_float32(captured, exact)
    return model, captured, exact


def _regions(recipe: Recipe, device: torch.device, reporter: Reporter) -> list[Pass]:
    """What marks the regions that are compiled, if they are; said."""
    compiles = resolve_compile(recipe.train.compile, device)
    reporter.note(f"compile: {'on, the first steps take longer' if compiles else 'off'}")
    return [OutlineRegions()] if compiles else []


def _causal(captured: Program, decode: Program, steps: Sequence[Pass]) -> Program:
    """What decodes causally in the checkpoint (`flarec.checkpoint.lowered.lowered_source`)."""
    rest = [step for step in steps if not isinstance(step, AdaptNoisyStream)]
    if len(rest) == len(steps) or any(step.name not in PASSES for step in rest):
        return decode
    return lower(captured, "decode", steps=rest)


def _memory(
    train: Program, recipe: Recipe, mask: MaskToken, options: Options, ranks: Ranks, trains: bool, reporter: Reporter
) -> MemoryChoice:
    """How steps are computed, said in a line; the first rank decides, by the memory that it has. A run that is
    continued has the micro rows that it began with."""
    directory, began = options.state_directory, None
    if ranks.first and options.resume and directory.in_use:
        began = int(directory.identity.get(MICRO_ROWS, micro_rows_of(recipe, ranks.size)))

    def chosen() -> MemoryChoice:
        if not trains:
            return as_given(recipe, ranks.size, began)
        return choose(train, recipe, mask, ranks.size, rows=began)

    choice = ranks.from_first(chosen)
    if choice.recompute and train.device.type == "cpu":
        give_back_large_blocks()
    if trains:
        (reporter.note if choice.enough else reporter.warn)(choice.text)
    return choice


def _recipe(options: Options, ranks: Ranks, reporter: Reporter) -> Recipe:
    """The recipe, and what there is to say about it."""
    reading = Reading()
    recipe = options.load_recipe(reading)
    for line in reading.lines:
        reporter.note(line)
    micro, wanted = micro_rows_of(recipe, ranks.size), recipe.optimizer.micro_rows
    if micro < wanted:
        whose = "a step" if ranks.size == 1 else f"each of {ranks.size} ranks in a step"
        reporter.note(f"optimizer.micro_rows = {wanted} is more than the rows of {whose}: {micro} at a time")
    for line in before_training(recipe, options.own_recipe()):
        reporter.warn(line)
    return recipe


def _carried(source: Checkpoint, empty: Any, recipe: Recipe, reporter: Reporter) -> Carried | None:
    """What of a multimodal source is carried over; what is, or is left out, is said."""
    carried = source.carried(empty)
    if carried is not None:
        reporter.note(carried.describe(adapter=bool(recipe.adapter.rank)))
    elif left := () if recipe.adapter.rank else source.left_out(empty):
        what = f"{left[0]} of the source, which" if len(left) == 1 else f"{len(left)} tensors ({left[0]}, ...), which"
        reporter.note(f"left out: {what} transformers does not load")
    return carried


def _context(config: Any, tokenizer: Any, recipe: Recipe) -> int:
    """Positions that the model has. Raises `UsageError` if rows have more."""
    context = context_of(config, tokenizer)
    if recipe.data.max_length > context:
        raise UsageError(
            f"data.max_length = {recipe.data.max_length} is longer than the model's context of {context} positions; "
            f"use --max-length {context} or less"
        )
    return context


def _pipelines(
    captured: Program, mask: MaskToken, options: Options, recipe: Recipe, reporter: Reporter
) -> dict[str, list[Pass]]:
    """The passes of training and decoding, those of plugins at their places."""
    vector = mask.kind == "vector"
    steps = {
        target: pipeline(
            target, mask_vector=vector, kernels=options.kernels, adapter=adapter_of(recipe), foreign=recipe.passes,
            plugins=options.plugins,
        )
        for target in ("train", "decode")
    }
    refusal = head_refusal(captured)
    if refusal is not None:
        reporter.note(f"the losses are computed from the logits of all rows, in more memory: {refusal}")
        steps["train"] = [step for step in steps["train"] if not isinstance(step, SplitHead)]
    for target, chosen in steps.items():
        for line in placed(chosen):
            reporter.note(f"{target}: {line}")
    return steps


def _origins(options: Options, recipe: Recipe) -> dict[str, str]:
    """Where the passes of others come from, by name."""
    if not recipe.passes:
        return {}
    names = {text.split("(")[0].split(AFTER)[0].strip() for text in recipe.passes}
    return {name: row.origin for name, row in passes_by_name(options.plugins).items() if name in names - {*PASSES}}


def _with_kernels(options: Options, device: torch.device, reporter: Reporter) -> Options:
    """With `auto` replaced by what it stands for on this device, and said so."""
    kernels = resolve_kernels(options.kernels, device)
    if kernels not in IMPLEMENTATIONS:
        raise UsageError(f"unknown kernels '{kernels}'; choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    reporter.note(f"kernels: {kernels}")
    return replace(options, kernels=kernels)


def _open_source(location: str, *, dequantize: bool = False) -> Checkpoint:
    source = open_checkpoint(location, dequantize=dequantize)
    refuse_converted(location, None if source.foreign else source.manifest)
    return source


def _mask_token(source: Checkpoint, recipe: Recipe, tokenizer: Any, reporter: Reporter) -> MaskToken:
    """The recipe's choice; a dual-mode checkpoint of another program goes on with the trained row that it has."""
    if source.manifest is None or recipe.mask_choice in ("vector", "random"):
        return choose_mask_token(recipe.mask_choice, source.load_config(), tokenizer)
    mask, size = source.manifest.mask, source.manifest.decode.block_size
    reporter.note(
        f"the source is a dual-mode checkpoint already (mask token {mask.token_id}, blocks of {size}): training goes "
        f"on with its mask token and blocks of {recipe.diffusion.block_size}"
    )
    return mask


def _read_data(
    options: Options, recipe: Recipe, tokenizer: Any, eos_ids: Collection[int]
) -> tuple[list[TokenSource], list[Document]]:
    """Training sources, and held-out documents: of `eval_data`, else taken out of the training data."""

    def load(texts: Sequence[str]) -> list[TokenSource]:
        return load_sources(
            [parse_source(text) for text in texts],
            tokenizer,
            max_length=recipe.data.max_length,
            skip_bad_lines=options.skip_bad_lines,
            end_ids=eos_ids,
        )

    sources, wanted = load(options.data), recipe.evaluation.prompts if recipe.evaluation.every else 0
    if not options.eval_data:
        return hold_out(sources, wanted, options.seed)
    documents = [other.document(index) for other in load(options.eval_data) for index in range(min(wanted, len(other)))]
    return sources, documents[:wanted]


def _ends(
    sources: Sequence[TokenSource], tokenizer: Any, eos_ids: Collection[int], reporter: Reporter
) -> tuple[int, ...]:
    """All ids that end a text: that with which most turns of the data end first, then those that the model states."""
    counts = sum((source.stats.ends for source in sources), Counter[int]())
    closing = [token for token, _ in counts.most_common() if token in eos_ids or token in tokenizer.all_special_ids]
    if new := [tokenizer.convert_ids_to_tokens(token) for token in closing if token not in eos_ids]:
        what = ", ".join(new)
        reporter.note(f"turns of the data end with {what}, which the source names nowhere as an end: it is one")
    rest = sorted({*eos_ids, *closing} - {*closing[:1]})
    return (*closing[:1], *rest)


def check_ids(sources: Sequence[TokenSource], held: Sequence[Document], config: Any, mask: MaskToken) -> None:
    """Raise `DataError` for a token that is the mask token or outside of the embedding table."""
    limit = int(config.get_text_config().vocab_size)
    columns = [source.tokens for source in sources] + [document.ids for document in held]
    for ids in columns:
        bad = ids[(ids >= limit) | (ids == mask.token_id)]
        if len(bad):
            raise DataError(
                f"the tokenised data contains id {int(bad[0])}, which the model keeps for no token; "
                "give the tokenizer that belongs to the model"
            )
