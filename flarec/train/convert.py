"""`flarec convert`: train a source model into a dual-mode checkpoint.

Nothing is written before all input has been checked; then OUT.partial/ holds the training state (`StateDirectory`)
until the finished checkpoint appears as OUT in one rename.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch

from ..base.fields import shows_fields
from ..base.interrupts import Interrupts
from ..base.lock import OutputLock, only_writer
from ..checkpoint.hub import check_push, push
from ..checkpoint.manifest import RUN_KEY, Manifest
from ..checkpoint.write import clear_left_overs, versions
from ..errors import CheckpointError, TrainingError, UsageError
from .advice import after_training
from .answers.step import with_answers
from .arguments import Arguments, ConversionKeywords
from .background import SaveWriter, in_background
from .identity import Horizons, check_identity, check_resumable, continued, identity_of, name_of, steps_of
from .leading import END, LeadingTrainer, check_same_run, follow, share_text
from .logs import LoggingReporter, ProgressCallback
from .loop import Step, Trainer, out_of_memory
from .metrics import MetricsLog, read_metrics
from .options import Options
from .outcome import Trained, adapter_info
from .pace import Pace
from .plain_source import plain_source
from .prepare import Run, prepare
from .progress import Reporter
from .ranks.group import Ranks, joined
from .recorded import arguments_of, recorded_options
from .saves import check_values
from .state import StateDirectory, differences
from .trackers.tracking import Tracking, chosen_trackers

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


class _EvaluationStopped(Exception):
    """By a signal."""


@shows_fields(Arguments)
def convert(
    source: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    reporter: Reporter | None = None,
    progress: ProgressCallback | None = None,
    **keywords: Unpack[ConversionKeywords],
) -> Path:
    """Convert a hybrid-attention model and return the checkpoint's directory; with `stop_after` that of the training
    state, OUT.partial. The arguments are those of `Arguments`.

    What happens goes to the logger `flarec` (INFO; advice is WARNING) and to `progress(event, values)`, see
    `ProgressCallback`; a `reporter` stands in for both.

    Raises `UsageError` and its kin for bad input, before anything is written; `TrainingError` if training cannot go on;
    `Interrupted` (a `KeyboardInterrupt`) after Ctrl-C or SIGTERM. A run that stopped continues with `resume=True`, if
    wanted with another number of `steps`; one that is complete stays as it is.
    """
    values: dict[str, Any] = {"source": source, "data": data, **keywords}
    return run(Options(**values), reporter or LoggingReporter(progress))


def finish(
    partial: str | Path,
    *,
    keep: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write the checkpoint of the run in `partial` (OUT.partial) as it was saved last, and return its directory, OUT.

    keep: the training state stays, so that the run can go on (`convert` with `resume` and `overwrite`); device: of the
    held-out evaluation, default that of the run. Raises as `convert`.
    """
    options = recorded_options(Path(partial), overwrite=overwrite)
    options = replace(options, kernels="auto", device=device or options.device)
    return run(options, reporter or LoggingReporter(), written_only=True, keep=keep)


def run(options: Options, reporter: Reporter, *, written_only: bool = False, keep: bool = False) -> Path:
    """As `convert`, or as `finish` if the checkpoint is `written_only`."""
    with joined(options.device) as ranks:
        if ranks.first:
            result = _lead(ranks, options, reporter, written_only, keep)
        else:
            followed = prepare(ranks.from_first(lambda: options), Reporter(), ranks)
            check_same_run(followed)
            follow(followed.trainer)
            return options.output
    if isinstance(result, Interrupted):
        raise result
    if options.push_to_hub is not None and result == options.output:
        reporter.working(f"pushing {result} to {options.push_to_hub}")
        reporter.note(f"pushed: {push(result, options.push_to_hub)}")
    return result


def _lead(ranks: Ranks, options: Options, reporter: Reporter, written_only: bool, keep: bool) -> Path | Interrupted:
    """The run, on the rank that conducts it. An interrupt is an orderly end, of all ranks."""
    chosen_trackers(options.report_to)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)
    check_resumable(options, options.load_recipe())
    with plain_source(options, reporter) as opened:
        return _run(ranks, opened, reporter, written_only, keep)


