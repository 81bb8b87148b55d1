"""The chapters of the page: what is shown of a run and of evaluations, and what is said where nothing is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flarec.checkpoint.curve import HEAD, Curve, curves
from flarec.train.state import METRICS

from .figures import Figure, Points
from .recorded import ONE_PER_FORWARD, SPAN, EvaluationRecord, Recorded, at, at_text, inside

MOST_ROWS = 12
"""Of each series in a table of points; the figure shows more of them."""
NO_EVALUATION = "Not recorded: the run made no held-out evaluation (evaluation.every)."
NO_CURVE = "Not recorded: flarec tune CKPT --data FILE --write measures settings and notes their curve."
NO_RECORD = "Not recorded: give records of `flarec eval CKPT --data FILE --out RECORD.json` with --eval."


@dataclass(frozen=True)
class Table:
    """Texts; the first row names the columns."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Topic:
    """One idea of a chapter: a figure, a table of its numbers, or a line that says why there are none."""

    title: str
    figure: Figure | None = None
    table: Table | None = None
    note: str = ""


@dataclass(frozen=True)
class Chapter:
    title: str
    parts: Sequence[Topic] = field(default_factory=tuple)


def chapters(run: Recorded, records: Sequence[EvaluationRecord]) -> list[Chapter]:
    """All but the samples."""
    return [
        Chapter("The run", (Topic("", table=_facts(run)),)),
        Chapter("Losses", tuple(_losses(run))),
        Chapter("Held-out probes", tuple(_probes(run))),
        Chapter("Tokens per forward", tuple(_speed(run, records))),
        Chapter("Accuracy against forwards", (_accuracy(records),)),
        Chapter("Accuracy at tokens per forward, by setting", tuple(_settings(run))),
        Chapter("Router load", tuple(_router(run))),
    ]


def _facts(run: Recorded) -> Table:
    manifest = run.manifest
    data, recipe = manifest.data, manifest.recipe
    adapter = manifest.adapter
    rows = [
        ("source", manifest.source.name),
        ("recipe", at_text(recipe, "name") or "not recorded"),
        ("trained", f"an adapter of rank {adapter.rank}" if adapter is not None else "the model itself"),
        ("block size", str(manifest.decode.block_size)),
        ("steps", _count(data, "steps")),
        ("clean tokens", _count(data, "clean_tokens")),
        ("noisy tokens", _count(data, "noisy_tokens")),
        ("held-out documents", _count(data, "held_out_documents")),
        ("seed", _count(data, "seed", grouped=False)),
        ("precision", at_text(data, "precision") or "not recorded"),
    ]
    sources = inside(data, "sources")
    for name, values in sources.items() if isinstance(sources, Mapping) else ():
        rows.append((f"data {name}", f"{_count(values, 'documents')} documents, {_count(values, 'tokens')} tokens"))
    rows += [(name, str(version)) for name, version in manifest.versions.items()]
    return Table(("what", "value"), rows)


def _count(table: object, key: str, *, grouped: bool = True) -> str:
    value = at(table, key)
    if value is None:
        return "not recorded"
    return f"{value:,.0f}" if grouped else f"{value:.0f}"


def _losses(run: Recorded) -> Iterable[Topic]:
    missing = f"Not recorded: the checkpoint has no {METRICS} with steps in it."
    clean = {"training": run.curve("ar_loss"), "held out": run.curve("evaluation", "ar_loss", held_out=True)}
    yield _plot("AR loss, of the clean stream", "step", "nats per token", clean, missing)
    noisy = {"training": run.curve("diffusion_loss")}
    yield _plot("Diffusion loss, of the noisy stream", "step", "loss", noisy, missing)


def _probes(run: Recorded) -> Iterable[Topic]:
    for title, key, unit in (
        ("Accuracy of fully masked blocks, by position of the block", "all_masked_accuracy", "share that is right"),
        ("1 - total variation to the clean stream, by position of the block", "one_minus_tv", "1 - TV"),
    ):
        curves = {f"position {slot}": points for slot, points in run.slots("evaluation", key).items()}
        yield _plot(title, "step", unit, curves, NO_EVALUATION)
    series = {"drafts": run.curve("evaluation", "expected_accepted", held_out=True)}
    yield _plot("Drafts that are expected to be accepted", "step", "drafts per block", series, NO_EVALUATION)


def _speed(run: Recorded, records: Sequence[EvaluationRecord]) -> Iterable[Topic]:
    series = {"held-out": run.curve("evaluation", "tokens_per_forward", held_out=True)}
    yield _plot("In training, AR-Trust, greedy", "step", "tokens per forward", series, NO_EVALUATION)
    positions = {f"{number}: {record.file}": record.by_position() for number, record in enumerate(records, 1)}
    missing = NO_RECORD
    if records:
        modes = ", ".join(ONE_PER_FORWARD)
        missing = f"Not recorded: no record has answers of {SPAN} tokens with the origin of each, in a mode of {modes}."
    part = _plot("By position in the answer", "tokens into the answer", "tokens per forward", positions, missing)
    over = f"Over {SPAN} tokens each, of the answers that are as long as that."
    yield part if part.note else replace(part, note=over)
    yield _temperatures(records)


