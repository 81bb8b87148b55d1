"""`flarec families`: the record covers exactly the families that are tried, and nothing that fails looks passed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from flarec.cli import main
from flarec.conformance import (
    STAGES,
    Outcome,
    SuiteRun,
    Trial,
    inputs,
    is_hybrid,
    load_runs,
    markdown,
    merge_run,
    names,
    rows,
    save_runs,
    stages,
    try_family,
)
from flarec.errors import UsageError
from flarec.frontend import families as adapters
from flarec.frontend import tiny

README = Path(__file__).parents[2] / "README.md"


def trial(family: str, failing: str | None = None) -> Trial:
    outcomes = {stage: Outcome(stage != failing, 1.0, f"about {stage}") for stage in STAGES}
    return Trial(family, {"softmax_attention": 2}, 4, 64, 250_000, outcomes)


def run_of(
    version: str, *trials: Trial, absent: tuple[str, ...] = (), commits: dict[str, str] | None = None
) -> SuiteRun:
    found = {"transformers": version, "torch": "2.13.0"}
    return SuiteRun(found, "a CPU", {t.family: t for t in trials}, absent, commits)


def flarec(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["families", *map(str, arguments)])


def test_what_is_tried_is_what_the_adapter_table_has() -> None:
    assert names() == [*adapters.FAMILIES, *adapters.PLAIN]
    assert len(set(names())) == len(names())
    assert [family for family in names() if is_hybrid(family)] == list(adapters.FAMILIES)
    assert set(names()) <= set(tiny.TINY)


def test_the_recorded_runs_cover_every_family_and_nothing_else() -> None:
    runs = load_runs()
    versions = [run.transformers for run in runs]
    assert versions and len(set(versions)) == len(versions)
    for run in runs:
        assert sorted([*run.trials, *run.absent]) == sorted(names()), run.transformers
        assert run.versions.keys() >= {"torch", "transformers", "flarec", "python"}
        for family, its in run.trials.items():
            assert list(its.stages) == list(STAGES), family
            assert its.parameters > 0 and its.layers > 0
    assert not runs[0].absent, "the newest transformers has every family"


def test_every_recorded_stage_passes() -> None:
    failed = {
        (run.transformers, family, stage): outcome.detail
        for run in load_runs()
        for family, its in run.trials.items()
        for stage, outcome in its.stages.items()
        if not outcome.passed
    }
    assert failed == {}


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_stage_is_not_shown_as_passing(stage: str) -> None:
    """Whichever version it fails under."""
    good, bad = run_of("5.30.0", trial("bamba")), run_of("5.20.0", trial("bamba", stage))
    for runs in ([bad], [good, bad], [bad, good]):
        row = next(row for row in rows(runs) if row.family == "bamba")
        assert stage not in row.passed and row.failed == {stage: f"about {stage}"}
        assert row.stages == f"{len(STAGES) - 1} of {len(STAGES)}; not {stage}"
        assert row.stages in markdown([row])


def test_a_stage_that_was_not_run_does_not_pass() -> None:
    its = trial("bamba")
    cut = dataclasses.replace(its, stages={name: its.stages[name] for name in list(STAGES)[:-1]})
    row = next(row for row in rows([run_of("5.30.0", cut)]) if row.family == "bamba")
    assert row.failed == {"verify": "not run"} and row.stages.endswith("not verify")
    never = next(row for row in rows([run_of("5.30.0", cut)]) if row.family == "jamba")
    assert never.stages == "not tried" and never.versions == () and never.passed == ()


def test_rows_name_all_versions() -> None:
    runs = [run_of("5.30.0", trial("bamba")), run_of("5.20.0", trial("bamba"))]
    row = next(row for row in rows(runs) if row.family == "bamba")
    assert row.stages == f"all {len(STAGES)}"
    assert row.versions == ("5.30.0", "5.20.0")
    assert row.mixers == adapters.FAMILIES["bamba"].mixers
    assert row.config == "4 layers, width 64, 0.2 M"


def test_a_new_run_replaces_what_was_known_of_its_families() -> None:
    commits = {"bamba": "a", "jamba": "a"}
    old = run_of("5.20.0", trial("bamba", "train"), trial("jamba"), absent=("lfm2",), commits=commits)
    other = run_of("5.9.1", trial("bamba"))
    new = run_of("5.20.0", trial("bamba"), trial("lfm2"), commits={"bamba": "b"})
    merged = merge_run([old, other], new)
    assert [run.transformers for run in merged] == ["5.20.0", "5.9.1"], "newest first, as numbers"
    assert merged[0].trials["bamba"].passed and set(merged[0].trials) == {"bamba", "jamba", "lfm2"}
    assert merged[0].absent == () and merged[0].commits == {"bamba": "b", "jamba": "a"}
    assert merged[1] == other


def test_results_survive_the_disk(tmp_path: Path) -> None:
    runs = [run_of("5.20.0", trial("bamba", "train"), absent=("lfm2",), commits={"bamba": "a"})]
    save_runs(runs, tmp_path / "results.json")
    assert load_runs(tmp_path / "results.json") == runs
    with pytest.raises(UsageError, match="cannot be written"):
        save_runs(runs, tmp_path / "no" / "results.json")
    (tmp_path / "other.json").write_text('{"runs": [{}]}')
    with pytest.raises(UsageError, match=r"other.json holds no results .* name another file"):
        load_runs(tmp_path / "other.json")


def test_one_family_live(tmp_path: Path) -> None:
    """The whole road, as the command goes it, merged into a file."""
    out = tmp_path / "results.json"
    save_runs([run_of("5.9.1", trial("jamba"))], out)
    done = flarec("lfm2", "--run", "--json", "--write", out, "--commit", "abc")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["family"], row["passed"]) for row in found["families"]] == [("lfm2", list(STAGES))]
    assert "all stages pass" in done.stderr
    runs = load_runs(out)
    assert [set(run.trials) for run in runs] == [{"lfm2"}, {"jamba"}] and runs[0].commits == {"lfm2": "abc"}
    its = runs[0].trials["lfm2"]
    assert its.ops == {"short_conv": 1, "softmax_attention": 1} and its.seconds > 0


def test_a_stage_that_breaks_is_a_sentence_and_ends_its_followers(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(road: stages.Road) -> str:
        raise RuntimeError("first line\nsecond line")

    def wrong(road: stages.Road) -> str:
        raise stages.StageError("it is wrong")

    monkeypatch.setitem(stages.STAGES, "passes", breaks)
    found = try_family("bamba").stages
    assert found["capture"].passed and not found["passes"].passed
    assert found["passes"].detail == "RuntimeError: first line"
    assert {name: found[name].detail for name in ("train", "causal", "verify")} == {
        "train": "not reached: passes failed",
        "causal": "not reached: checkpoint failed",
        "verify": "not reached: checkpoint failed",
    }
    assert not any(outcome.passed for name, outcome in found.items() if name != "capture")
    monkeypatch.setitem(stages.STAGES, "capture", wrong)
    done = flarec("bamba", "--run")
    assert done.exit_code == 1
    assert "bamba, capture: it is wrong" in done.stdout and f"0 of {len(STAGES)}" in done.stdout


def test_stages_notice_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check fails where it should: on a model that is not the captured one, a training that does not learn, and
    a decoder that chooses other tokens."""
    road = stages.Road("lfm2", tmp_path)
    stages.STAGES["capture"](road)
    stages.STAGES["passes"](road)
    slow = inputs.recipe().override(["optimizer.lr=1e-9"])
    monkeypatch.setattr(inputs, "recipe", lambda: slow)
    with pytest.raises(stages.StageError, match=r"AR loss .* in 10 steps"):
        stages.STAGES["train"](road)
    stages.STAGES["checkpoint"](road)
    stages.STAGES["causal"](road)
    road.causal[0.0][1] = [token + 1 for token in road.causal[0.0][1]]
    with pytest.raises(stages.StageError, match="other tokens than causal"):
        stages.STAGES["ar_trust"](road)
    with torch.no_grad():
        road.model.lm_head.weight.neg_()
    for stage in ("causal", "diffusion_trust"):
        with pytest.raises(stages.StageError, match="where transformers chooses"):
            stages.STAGES[stage](road)