def _run(
    ranks: Ranks, options: Options, reporter: Reporter, written_only: bool, keep: bool
) -> Path | Interrupted:
    options = with_answers(options, reporter)
    ranks.from_first(lambda: options)
    trainer_class = LeadingTrainer if ranks.size > 1 else Trainer
    prepared = prepare(options, reporter, ranks, trainer_class, not written_only)
    check_same_run(prepared)
    try:
        result: Path | Interrupted = _conduct(prepared, reporter, written_only, keep)
    except Interrupted as stop:
        result = stop
    ranks.instruct(END)
    return result


def recipe_text(run: Run) -> str:
    """The recipe by its name, and what was changed of it; all keys are in the manifest."""
    name, changed = run.options.recipe, differences(run.options.own_recipe().to_dict(), run.recipe.to_dict())
    if not changed:
        return f"recipe: {name} as it is (`flarec recipes {name}` shows every key)"
    return "\n  ".join([f"recipe: {name} with these changes (`--dry-run` shows every key):", *changed])


def _conduct(prepared: Run, reporter: Reporter, written_only: bool, keep: bool) -> Path:
    """From what was prepared to the checkpoint."""
    for source in prepared.sources:
        reporter.note(str(source.stats))
    reporter.note(held_out_text(prepared))
    if prepared.trainer.ranks.size > 1:
        reporter.note(share_text(prepared))
    reporter.note(recipe_text(prepared))
    out = prepared.options.output
    adapter_info(prepared.options, prepared.pipelines)
    with reporter, only_writer(out) as lock:
        clear_left_overs(out, lock)
        if prepared.options.resume and _is_complete(prepared, written_only, keep):
            reporter.note(f"{out} is complete: this run ended before, nothing is left to do")
            return out
        prepared.options.check_output(prepared.source.path, locked=True)  # again: nobody else comes in between now
        return _Conversion(prepared, reporter, lock, written_only=written_only, keep=keep).finish()


def held_out_text(run: Run) -> str:
    """How many documents are evaluated, and whether there are none, or fewer than were asked for."""
    evaluation, text = run.recipe.evaluation, f"held out for evaluation: {run.held_documents} documents"
    if not evaluation.every or run.held_documents >= evaluation.prompts:
        return text
    if run.held_documents:
        return f"{text}, there are no more for evaluation.prompts = {evaluation.prompts}"
    return f"{text}, there are too few: nothing is measured (name other documents with --eval-data)"


def _is_complete(run: Run, written_only: bool, keep: bool) -> bool:
    """Whether the run's checkpoint is in its place, whole, and this run will not make another; then its training state,
    which a kill may have left, is removed (with `keep` it stays)."""
    out, directory, identity = run.options.output, run.options.state_directory, identity_of(run)
    saved = directory.saved_step
    stated = name_of(directory.identity, saved) if written_only else name_of(identity)
    try:
        manifest = Manifest.read(out)
        if manifest is None or manifest.data.get(RUN_KEY) != stated or manifest.versions != versions():
            return False
        manifest.check_files(out)
    except CheckpointError:
        return False
    # with --overwrite, what stands there may be the result of the same run before
    trained = written_only or saved == run.recipe.optimizer.steps
    if directory.in_use and run.options.overwrite and not trained:
        return False
    if keep:
        return True
    with contextlib.suppress(OSError, UsageError):  # another run's state stays
        if directory.in_use:
            check_identity(directory, identity, written_only=written_only)
        directory.remove()
    return True