def _temperatures(records: Sequence[EvaluationRecord]) -> Topic:
    """A row per record: several may have one label and one temperature, and other options that differ."""
    series: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for number, record in enumerate(records, 1):
        heat, rate = record.number("options", "temperature"), record.number("result", "tokens_per_forward")
        if heat is not None and rate is not None:
            series.setdefault(record.label, []).append((heat, rate))
            rows.append((f"{number}: {record.file}", record.model, record.mode, _text(heat), _text(rate)))
    title, missing = "By temperature", "Not recorded: no record has a temperature and tokens per forward."
    if not rows:
        return Topic(title, note=missing if records else NO_RECORD)
    known = {name: sorted(points) for name, points in series.items()}
    table = Table(("record", "model", "mode", "temperature", "tokens per forward"), rows)
    return Topic(title, Figure(title, "temperature", "tokens per forward", known, {}), table)


def _accuracy(records: Sequence[EvaluationRecord]) -> Topic:
    series: dict[str, list[tuple[float, float]]] = {}
    intervals: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for number, record in enumerate(records, 1):
        forwards, accuracy = record.forwards_per_answer, record.number("result", "accuracy")
        if forwards is None or accuracy is None:
            continue
        series.setdefault(record.label, []).append((forwards, accuracy))
        low, high = (record.number("result", "accuracy_interval", end) for end in (0, 1))
        known = (accuracy, accuracy) if low is None or high is None else (low, high)
        intervals.setdefault(record.label, []).append(known)
        rows.append((
            f"{number}: {record.file}", record.model, record.mode, _text(record.number("options", "temperature")),
            _text(forwards), f"{accuracy:.1%}", f"{known[0]:.1%} to {known[1]:.1%}" if known[0] != known[1] else "-",
            _count(record.table["result"], "answers"),
        ))
    if not rows:
        return Topic("", note="Not recorded: no record has answers that are graded." if records else NO_RECORD)
    figure = Figure("Accuracy against forwards", "forwards per answer", "accuracy", series, intervals, joined=False)
    head = ("record", "model", "mode", "temperature", "forwards per answer", "accuracy", "95 %", "graded answers")
    return Topic("", figure, Table(head, rows))


def _settings(run: Recorded) -> Iterable[Topic]:
    """What `flarec tune --write` noted."""
    found = curves(run.manifest)
    if not found:
        yield Topic("", note=NO_CURVE)
    for curve in found:
        yield replace(_curve(curve), note=curve.about)


def _curve(curve: Curve) -> Topic:
    """A line per recheck over thresholds, and where the chosen setting is on the other half."""
    series: dict[str, list[tuple[float, float]]] = {}
    intervals: dict[str, list[tuple[float, float]]] = {}
    for point in curve.points:
        if point.accuracy is None or point.tokens_per_forward is None:
            continue
        recheck = "causal" if point.causal else f"recheck {_text(point.recheck)}"
        name = recheck if point.half == "choosing" else f"{recheck}, reporting"
        series.setdefault(name, []).append((point.tokens_per_forward, point.accuracy))
        intervals.setdefault(name, []).append(point.interval or (point.accuracy, point.accuracy))
    table = Table(HEAD, [point.cells() for point in curve.points])
    figure = Figure(curve.mode, "tokens per forward", "accuracy", series, intervals) if series else None
    return Topic(curve.mode, figure, table)


def _router(run: Recorded) -> Iterable[Topic]:
    streams = ("clean", "noisy")
    if not any("router" in line for line in run.steps):
        yield Topic("", note="Not recorded: the model has no expert layers, or its run no steps.")
        return
    for title, key, worst in (
        ("Load of the busiest expert over the mean, of the least even layer (1 is even)", "max_over_mean", max),
        ("Entropy of the choices over that of even ones, of the least even layer (1 is even)", "entropy", min),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for stream in streams:
            for line in run.steps:
                layers = inside(line, "router", stream, key)
                count = len(layers) if isinstance(layers, list) else 0
                values = [value for n in range(count) if (value := at(layers, n)) is not None]
                if values:
                    series.setdefault(f"{stream} rows", []).append((float(line["step"]), worst(values)))
        yield _plot(title, "step", key.replace("_", " "), series, "Not recorded: no step has counts.")


def _plot(title: str, x: str, y: str, series: Mapping[str, Points], missing: str) -> Topic:
    known = {name: points for name, points in series.items() if points}
    if not known:
        return Topic(title, note=missing)
    return Topic(title, Figure(title or y, x, y, known, {}), _points(x, known))


def _points(x: str, series: Mapping[str, Points]) -> Table:
    """A row per place on the axis, as many as are looked at, of every series; a place that a series lacks is empty."""
    values = {name: dict(points) for name, points in series.items()}
    places = sorted({place for points in values.values() for place in _spread(sorted(points))})
    rows = [[_text(place), *(_text(found.get(place)) for found in values.values())] for place in places]
    return Table((x, *values), rows)


def _spread(places: Sequence[float]) -> Sequence[float]:
    """`MOST_ROWS` of them with both ends, or all."""
    last = len(places) - 1
    return places if last < MOST_ROWS else [places[round(row * last / (MOST_ROWS - 1))] for row in range(MOST_ROWS)]


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"
