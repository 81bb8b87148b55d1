"""What a run leaves: the checkpoint with its manifest, and the summary for its user."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.lock import OutputLock
from ..checkpoint.directory import DEQUANTIZED, describe_source
from ..checkpoint.manifest import RUN_KEY, AdapterInfo, DecodeDefaults, Manifest
from ..checkpoint.weights import stored_dtypes
from ..checkpoint.write import write_adapter_checkpoint, write_checkpoint
from ..errors import CheckpointError, TrainingError
from ..ir.pipeline import parse_pass
from ..passes import PASSES, AdaptNoisyStream
from .identity import Horizons
from .options import Options
from .prepare import Run
from .progress import describe_evaluation
from .quantized_base import BASE, STORED, base_text
from .router import describe as describe_router
from .router import worst
from .state import METRICS


@dataclass(frozen=True)
class Trained:
    """What was trained, at the step at which the checkpoint is written.

    name         of the run, for the manifest
    precision    that the weights were trained in
    horizons     the numbers of steps that the run had
    totals       tokens trained on
    last         the last step's line of the log
    evaluations  held-out evaluations by step
    """

    run: Run
    name: str
    precision: str
    step: int
    horizons: Horizons
    totals: Mapping[str, int]
    last: Mapping[str, Any]
    evaluations: Mapping[int, dict[str, Any]]

    def write(self, metrics: Path, lock: OutputLock, note: Callable[[str], None]) -> Path:
        """The finished checkpoint, in one rename. Raises `TrainingError`; the training state stays."""
        run = self.run
        run.trainer.widen()
        manifest = self.manifest()
        extra = {name: torch.nn.Parameter(value.detach().cpu()) for name, value in run.captured.extra.items()}
        try:
            if manifest.adapter is not None:
                return write_adapter_checkpoint(
                    run.options.output,
                    run.source.path,
                    manifest,
                    extra,
                    link=run.options.link,
                    carried=run.carried,
                    attachments={METRICS: metrics},
                    overwrite=run.options.overwrite,
                    lock=lock,
                    note=note,
                )
            return write_checkpoint(
                run.options.output,
                run.model,
                run.tokenizer,
                manifest,
                extra,
                dtype=stored_dtypes(run.source.path, run.model),
                max_shard_size=run.options.max_shard_size,
                carried=run.carried,
                ends=run.ends,
                attachments={METRICS: metrics},
                overwrite=run.options.overwrite,
                lock=lock,
            )
        except CheckpointError as error:  # a failure here is no wrong usage: the destination was checked before
            complete = self.step == run.recipe.optimizer.steps
            what = "training is complete and kept" if complete else "the training state is kept"
            command = "--resume" if complete else "flarec finish"
            raise TrainingError(f"{error}; {what}, write it with {command}") from error

    def manifest(self) -> Manifest:
        run, recipe = self.run, self.run.recipe
        sources = {
            f"{number}: {Path(source.stats.source).name}": {
                "weight": source.weight,
                "documents": source.stats.documents,
                "tokens": source.stats.tokens,
                "targets": source.stats.targets,
            }
            for number, source in enumerate(run.sources, 1)
        }
        steps: dict[str, Any] = {"steps": self.step}
        if self.step != recipe.optimizer.steps:
            steps["planned_steps"] = recipe.optimizer.steps
        if len(self.horizons) > 1:
            steps["schedule_steps"] = {f"from step {first + 1}": count for first, count in self.horizons}
        steps |= {"seed": run.options.seed, "held_out_documents": run.held_documents, "precision": self.precision,
                  RUN_KEY: self.name}
        return Manifest(
            source=describe_source(run.options.location),
            mask=run.mask,
            decode=DecodeDefaults(
                block_size=recipe.diffusion.block_size,
                readouts=dict(recipe.readouts()),
                confidence_threshold=recipe.decode.confidence_threshold,
                denoising_steps=recipe.decode.denoising_steps,
                recheck=recipe.decode.recheck,
                drafts=recipe.decode.drafts,
            ),
            recipe=recipe.to_dict(),
            pipelines=run.pipelines,
            plugins=run.plugins,
            adapter=adapter_info(run.options, run.pipelines),
            data={
                "sources": sources, **steps, **self.totals, **({DEQUANTIZED: True} if run.source.dequantize else {}),
                **({BASE: base_text(recipe)} if recipe.adapter.base != STORED else {}),
            },
            metrics={
                "ar_loss": self.last["ar_loss"],
                "diffusion_loss": self.last["diffusion_loss"],
                **({"router": worst(self.last["router"])} if "router" in self.last else {}),
                "held_out": {f"step {step}": values for step, values in self.first_and_last().items()},
            },
        )

    def first_and_last(self) -> dict[int, dict[str, Any]]:
        """Of the held-out evaluations."""
        chosen = sorted({min(self.evaluations), max(self.evaluations)}) if self.evaluations else []
        return {step: self.evaluations[step] for step in chosen}

    def summarise(self, out: Path, note: Callable[[str], None], pays: str | None = None) -> None:
        """What a run ends with. pays: whether AR-Trust is faster than causal decoding here."""
        options, planned = self.run.options, self.run.recipe.optimizer.steps
        early = f" of {planned:,}" if self.step != planned else ""
        note(f"trained {self.totals['clean_tokens']:,} tokens in {self.step:,}{early} steps")
        note(f"last step: AR loss {self.last['ar_loss']:.3f}, diffusion loss {self.last['diffusion_loss']:.3f}")
        if "router" in self.last:
            note(f"last step: {describe_router(self.last['router'])}")
        base = self.run.recipe.adapter.base
        if base != STORED:
            note(
                f"the drafts were learned over a clean stream in {base}, and held-out numbers are of it; the "
                "checkpoint has the source's own weights, so `flarec eval` may tell others (AR-Trust's text is the "
                "source's all the same)"
            )
        for step, values in self.first_and_last().items():
            note(f"held-out {'before' if step == 0 else 'after'}: {describe_evaluation(values)}")
        if pays is not None:
            note(pays)
        note(f"checkpoint: {out}")
        words = [str(options.source), "--adapter", str(out)] if options.adapter_only else [str(out)]
        chat = " --chat" if getattr(self.run.tokenizer, "chat_template", None) else ""
        note(f'try it: flarec generate {shlex.join(words)} "..."{chat} --mode ar-trust')
        note(f"a page about it: flarec report {shlex.quote(str(out))}")


def adapter_info(options: Options, pipelines: Mapping[str, str]) -> AdapterInfo | None:
    """The adapter that a run trains; None for one that trains the model itself. Raises `UsageError` for options that
    only an adapter has."""
    for line in pipelines["decode"].splitlines():
        step = parse_pass(line, PASSES) if line.startswith(AdaptNoisyStream.name) else None
        if isinstance(step, AdaptNoisyStream):
            return AdapterInfo(step.rank, step.alpha, step.modules, alone=options.adapter_only)
    options.check_no_adapter()
    return None