class _Conversion:
    """A prepared run with its state directory."""

    def __init__(self, run: Run, reporter: Reporter, lock: OutputLock, *, written_only: bool, keep: bool) -> None:
        self.run = run
        self.lock = lock
        self.reporter = reporter
        self.written_only = written_only
        self.keep = keep
        self.trainer = run.trainer
        self.directory: StateDirectory = run.options.state_directory
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.totals = {"clean_tokens": 0, "noisy_tokens": 0}
        self.last: dict[str, Any] = {}
        self.identity = identity_of(run)
        steps = run.recipe.optimizer.steps
        self.horizons: Horizons = [(0, steps)]
        if run.options.resume:
            free = run.options.steps is not None
            check_identity(self.directory, self.identity, steps_free=free, written_only=written_only)
        self.tracking = self._open_tracking()
        try:
            saved = self._start(steps)
        except BaseException:
            self.tracking.close()
            raise
        self.saves = self._save_writer(saved)
        self.end = self.trainer.step if written_only else min(steps, run.options.stop_after or steps)
        # without a save everything comes again, the first evaluation too
        resume_at = -1 if saved is None else self.trainer.step
        self.interrupts = Interrupts(finish_step=True, told=self._say_stopping)
        evaluated = self.run.held_out is not None
        self.pace = Pace(self.end, run.recipe.evaluation.every if evaluated else 0, run.recipe.save.every)
        self.log = MetricsLog(self.directory.metrics, resume_at=resume_at, evaluations=self.evaluations)
        for line in read_metrics(self.directory.metrics):  # of a tracker that did not have them
            self.tracking.log(line)

    def _start(self, steps: int) -> int | None:
        """Make OUT.partial/, or continue from its last save, whose step is returned."""
        options = self.run.options
        if not options.resume:
            self.directory.create(self.identity, arguments_of(options), self.tracking.record)
            return None
        before = self.directory.identity
        state = self.directory.latest(self.reporter.note)
        if state is None:
            self._write_record()
            self.reporter.note(f"{self.directory.path} has no save yet: starting from the first step")
            return None
        values = state.values
        check_values(values, steps)
        self.trainer.load(state)
        step = self.trainer.step
        self.evaluations = {int(at): value for at, value in values["evaluations"].items()}
        self.totals, self.last = values["totals"], values["last"]
        self.horizons = continued(values.get("horizons", [(0, steps_of(before))]), step, steps)
        if self.written_only:
            self.identity = before
            return step
        if steps != steps_of(before):
            self._say_horizon(steps_of(before))
        self._write_record()
        self.reporter.note(f"continuing after step {step} of {steps}")
        return step

    def _save_writer(self, saved: int | None) -> SaveWriter:
        options = self.run.recipe.save
        background, text = in_background(options.background, self.trainer)
        if text and not self.written_only:
            self.reporter.note(text)
        fresh = self.trainer.ranks.size > 1  # gathered into main memory
        return SaveWriter(self.directory, options.total_limit, background=background, fresh=fresh, saved=saved)

    def _write_record(self) -> None:
        self.directory.rewrite(self.identity, arguments_of(self.run.options), self.tracking.record)

    def _open_tracking(self) -> Tracking:
        """The trackers, with what those of the process before have."""
        options = self.run.options
        names = () if self.written_only else chosen_trackers(options.report_to)
        record = self.directory.tracking if options.resume else {}
        tracking = Tracking(names, options.output, self.identity, record, self.reporter.warn)
        for place in tracking.places:
            self.reporter.note(f"reporting to: {place}")
        return tracking

    def _log(self, line: dict[str, Any]) -> None:
        self.log.write(line)
        self.tracking.log(line)

    def _close(self) -> None:
        """The log, and the trackers, whose state the record gets."""
        self.log.close()
        if self.tracking.trackers:
            self.tracking.close()
            with contextlib.suppress(TrainingError):  # a full disk: the next process takes them for left open
                self._write_record()
        self.reporter.end()

    def _say_horizon(self, before: int) -> None:
        """What another number of steps changes."""
        optimizer, step = self.run.recipe.optimizer, self.trainer.step
        text = f"optimizer.steps was {before} and is now {optimizer.steps}: steps 1 to {step} stay as they are"
        if step < optimizer.steps:
            text += (
                f"; from step {step + 1} schedule and phases are those of {optimizer.steps} steps (lr "
                f"{optimizer.lr_at(step):.3g} there, {optimizer.lr_at(optimizer.steps - 1):.3g} in the last)"
            )
        self.reporter.note(text)

    def finish(self) -> Path:
        """Train to the last step, write the checkpoint and remove OUT.partial/."""
        try:
            self._train()
        finally:
            self._close()
        steps = self.run.recipe.optimizer.steps
        if self.trainer.step < steps and not self.written_only:
            return self.directory.path
        early = self.trainer.step if self.written_only else None
        precision = str(self.identity["precision"])
        outcome = Trained(
            self.run, name_of(self.identity, early), precision, self.trainer.step, self.horizons, self.totals,
            self.last, self.evaluations,
        )
        pays = self._pays()
        self.reporter.working(f"writing {self.run.options.output}")
        out = outcome.write(self.directory.metrics, self.lock, self.reporter.note)
        if not self.keep:
            with contextlib.suppress(OSError):  # the checkpoint is complete; what is left can be removed by hand
                self.directory.remove()
        outcome.summarise(out, self.reporter.note, pays)
        for line in after_training(self.evaluations):
            self.reporter.warn(line)
        return out

    def _pays(self) -> str | None:
        """Whether AR-Trust pays on this machine, by the last evaluation; before the weights get the dtype of files."""
        if self.run.held_out is None or not self.evaluations:
            return None
        self.reporter.working("timing steps of decoding")
        with self.trainer.whole():
            return self.run.held_out.pays(self.evaluations[max(self.evaluations)]["tokens_per_forward"])

    def _say_stopping(self) -> None:
        self.reporter.stopping("stopping: the running step ends and the state is saved; Ctrl-C again ends at once")

    def _train(self) -> None:
        """To the end, evaluations and saves included."""
        trainer, end = self.trainer, self.end
        read_every, behind = READ_EVERY[trainer.program.device.type]
        pending: list[Step] = []
        with self.interrupts as interrupts, self.saves:
            self._evaluate_if_due()  # before the first step, or where a stopped run left it out
            self.reporter.begin(trainer.step, end)
            clock = time.perf_counter()
            while trainer.step < end and not interrupts.requested:
                self.saves.check()
                pending.append(self._advance())
                evaluate = self._due(trainer.step)
                save = trainer.step % self.run.recipe.save.every == 0 or trainer.step == end or interrupts.requested
                # the newest steps of an accelerator are left alone, so that it has something to do meanwhile
                done = len(pending) - (0 if evaluate or save else behind)
                if done >= read_every or evaluate or save:
                    self._read(pending[:done], clock)
                    pending = pending[done:]
                    self._evaluate_if_due()
                    if save:
                        self._save()
                    clock = time.perf_counter()
            self._evaluate_if_due()  # of a run that was shortened to what is saved, or is written early
            if trainer.step < end or (self._due(trainer.step) and interrupts.requested):
                self._read(pending, clock)
                self._save()
                self.saves.wait()
                raise Interrupted(self.directory.path, trainer.step, interrupts.signal)

    def _due(self, step: int) -> bool:
        """Whether the model of this step is evaluated and was not yet."""
        every, steps = self.run.recipe.evaluation.every, self.run.recipe.optimizer.steps
        if self.run.held_out is None or step in self.evaluations:
            return False
        return step % every == 0 or step == steps or self.written_only

    def _advance(self) -> Step:
        try:
            return self.trainer.advance()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.trainer.step) from error

    def _read(self, pending: Sequence[Step], clock: float) -> None:
        """Check, log and report the steps since the last read. Comes before every save: a bad step is never saved."""
        if not pending:
            return
        try:
            lines = [step.read(self.run.tokenizer) for step in pending]
        except TrainingError as error:
            with contextlib.suppress(TrainingError):
                self.saves.wait()
            saved = self.saves.saved
            kept = f"the save of step {saved} is kept in" if saved else "no step was saved yet in"
            raise TrainingError(f"{error}; {kept} {self.directory.path}") from None
        seconds = (time.perf_counter() - clock) / len(lines)
        for line in lines:
            line["seconds"] = seconds
            line["tokens_per_second"] = line["clean_tokens"] / seconds
            for name in self.totals:
                self.totals[name] += line[name]
            self._log(line)
        self.last = lines[-1]
        self.pace.stepped(seconds)
        self.reporter.step({**self.last, "seconds_left": self.pace.left(self.last["step"])})

    def _evaluate_if_due(self) -> None:
        """A signal ends the evaluation; it comes when the run goes on."""
        step, held_out = self.trainer.step, self.run.held_out
        if held_out is None or not self._due(step) or self.interrupts.requested:
            return
        what = f"evaluating on {self.run.held_documents} held-out documents"
        self.reporter.working(what)

        def tick(done: int, total: int) -> None:
            if self.interrupts.requested:
                raise _EvaluationStopped
            self.reporter.working(what, done, total)

        start = time.perf_counter()
        try:
            with self.trainer.whole():
                measured = held_out.measure(tick)
        except _EvaluationStopped:
            return
        values = {**measured, "seconds": time.perf_counter() - start}
        self.pace.evaluated(values["seconds"])
        self.evaluations[step] = values
        self._log({"step": step, "evaluation": values})
        self.reporter.evaluation(step, values)

    def _save(self) -> None:
        if self.saves.begun == self.trainer.step:
            return
        start = time.perf_counter()
        self.saves.wait()
        state = self.trainer.state(
            evaluations=self.evaluations, totals=self.totals, last=self.last, horizons=self.horizons
        )
        self.saves.save(self.trainer.step, state)
        self.pace.saved(time.perf_counter() - start)
