"""`flarec bench train`: what its rows make of what was measured, parts that fail, and real steps of a tiny shape."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from flarec.bench.measure import NotMeasured
from flarec.bench.session import Line
from flarec.bench.training import part
from flarec.bench.training.profile import REST, kind_of, length, shares, union
from flarec.bench.training.rows import EXTRA, ROWS, parts_of, select
from flarec.bench.training.run import run_training
from flarec.bench.training.session import TrainingSession, chosen, read
from flarec.bench.training.shapes import BEHIND, MICRO, RECIPES
from flarec.cli import main
from flarec.errors import UsageError

CLEAN, TFLOPS = 16384, 790.0


def result(*tries: tuple[int, float, float], processed: int = CLEAN, heads: int = CLEAN) -> dict[str, Any]:
    """(micro rows, seconds, GiB)"""
    listed = [
        {"micro_rows": micro, "seconds": seconds, "spread": 0.0, "first_step_seconds": 9.0, "peak_gib": peak,
         "shares": {"idle": 0.03, "products": 0.6}, "processed": processed, "head_rows": heads}
        for micro, seconds, peak in tries
    ]
    return {"tries": listed, "parameters": 1_882_000_000, "head": 508_559_360}


def session(results: dict[str, dict[str, Any]]) -> TrainingSession:
    """A session that has measured these parts, and has no time for others."""
    made = TrainingSession(torch.device("cpu"), limit=0.0)
    made.results |= results
    made._measured["ceilings"] = {"matmul_tflop_per_s": TFLOPS}
    return made


def lines(made: TrainingSession, *only: str, out: Path | None = None) -> dict[str, Line]:
    found = run_training(select(only), made, out=out, say=lambda text: None)
    return {line.name: line for line in found}


def value(line: Line) -> float:
    assert line.value is not None, line.message
    return line.value


def test_spans_that_overlap_count_once() -> None:
    assert union([(5, 9), (0, 2), (6, 7), (2, 3), (8, 11)]) == [(0, 3), (5, 11)]
    assert (length(union([(0, 4), (1, 2)])), length(union([]))) == (4, 0)


def test_kernels_are_told_apart_by_their_names() -> None:
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": "products", "triton_red_fused_add_mul_3": "compiled regions",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor>": "optimizer",
        "void at::native::vectorized_elementwise_kernel<4, ...>": "single operations", "Memcpy DtoD": "copies",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication", "clean_states_kernel": REST,
    }
    assert {name: kind_of(name) for name in names} == names
    found = shares([("gemm", (0, 40)), ("triton_poi_1", (50, 80)), ("gemm", (80, 100))])
    assert found == pytest.approx({"idle": 0.1, "products": 0.6, "compiled regions": 0.3}) and shares([]) == {}


def test_the_fastest_that_fits_counts() -> None:
    found = result((4, 0.9, 90.0), (2, 1.0, 54.0), (1, 1.2, 50.0))
    assert [chosen(found, most)["micro_rows"] for most in (55.0, None, 10.0)] == [2, 4, 4]


def test_rows_and_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that counts has its speed, memory and prediction in all rows; the fastest has a row of its own."""
    monkeypatch.setattr(TrainingSession, "seconds_of", lambda self, prediction: 1.1)
    found = lines(session({
        "stock": result((8, 0.644, 114.0)),
        "stock-compiled": result((8, 0.6, 110.0)),
        "ar": result((8, 0.45, 80.0)),
        "flare": result((4, 1.0, 100.0), (1, 1.2, 54.0), processed=3 * CLEAN, heads=2 * CLEAN),
        "flare-recompute": result((4, 1.1, 40.0), processed=3 * CLEAN, heads=2 * CLEAN),
        "adapter": result((8, 0.5, 25.0)),
        "ar-recompute": result((8, 0.6, 33.6)),
        "adapter-recompute": result((8, 0.9, 11.8)),
        "first-step": {"tries": [{"micro_rows": 1, "seconds": 63.0, "first_step_at": 1090.0}], "launched": 1000.0},
        "doctor": {"tries": [{"micro_rows": rows, "seconds": None, "work": [], "peak_gib": 30.0 * rows}
                             for rows in (1, 2, 4)]},
        "flare-4B": {"tries": [{"micro_rows": 4, "error": "out of memory: no"}]},
    }))
    assert [row.name for row in ROWS] == [*found] and found["stock-step"].value == 1e6 * 0.644 / CLEAN
    assert found["ar-to-stock"].value == 0.45 / 0.6 and found["ar-to-stock"].verdict == "met"
    assert found["ar-to-stock"].values["stock seconds"] == 0.644, "the faster one counts, both are told"
    assert found["flare-to-stock"].value == 1.1 / 0.6 and found["flare-to-stock"].verdict == "met"
    assert found["flare-fastest-to-stock"].value == 1.0 / 0.6
    assert found["flare-peak"].value == 40.0 and found["flare-idle"].verdict == "met"
    assert found["flare-peak"].values["GiB of 4 rows"] == 100.0 and found["flare-step"].values["seconds of 4 rows"] == 1
    assert found["flare-peak"].values["GiB of 4 rows, computed again"] == 40.0
    assert value(found["flare-step"]) == 1e6 * 1.2 / CLEAN, "of the part alone"
    assert found["flare-to-stock"].notes == (
        "of 3 runs the fastest within 55 GiB: 4 rows, computed again, 1.100 s, 40.0 GiB; the fastest of all: 4 rows, "
        "1.000 s, 100.0 GiB",
    )
    body = 1_882_000_000 - 508_559_360
    mfu = 6 * (body * 3 + 508_559_360 * 2) * CLEAN / 1.1 / (TFLOPS * 1e12)
    assert found["flare-mfu"].value == pytest.approx(mfu)
    assert found["adapter-to-ar"].value == 0.5 / 0.45 and found["adapter-memory"].value == 25.0 / 80.0
    assert value(found["adapter-recompute-memory"]) == pytest.approx(11.8 / 33.6)
    assert value(found["first-step-cold"]) == 90.0 and found["first-step-cold"].verdict == "met"
    assert found["first-step-warm"].message == "nothing was compiled ahead"
    assert value(found["doctor-time"]) == pytest.approx(1.2 / 1.1) and found["doctor-time"].verdict == "met"
    assert value(found["doctor-peak"]) == pytest.approx(54 / 30) and found["doctor-peak"].verdict == "missed"
    assert found["doctor-peak"].values["predicted of 4 rows"] == 120.0
    for name, why in (("draft-step", "time limit"), ("draft-to-stock", "time limit"), ("flare-4B-peak", "no")):
        assert found[name].status == "not measured" and why in str(found[name].message), name