def test_the_table_is_printed_from_the_record() -> None:
    table = rows(load_runs())
    text = flarec().stdout
    shown = [line.split()[0] for line in text.splitlines() if line.split() and line.split()[0] in names()]
    assert [name for name in shown if name in names()] == names()
    assert flarec("--markdown").stdout.strip() == markdown(table)
    found = json.loads(flarec("bamba", "--json").stdout)
    assert [row["family"] for row in found["families"]] == ["bamba"]
    assert all(set(run["trials"]) == {"bamba"} for run in found["runs"])


def test_the_readme_carries_the_same_table() -> None:
    """`flarec families --markdown` prints it."""
    found = re.search(r"^\| family \| mixers \| ops \|.*?(?=\n\n|\Z)", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, "README.md has no table of families; paste what `flarec families --markdown` prints"
    assert found[0].strip() == markdown(rows(load_runs()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "unknown family 'nonsense'; known: qwen3_5_text"),
        (["--json", "--markdown"], "choose one"),
        (["--write", "x.json"], "add --run"),
        (["--commit", "x"], "add --run"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    done = flarec(*arguments)
    assert done.exit_code == 2 and words in done.stderr and done.stdout == ""


def test_a_family_that_transformers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "available", lambda family: False)
    done = flarec("bamba", "--run")
    assert done.exit_code == 2 and "has none of bamba" in done.stderr
    assert "not in this transformers" in done.stderr


def test_families_that_are_refused_are_listed_with_the_reason() -> None:
    text = CliRunner().invoke(main, ["families"]).stdout
    _, _, refused = text.partition("known, and refused:")
    table = json.loads(CliRunner().invoke(main, ["families", "--json"]).stdout)
    assert table["refused"] == adapters.REFUSED
    assert all(f"{family}: {reason}" in refused for family, reason in adapters.REFUSED.items())
    assert "known, and refused" not in CliRunner().invoke(main, ["families", "bamba"]).stdout
