"""The benchmark's run on small problems: checks come first, failures are recorded, the file is complete after each row.

Kernels run in Triton's interpreter where there is no GPU; times then mean nothing, but everything else is as in a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flarec.bench import baselines, linear, report
from flarec.bench.checks import Check, CheckFailed, compare
from flarec.bench.measure import Clock, NotMeasured, TrainingTime
from flarec.bench.rows import BARS, LAYER, ROWS, select
from flarec.bench.run import run_session
from flarec.bench.session import Case, Line, Measured, Session, check_rows, run_rows
from flarec.errors import UsageError
from tests.bench.small import small_session

pytest.importorskip("triton")
WITHOUT_BASELINE = pytest.mark.skipif(baselines.version() is not None, reason="flash-linear-attention is installed")


def nothing(session: Session) -> None:
    pass


def made_row(name: str, measure: Callable[[Session], Measured], **options: Any) -> Case:
    return Case(name, f"row {name}", measure, options.pop("check", nothing), **options)


def returns(value: float) -> Callable[[Session], Measured]:
    return lambda session: Measured(value, {"part_ms": value})


def raises(error: Exception) -> Callable[[Session], Measured]:
    def measure(session: Session) -> Measured:
        raise error

    return measure


def run(rows: list[Case], session: Session, out: Path | None = None) -> list[Line]:
    return run_session(
        rows, session, out=out, commit="abc", command="a command", time_limit=1e6, say=lambda text: None, warm_up=False
    )


@WITHOUT_BASELINE
def test_a_run_writes_every_row_with_its_bar(tmp_path: Path) -> None:
    session, out = small_session(), tmp_path / "new" / "results.json"
    lines = run(select(["linear-train", "linear-block-3", "decode-step"]), session, out)
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["linear-train", "linear-block-3", "decode-step"]
    assert found["rows"] == json.loads(json.dumps([line.to_dict() for line in lines]))
    train, block, decode = found["rows"]
    for row in (train, decode):
        assert row["status"] == "not measured"
        assert row["message"] == "flash-linear-attention is not installed"
        assert row["value"] is row["verdict"] is None
    assert block["status"] == "measured"
    assert block["value"] == pytest.approx(block["values"]["ours_ms"] / block["values"]["block_4_ms"])
    assert block["verdict"] in ("aim reached", "met", "missed")
    assert (block["bar"], block["aim"], block["unit"]) == (1.3, 1.1, "x")
    assert found["commit"] == "abc" and found["command"] == "a command"
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["flash-linear-attention"] is None
    assert set(found["ceilings"]) == {"copy_gb_per_s", "matmul_tflop_per_s"}
    assert len(found["checks"]) == 3, "blocks of 4, blocks of 3, the step"
    for check in found["checks"].values():
        assert check["passed"] and set(check["errors"]) == set(check["allowed"])
    names = {name.split(",")[0] for name in found["checks"]}
    assert names == {"linear attention", "decode step"}


@pytest.mark.parametrize("name", ["conv-train", "softmax-128", "linear-packed", "linear-mamba2"])
def test_the_checks_hold_for_our_kernels(name: str) -> None:
    session = small_session()
    for row in select([name]):
        row.check(session)
    assert session.checks
    assert all(check.passed for check in session.checks.values())


def test_what_fails_its_check_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    session = small_session()
    right = linear.kernel
    monkeypatch.setattr(linear, "kernel", lambda *x: lambda *leaves: 1.001 * right(*x)(*leaves))

    def timed(*args: Any) -> TrainingTime:
        raise AssertionError("this was timed")

    monkeypatch.setattr(Clock, "training", timed)
    (line,) = run_rows(select(["linear-memory"]), session, time_limit=1e6)
    assert line.status == "failed" and line.value is None and line.verdict is None
    message = str(line.message)
    assert message.startswith("CheckFailed: the check of linear attention") and "nothing was timed" in message
    with pytest.raises(CheckFailed):
        linear.ours(session, LAYER)


def test_one_failing_row_does_not_stop_the_others(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    rows = [
        made_row("first", raises(RuntimeError("out of luck\nand more")), bar=1.0),
        made_row("second", raises(NotMeasured("no such device"))),
        made_row("third", returns(0.5), bar=1.0),
    ]
    lines = run(rows, small_session(), out)
    assert [(line.status, line.message) for line in lines] == [
        ("failed", "RuntimeError: out of luck"), ("not measured", "no such device"), ("measured", None),
    ]
    assert [row["status"] for row in json.loads(out.read_text())["rows"]] == ["failed", "not measured", "measured"]


def test_the_file_is_written_after_each_row(tmp_path: Path) -> None:
    out, counts = tmp_path / "results.json", []

    def count(session: Session) -> Measured:
        counts.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        return Measured(1.0)

    run([made_row(str(i), count) for i in range(3)], small_session(), out)
    assert counts == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_later_call_measures_what_is_missing(tmp_path: Path) -> None:
    out, session = tmp_path / "results.json", small_session()
    session.checks["first check"] = Check({"out": 0.0}, {"out": 1.0})
    run([made_row("first", returns(1.0)), made_row("second", raises(RuntimeError("no luck")))], session, out)
    rows = [made_row(name, returns(2.0)) for name in ("third", "second", "first")]
    again = run_session(rows, small_session(), out=out, commit="abc", command="again", time_limit=1e6,
                        say=lambda text: None, warm_up=False, resume=True)
    found = json.loads(out.read_text())
    assert [(row["name"], row["value"]) for row in found["rows"]] == [("first", 1.0), ("second", 2.0), ("third", 2.0)]
    assert found["rows"] == json.loads(json.dumps([line.to_dict() for line in again]))
    assert found["command"] == "again" and [call["command"] for call in found["earlier"]] == ["a command"]
    assert set(found["checks"]) == {"first check"}


LINE = Line("first", "row first", "x", None, None, False, "measured", 1.0).to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"commit": "other"}, 'the commit "other"'), ({"versions": {}}, "versions"), ({"settings": None}, "settings"),
        ({"device": "a GPU"}, "device"), ({"rows": [{}]}, "no results"), (None, "there is no"),
        ({"earlier": None}, "no results"), ({"rows": [LINE | {"name": ["first"]}]}, "no results"),
        ({"rows": [LINE | {"value": None}]}, "no results"), ({"rows": [LINE | {"values": None}]}, "no results"),
    ],
)
def test_rows_of_something_else_are_not_mixed_in(
    tmp_path: Path, change: dict[str, Any] | None, words: str
) -> None:
    out = tmp_path / "results.json"
    if change is not None:
        run([made_row("first", returns(1.0))], small_session(), out)
        out.write_text(json.dumps(json.loads(out.read_text()) | change))
    before = out.read_text() if out.exists() else None
    with pytest.raises(UsageError, match=words):
        run_session([made_row("second", returns(1.0))], small_session(), out=out, commit="abc", command="again",
                    time_limit=1e6, say=lambda text: None, warm_up=False, resume=True)
    assert (out.read_text() if out.exists() else None) == before


def test_the_time_limit_stops_before_a_row() -> None:
    now = iter(range(0, 100, 10))
    rows = [made_row(str(i), returns(1.0)) for i in range(4)]
    lines = run_rows(rows, small_session(), time_limit=35, clock=lambda: float(next(now)))
    assert [line.status for line in lines] == ["measured", "measured", "not measured", "not measured"]
    assert lines[-1].message == "the time limit of 35 s was reached"


def test_checks_in_advance_end_with_what_they_wait_for() -> None:
    done: list[str] = []
    rows = [
        made_row(name, returns(1.0), check=lambda session, name=name: done.append(name)) for name in ("a", "b", "c")
    ]
    check_rows(rows, small_session(), lambda: len(done) < 2)
    assert done == ["a", "b"]


@pytest.mark.parametrize(
    ("bar", "aim", "at_least", "value", "verdict"),
    [
        (2.3, 1.3, False, 1.3, "aim reached"),
        (2.3, 1.3, False, 2.3, "met"),
        (2.3, 1.3, False, 2.31, "missed"),
        (2.3, 1.3, False, float("nan"), "missed"),
        (15, None, True, 15, "met"),
        (15, None, True, 14.9, "missed"),
        (None, None, False, 99, "reported"),
    ],
)
def test_verdicts(bar: float | None, aim: float | None, at_least: bool, value: float, verdict: str) -> None:
    row = made_row("row", returns(value), bar=bar, aim=aim, at_least=at_least)
    (line,) = run_rows([row], small_session(), time_limit=1e6)
    assert line.verdict == verdict


def test_a_check_measures_and_allows() -> None:
    exact = {"out": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    rough = {"out": exact["out"] + torch.tensor([0.0, 0.05])}  # an error of 1 %
    for error, passed in ((0.099, True), (0.101, False)):
        check = compare({"out": exact["out"] + torch.tensor([0.0, error])}, exact, rough)
        assert check.errors["out"] == pytest.approx(error / 5)
        assert check.budgets["out"] == pytest.approx(0.02 + 1e-5)
        assert check.passed is passed
    assert not compare({"out": exact["out"] * float("nan")}, exact, rough).passed
    assert compare({"out": exact["out"]}, exact, exact).passed
    assert compare({"out": exact["out"] * 1.0005}, exact, exact, slack=1e-3).passed
    assert Check({"a": 0.1, "b": 0.1}, {"a": 1.0, "b": 0.01}).worst == "b"


def test_every_row_has_a_name_and_rows_are_chosen_by_it() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert select() == list(ROWS)
    assert select(quick=True) == list(BARS) and all(row.bar is not None for row in BARS)
    assert [row.name for row in select(["linear-block", "conv-train"])] == [
        *(f"linear-block-{size}" for size in (1, 2, 3, 8, 16, 32)), "conv-train",
    ]
    with pytest.raises(UsageError, match="unknown row 'linear-tra'; choose among linear-train, linear-forward"):
        select(["linear-tra"])


def test_the_bars() -> None:
    bars = {row.name: (row.bar, row.aim, row.at_least) for row in BARS}
    assert bars["linear-train"] == (2.3, 1.3, False)
    assert bars["linear-forward"] == (2.2, 1.3, False)
    assert bars["linear-memory"] == (2.5, 1.5, False)
    assert bars["linear-simple-time"] == (15, None, True)
    assert bars["linear-simple-memory"] == (10, None, True)
    assert bars["conv-train"] == (1.5, 0.9, False)
    assert bars["decode-step"] == (2.5, 1.5, False)
    assert bars["linear-long"] == (1.3, None, False)
    assert bars["linear-packed"] == (1.1, 1.0, False)
    assert {bars[f"linear-block-{size}"] for size in (1, 2, 3, 8, 16, 32)} == {(1.3, 1.1, False)}
    assert bars["softmax-128"] == bars["softmax-256"] == (1.3, None, False)


def test_the_table_shows_every_line() -> None:
    rows = [
        made_row("good", returns(1.0), bar=2.0, aim=1.5), made_row("bad", returns(3.0), bar=2.0),
        made_row("broken", raises(RuntimeError("why")), bar=2.0),
    ]
    lines = run_rows(rows, small_session(), time_limit=1e6)
    assert report.cells(lines[0]) == ["row good", "1.00", "≤ 2", "≤ 1.5", "aim reached", "part_ms 1"]
    assert report.cells(lines[1])[4] == "MISSED"
    assert report.cells(lines[2])[4:] == ["FAILED", "RuntimeError: why"]
    assert report.table(lines).row_count == 3
    assert "row bad: 3.00 (≤ 2) MISSED part_ms 3" in report.text(lines[1])


def test_settings_name_the_library_of_the_baselines(tmp_path: Path) -> None:
    """Rows beside another release of it, or without it, are of something else."""
    from flarec.bench.serving.models import ServingSession
    from flarec.bench.training.session import TrainingSession

    folder = tmp_path / f"{baselines.PACKAGE.replace('-', '_')}-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {baselines.PACKAGE}\nVersion: 9.9\n")
    assert baselines.release(None) is None and baselines.release(tmp_path) == "9.9"
    for made in (ServingSession(torch.device("cpu"), "tiny"), TrainingSession(torch.device("cpu"), "tiny")):
        assert made.settings["library"] is None
        made.library = tmp_path
        assert made.settings["library"] == "9.9"