def test_without_a_stock_step_ratios_say_why() -> None:
    found = lines(session({"stock": {"error": "CUDA error"}, "ar": result((8, 0.5, 80.0))}), "ar-to-stock")
    assert found["ar-to-stock"].message == "CUDA error"
    compiled = session({"stock": {"error": "CUDA error"}, "stock-compiled": result((8, 1.0, 90.0)),
                        "ar": result((8, 0.5, 80.0))})
    assert lines(compiled, "ar-to-stock")["ar-to-stock"].value == 0.5


def test_rows_are_named_and_every_part_is_known() -> None:
    assert {*RECIPES} | {"stock", "stock-compiled", "doctor"} == {*MICRO} and {*BEHIND} < {*MICRO}
    every = parts_of(select(()))
    assert {*every} | {"adapter-9B"} == {*MICRO}
    assert all(every.index(first) < every.index(part) for part, first in BEHIND.items())
    assert parts_of(select(["flare-to-stock"])) == ["stock", "flare", "flare-recompute"]
    assert parts_of(select(["first-step-cold"])) == ["first-step"]
    with pytest.raises(UsageError, match="no row is called nonsense"):
        select(["flare", "nonsense"])
    shown = CliRunner().invoke(main, ["bench", "train", "--list"])
    assert [line.split()[0] for line in shown.stdout.splitlines()] == [row.name for row in (*ROWS, *EXTRA)]
    wrong = CliRunner().invoke(main, ["bench", "train", "--library", str(Path(__file__).parent)])
    assert wrong.exit_code == 2 and "has no package fla" in wrong.stderr


