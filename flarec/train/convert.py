"""`flarec convert`: train a source model into a dual-mode checkpoint.

Nothing is written before all input has been checked; then OUT.partial/ holds the training state (`StateDirectory`)
until the finished checkpoint appears as OUT in one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from ..base.fields import shows_fields
from ..base.interrupts import Interrupts
from ..base.lock import OutputLock, only_writer
from ..checkpoint.directory import describe_source
from ..checkpoint.manifest import RUN_KEY, AdapterInfo, DecodeDefaults, Manifest
from ..checkpoint.weights import stored_dtypes
from ..checkpoint.write import clear_left_overs, versions, write_adapter_checkpoint, write_checkpoint
from ..errors import CheckpointError, TrainingError, UsageError
from ..ir.pipeline import parse_pass
from ..passes import PASSES, AdaptNoisyStream
from .answers.step import with_answers
from .arguments import Arguments, ConversionKeywords
from .loop import Step
from .metrics import MetricsLog
from .options import Options
from .prepare import Run, prepare
from .progress import Reporter, describe_evaluation
from .router import describe as describe_router
from .router import worst
from .saves import check_values
from .state import METRICS, StateDirectory

READ_EVERY = {"cpu": (1, 0), "cuda": (10, 2)}
"""By device: steps between reads of the losses, and the newest steps, left alone. A read waits for what it reads."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the running step was finished and the training state saved at `step`.

    exit_code: what a shell reports for a process that such a signal ended.
    """

    def __init__(self, path: Path, step: int, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped after step {step}; the training state is in {path}, continue with --resume")
        self.path = path
        self.step = step
        self.exit_code = 128 + number


@shows_fields(Arguments)
def convert(
    source: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    reporter: Reporter | None = None,
    **keywords: Unpack[ConversionKeywords],
) -> Path:
    """Convert a hybrid-attention model and return the checkpoint's directory. The arguments are those of `Arguments`.

    Raises `UsageError` and its kin for bad input, before anything is written; `TrainingError` if training cannot go on;
    `Interrupted` (a `KeyboardInterrupt`) after Ctrl-C or SIGTERM. A run that stopped continues with `resume=True`; one
    that is complete stays as it is.
    """
    values: dict[str, Any] = {"source": source, "data": data, **keywords}
    return run(Options(**values), reporter or Reporter())


def run(options: Options, reporter: Reporter) -> Path:
    """As `convert`."""
    options = with_answers(options, reporter)
    prepared = prepare(options, reporter)
    for source in prepared.sources:
        reporter.note(str(source.stats))
    reporter.note(held_out_text(prepared))
    reporter.note(f"recipe:\n{prepared.recipe.to_toml()}".rstrip())
    out = prepared.options.output
    _adapter_of(prepared)
    with reporter, only_writer(out) as lock:
        clear_left_overs(out, lock)
        if prepared.options.resume and _is_complete(prepared):
            reporter.note(f"{out} is complete: this run ended before, nothing is left to do")
            return out
        prepared.options.check_output(prepared.source.path, locked=True)  # again: nobody else comes in between now
        return _Conversion(prepared, reporter, lock).finish()


def held_out_text(run: Run) -> str:
    """How many documents are evaluated, and why there are none."""
    text = f"held out for evaluation: {run.held_documents} documents"
    if run.held_documents or not run.recipe.evaluation.every:
        return text
    return f"{text}, there are too few: nothing is measured (name other documents with --eval-data)"


def identity_of(run: Run) -> dict[str, Any]:
    """What decides the result: a resumed run must agree with it."""
    source = describe_source(run.options.source)
    return {
        "recipe": run.recipe.to_dict(),
        "seed": run.options.seed,
        "kernels": run.options.kernels,
        "precision": run.precision,
        "adapter_only": run.options.adapter_only,
        "source": {"name": source.name, "sha256": source.sha256},
        "data": {
            f"{number}: {Path(source.stats.source).name}": source.fingerprint()
            for number, source in enumerate(run.sources, 1)
        },
    }


def _name_of(identity: dict[str, Any]) -> str:
    """How the manifest names the run that made a checkpoint."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_complete(run: Run) -> bool:
    """Whether the run's checkpoint is in its place, whole, and this run will not make another; then its training state,
    which a kill may have left, is removed."""
    out, directory, identity = run.options.output, run.options.state_directory, identity_of(run)
    try:
        manifest = Manifest.read(out)
        if manifest is None or manifest.data.get(RUN_KEY) != _name_of(identity) or manifest.versions != versions():
            return False
        manifest.check_files(out)
    except CheckpointError:
        return False
    # with --overwrite, what stands there may be the result of the same run before
    trained = directory.saved_step == run.recipe.optimizer.steps
    if directory.in_use and run.options.overwrite and not trained:
        return False
    with contextlib.suppress(OSError, UsageError):  # another run's state stays
        if directory.in_use:
            directory.check_identity(identity)
        directory.remove()
    return True