def in_process(monkeypatch: pytest.MonkeyPatch, *, late: bool = False) -> None:
    """Parts run in this process: a second one imports torch for seconds. late: each ends by its time limit."""

    def run(command: list[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        assert timeout > 0 and options["env"]["FLAREC_CACHE_DIR"]
        try:
            part.main(command[command.index("-m") + 2 :])
        except RuntimeError as error:
            return subprocess.CompletedProcess(command, 1, "", f"Traceback\nRuntimeError: {error}")
        if late:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def tiny(**options: Any) -> TrainingSession:
    return TrainingSession(torch.device("cpu"), "tiny", rows=2, length=32, quick=True, limit=1e6, **options)


def test_a_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Real steps of stock and of a recipe; the file is that of the other benchmarks."""
    in_process(monkeypatch)
    out = tmp_path / "train.json"
    found = lines(tiny(), "stock-step", "draft", out=out)
    assert [*found] == ["stock-step", "draft-step", "draft-to-stock"]
    assert all(line.status == "measured" for line in found.values())
    ratio = value(found["draft-step"]) / value(found["stock-step"])
    assert value(found["draft-to-stock"]) == pytest.approx(ratio)
    assert found["draft-step"].values["loss"] == pytest.approx(5.77, abs=0.1), "of 320 tokens, nothing learned yet"
    record = json.loads(out.read_text())
    assert record.keys() >= {"device", "versions", "command", "commit", "seconds", "ceilings", "rows"}
    assert record["rows"] == json.loads(json.dumps([line.to_dict() for line in found.values()]))


def test_what_a_part_has_when_its_time_is_over_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch, late=True)
    found = lines(tiny(micro=[1]), "stock-step")["stock-step"]
    assert found.notes[0].startswith("without flash-linear-attention")
    assert found.status == "measured" and found.values["micro_rows"] == 1 and "took more than 120 s" in found.notes[1]


@pytest.mark.parametrize(
    ("error", "why"), [(RuntimeError("no such kernel"), "no such kernel"), (torch.OutOfMemoryError("no"), "out of mem")]
)
def test_a_part_that_fails_is_told_and_not_run_again(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fails(step: Callable[[], object], plan: Any) -> dict[str, Any]:
        calls.append(1)
        raise error

    in_process(monkeypatch)
    monkeypatch.setattr(part, "measured", fails)
    made = tiny(micro=[2, 1])
    for _ in range(2):
        with pytest.raises(NotMeasured, match=why):
            made.part("stock")
    assert len(calls) == (2 if isinstance(error, torch.OutOfMemoryError) else 1), "fewer rows where memory was short"


def test_rows_are_tried_until_they_fit_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny()
    for name, every, expected in (("stock", False, [2]), ("flare", True, [1, 2])):
        plan = made.plan(name)
        assert plan.every == every and plan.micro == ((2,) if name == "stock" else (1, 2))
        found: list[list[dict[str, Any]]] = []
        plan = replace(plan, micro=(*expected, 1)) if name == "stock" else plan
        part.tries(plan, lambda rows: {"seconds": 1.0}, found.append)
        assert [one["micro_rows"] for one in found[-1]] == expected


def test_parts_of_one_process_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers computed again: with the model and the program of the part that keeps all, by a process of its own."""
    in_process(monkeypatch)
    made, started, run = tiny(), list[list[str]](), subprocess.run

    def noted(command: list[str], **options: Any) -> Any:
        started.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", noted)
    found = lines(made, "ar-step", "ar-recompute-step")
    assert len(started) == 1 and all(line.status == "measured" for line in found.values())
    assert found["ar-step"].values["loss"] == pytest.approx(found["ar-recompute-step"].values["loss"], rel=1e-3)
    assert 0 < made.results["ar"]["tries"][0]["first_step_at"] - made.results["ar"]["launched"] < 600


def test_a_process_that_ends_early_leaves_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"ar": result((8, 0.5, 80.0))}))
    found = read(path, ["ar", "ar-recompute"], "it took more than 160 s")
    assert "error" not in found["ar"] and found["ar-recompute"] == {"error": "it took more than 160 s"}
    assert read(tmp_path / "none", ["ar", "ar-recompute"], "no") == {"ar": {"error": "no"}}


def test_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few layers of every part, and beside them a step with caches of its own, and the doctor."""
    started: list[tuple[dict[str, Any], dict[str, str]]] = []

    class Started:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
            started.append((json.loads(command[4])[0], env))
            if started[-1][0]["part"] == "first-step":
                found = {"tries": [{"micro_rows": 1, "seconds": 5.0, "first_step_at": 1007.0}], "launched": 1000.0}
                Path(command[5]).write_text(json.dumps({"first-step": found}))

        def poll(self) -> int:
            return 0

        def communicate(self, timeout: float | None = None) -> tuple[str, str]:
            return "", ""

        def kill(self) -> None: ...

    monkeypatch.setattr(subprocess, "Popen", Started)
    made = tiny()
    with made.prepared(["first-step", "flare", "ar-recompute", "doctor"]) as ended:
        assert ended == dict.fromkeys(("ar-recompute 2", "flare 1", "flare 2", "first-step"), "done")
        assert lines(made, "first-step-cold")["first-step-cold"].value == 7.0 and made.is_warm
    assert [(plan["part"], plan["micro"], plan["ahead"]) for plan, _ in started] == [
        ("doctor", [1, 2], False), ("first-step", [1], False), ("ar-recompute", [2], True), ("flare", [1], True),
        ("flare", [2], True),
    ]
    own = {env.get("TRITON_CACHE_DIR") for plan, env in started if plan["part"] == "first-step"}
    assert own.isdisjoint(env.get("TRITON_CACHE_DIR") for plan, env in started if plan["part"] != "first-step")
    kept: list[dict[str, Any]] = []
    part.ours([replace(made.plan("flare"), micro=(1,), ahead=True)], lambda name, found: kept.append(found))
    assert kept[-1]["tries"][0]["seconds"] > 0, "a few layers of the shape"