def _adapter_of(run: Run) -> AdapterInfo | None:
    """The adapter that a run trains; None for one that trains the model itself. Raises `UsageError` for options that
    only an adapter has."""
    options = run.options
    for line in run.pipelines["decode"].splitlines():
        step = parse_pass(line, PASSES) if line.startswith(AdaptNoisyStream.name) else None
        if isinstance(step, AdaptNoisyStream):
            return AdapterInfo(step.rank, step.alpha, step.modules, alone=options.adapter_only)
    if options.adapter_only or options.link:
        option = "--adapter-only" if options.adapter_only else "--link"
        raise UsageError(f"{option} is for an adapter, and this recipe trains the model itself; set adapter.rank")
    return None


class _Conversion:
    """A prepared run with its state directory."""

    def __init__(self, run: Run, reporter: Reporter, lock: OutputLock) -> None:
        self.run = run
        self.lock = lock
        self.reporter = reporter
        self.trainer = run.trainer
        self.directory: StateDirectory = run.options.state_directory
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.totals = {"clean_tokens": 0, "noisy_tokens": 0}
        self.last: dict[str, Any] = {}
        self.saved: int | None = None
        self.source = describe_source(run.options.source)
        self.identity = identity_of(run)
        self._start()
        # without a save everything comes again, the first evaluation too
        self.log = MetricsLog(self.directory.metrics, resume_at=-1 if self.saved is None else self.trainer.step)

    def _start(self) -> None:
        """Make OUT.partial/, or continue from its last save."""
        if not self.run.options.resume:
            self.directory.create(self.identity)
            return
        self.directory.check_identity(self.identity)
        state = self.directory.latest(self.reporter.note)
        if state is None:
            self.reporter.note(f"{self.directory.path} has no save yet: starting from the first step")
            return
        values = state.values
        check_values(values, self.run.recipe.optimizer.steps)
        self.trainer.load(state)
        self.evaluations = {int(step): value for step, value in values["evaluations"].items()}
        self.totals, self.last, self.saved = values["totals"], values["last"], self.trainer.step
        self.reporter.note(f"continuing after step {self.trainer.step} of {self.run.recipe.optimizer.steps}")

    def finish(self) -> Path:
        """Train to the last step, write the checkpoint and remove OUT.partial/."""
        try:
            self._train()
        finally:
            self.log.close()
            self.reporter.end()
        out = self._write()
        with contextlib.suppress(OSError):  # the checkpoint is complete; what is left can be removed by hand
            self.directory.remove()
        self._summarise(out)
        return out

    def _train(self) -> None:
        recipe, trainer = self.run.recipe, self.trainer
        steps, every = recipe.optimizer.steps, recipe.evaluation.every
        read_every, behind = READ_EVERY[trainer.program.device.type]
        pending: list[Step] = []
        with Interrupts(finish_step=True) as interrupts:
            if 0 not in self.evaluations and trainer.step == 0:
                self._evaluate()
            self.reporter.begin(trainer.step, steps)
            clock = time.perf_counter()
            while trainer.step < steps and not interrupts.requested:
                pending.append(self._advance())
                last = trainer.step == steps
                evaluate = bool(every) and (trainer.step % every == 0 or last)
                save = trainer.step % recipe.save.every == 0 or last or interrupts.requested
                # the newest steps of an accelerator are left alone, so that it has something to do meanwhile
                done = len(pending) - (0 if evaluate or save else behind)
                if done >= read_every or evaluate or save:
                    self._read(pending[:done], clock)
                    pending = pending[done:]
                    if evaluate:
                        self._evaluate()
                    if save:
                        self._save()
                    clock = time.perf_counter()
            if trainer.step < steps:
                self._read(pending, clock)
                self._save()
                raise Interrupted(self.directory.path, trainer.step, interrupts.signal)

    def _advance(self) -> Step:
        try:
            return self.trainer.advance()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory in step {self.trainer.step + 1}; lower optimizer.micro_rows or --max-length and start "
                "again with --overwrite"
            ) from error

    def _read(self, pending: Sequence[Step], clock: float) -> None:
        """Check, log and report the steps since the last read. Comes before every save: a bad step is never saved."""
        if not pending:
            return
        try:
            lines = [step.read(self.run.tokenizer) for step in pending]
        except TrainingError as error:
            kept = f"the save of step {self.saved} is kept in" if self.saved else "no step was saved yet in"
            raise TrainingError(f"{error}; {kept} {self.directory.path}") from None
        seconds = (time.perf_counter() - clock) / len(lines)
        for line in lines:
            line["seconds"] = seconds
            line["tokens_per_second"] = line["clean_tokens"] / seconds
            for name in self.totals:
                self.totals[name] += line[name]
            self.log.write(line)
        self.last = lines[-1]
        self.reporter.step(self.last)

    def _evaluate(self) -> None:
        if self.run.held_out is None:
            return
        start = time.perf_counter()
        values = {**self.run.held_out.measure(), "seconds": time.perf_counter() - start}
        step = self.trainer.step
        self.evaluations[step] = values
        self.log.write({"step": step, "evaluation": values})
        self.reporter.evaluation(step, values)

    def _save(self) -> None:
        if self.saved == self.trainer.step:
            return
        state = self.trainer.state(evaluations=self.evaluations, totals=self.totals, last=self.last)
        self.directory.save(self.trainer.step, state)
        self.saved = self.trainer.step

    def _write(self) -> Path:
        run = self.run
        run.trainer.weights.widen()
        manifest = self._manifest()
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
                    attachments={METRICS: self.directory.metrics},
                    overwrite=run.options.overwrite,
                    lock=self.lock,
                    note=self.reporter.note,
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
                attachments={METRICS: self.directory.metrics},
                overwrite=run.options.overwrite,
                lock=self.lock,
            )
        except CheckpointError as error:  # a failure here is no wrong usage: the destination was checked before
            raise TrainingError(f"{error}; training is complete and kept, write it with --resume") from error

    def _manifest(self) -> Manifest:
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
        steps = {"steps": recipe.optimizer.steps, "seed": run.options.seed, "held_out_documents": run.held_documents,
                 "precision": run.precision, RUN_KEY: _name_of(self.identity)}
        return Manifest(
            source=self.source,
            mask=run.mask,
            decode=DecodeDefaults(
                block_size=recipe.diffusion.block_size,
                readouts=dict(recipe.readouts()),
                confidence_threshold=recipe.decode.confidence_threshold,
                denoising_steps=recipe.decode.denoising_steps,
                drafts=recipe.decode.drafts,
            ),
            recipe=recipe.to_dict(),
            pipelines=run.pipelines,
            plugins=run.plugins,
            adapter=_adapter_of(run),
            data={"sources": sources, **steps, **self.totals},
            metrics={
                "ar_loss": self.last["ar_loss"],
                "diffusion_loss": self.last["diffusion_loss"],
                **({"router": worst(self.last["router"])} if "router" in self.last else {}),
                "held_out": {f"step {step}": values for step, values in self._first_and_last().items()},
            },
        )

    def _first_and_last(self) -> dict[int, dict[str, Any]]:
        chosen = sorted({min(self.evaluations), max(self.evaluations)}) if self.evaluations else []
        return {step: self.evaluations[step] for step in chosen}

    def _summarise(self, out: Path) -> None:
        note = self.reporter.note
        note(f"trained {self.totals['clean_tokens']:,} tokens in {self.trainer.step:,} steps")
        note(f"last step: AR loss {self.last['ar_loss']:.3f}, diffusion loss {self.last['diffusion_loss']:.3f}")
        if "router" in self.last:
            note(f"last step: {describe_router(self.last['router'])}")
        for step, values in self._first_and_last().items():
            note(f"held-out {'before' if step == 0 else 'after'}: {describe_evaluation(values)}")
        note(f"checkpoint: {out}")
        words = [str(self.run.options.source), "--adapter", str(out)] if self.run.options.adapter_only else [str(out)]
        note(f'try it: flarec generate {shlex.join(words)} "..." --mode ar-trust')
