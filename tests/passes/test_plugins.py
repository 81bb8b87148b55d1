"""Passes of others: how they are loaded, where they stand, what they may not do, what a checkpoint keeps of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import flarec.plugin
from flarec.api import load
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.lowered import pipeline_of
from flarec.checkpoint.manifest import NAME, Manifest
from flarec.cli import main
from flarec.errors import CheckpointError, PassError, PropertyError, UsageError
from flarec.inspect.pipeline import grid, pipeline_as_svg, pipeline_as_text
from flarec.ir.pipeline import check_order, names_of, pipeline_text
from flarec.passes import GIVEN, PASSES, PIPELINES, YOUNG, lower, needs, passes_by_name, pipeline, placed
from tests.checkpoints import converted
from tests.models import captured

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin" / "cap_logits.py"
HEAD = """
from dataclasses import dataclass
from typing import ClassVar
from torch import fx
from flarec.plugin import Claims, Pass, Program, Property, PropertyError, find_head

"""
PASS = """
@dataclass(frozen=True)
class {cls}(Pass):
    name: ClassVar[str] = "{name}"
    requires: ClassVar[Claims] = frozenset({requires})
    provides: ClassVar[Claims] = frozenset({provides})
    invalidates: ClassVar[Claims] = frozenset({invalidates})
    may_be_empty: ClassVar[bool] = True
    def apply(self, program: Program) -> list[fx.Node]:
        return []

"""


def plugin(folder: Path, *passes: dict[str, object], before: str = "", name: str = "mine") -> Path:
    """A plugin file with passes that do nothing."""
    file = folder / f"{name}.py"
    rows = [
        {"cls": f"P{i}", "requires": "()", "provides": "()", "invalidates": "()"} | row for i, row in enumerate(passes)
    ]
    file.write_text(HEAD + before + "".join(PASS.format(**row) for row in rows))
    return file


def names(target: str, *foreign: str, plugins: Path) -> list[str]:
    return [step.name for step in pipeline(target, foreign=foreign, plugins=[plugins])]


@pytest.mark.parametrize("target", sorted(PIPELINES))
def test_a_pass_stands_at_the_latest_place_before_the_kernels_are_chosen(target: str, tmp_path: Path) -> None:
    file = plugin(tmp_path, {"name": "late"}, {"name": "early", "invalidates": '{"canonical"}'})
    own = [step.name for step in pipeline(target)]
    assert names(target, "late", plugins=file) == [*own[:-1], "late", own[-1]]
    assert names(target, "late@after:embed-mask", plugins=file).index("late") == own.index("embed-mask") + 1
    steps = pipeline(target, foreign=["late()"], plugins=[file])
    assert placed(steps) == [f"pass late() stands after {own[-2]}"] and not placed(pipeline(target))


def test_a_pass_that_takes_something_away_stands_where_nothing_needs_it_any_more(tmp_path: Path) -> None:
    file = plugin(
        tmp_path, {"name": "breaks", "invalidates": '{"masked"}'}, {"name": "mends", "provides": '{"masked"}'}
    )
    order = names("train", "breaks", plugins=file)
    assert order.index("breaks") + 1 == order.index("rewrite-masks"), "behind it, nothing would provide 'masked' again"
    with pytest.raises(PassError, match=r"the property 'masked' does not hold: pass 'breaks' invalidates it"):
        pipeline("train", foreign=["breaks@after:lower-mixers"], plugins=[file])
    order = names("train", "breaks@after:rewrite-masks", "mends", plugins=file)
    assert order.index("rewrite-masks") < order.index("breaks") < order.index("mends") < order.index("lower-mixers")


def test_one_pass_may_need_what_another_one_provides(tmp_path: Path) -> None:
    own = "TIDY = Property('tidy', lambda program: None)\n"
    file = plugin(
        tmp_path, {"name": "user", "requires": "{TIDY}"}, {"name": "giver", "provides": "{TIDY}"}, before=own
    )
    order = names("decode", "user", "giver", plugins=file)
    assert order.index("giver") < order.index("user")
    with pytest.raises(
        PassError, match=r"'user' has no place before lower-mixers: .* requires 'tidy': no pass provides"
    ):
        pipeline("decode", foreign=["user"], plugins=[file])


def test_a_property_that_is_not_true_stops_the_pipeline(tmp_path: Path) -> None:
    false = "def check(program):\n    raise PropertyError('nothing is so')\nFALSE = Property('so', check)\n"
    file = plugin(tmp_path, {"name": "claims", "provides": "{FALSE}"}, before=false)
    steps = pipeline("train", foreign=["claims"], plugins=[file])
    with pytest.raises(PropertyError, match=r"property 'so' \(claimed by claims\(\)\) does not hold: nothing is so"):
        lower(captured("lfm2"), "train", steps=steps)


def test_a_property_of_the_package_cannot_get_another_meaning(tmp_path: Path) -> None:
    other = "MASKED = Property('masked', lambda program: None)\n"
    file = plugin(tmp_path, {"name": "redefines", "provides": "{MASKED}"}, before=other)
    steps = pipeline("train", foreign=["redefines"], plugins=[file])
    with pytest.raises(PassError, match="brings a property 'masked', a name that stands for another one already"):
        lower(captured("lfm2"), "train", steps=steps)


def test_a_name_without_a_checker_is_no_property(tmp_path: Path) -> None:
    file = plugin(tmp_path, {"name": "claims", "provides": '{"shiny"}'})
    steps = pipeline("train", foreign=["claims"], plugins=[file])
    with pytest.raises(PropertyError, match=r"'shiny' has no checker"):
        lower(captured("lfm2"), "train", steps=steps)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def (", r"cannot be loaded: SyntaxError: invalid syntax"),
        ("import flarec\n1 / 0\n", r"cannot be loaded: ZeroDivisionError: division by zero \(line 2 of bad.py\)"),
        ("x = 1\n", "defines no pass"),
        (
            HEAD + "class P(Pass):\n    name = 'p'\n    def apply(self, program): return []\n",
            "is no frozen dataclass with",
        ),
        (HEAD + "PASSES = [int]\n", "in PASSES is no pass"),
        (
            HEAD + PASS.format(cls="P", name="canonicalize", requires="", provides="", invalidates=""),
            "flarec uses already",
        ),
    ],
)
def test_bad_plugins_are_one_sentence(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UsageError, match=reason) as caught:
        passes_by_name([file])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.py", "folder", "text.txt"])
def test_what_is_no_python_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("x = 1\n")
    with pytest.raises(UsageError, match="is no Python file"):
        passes_by_name([tmp_path / name])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nope(x=1)", "unknown pass 'nope'"),
        ("late(depth=3)", "cannot be read: .*depth"),
        ("late(3)", "options have names"),
        ("late(", "cannot be read"),
        ("narrow-head()", "'narrow-head' is flarec's own"),
        ("adapt-noisy-stream(rank=2)", "'adapt-noisy-stream' is flarec's own"),
        ("late@after:nope", "'late' cannot stand after 'nope': the pipeline has canonicalize, "),
    ],
)
def test_bad_requests_are_one_sentence(text: str, reason: str, tmp_path: Path) -> None:
    file = plugin(tmp_path, {"name": "late"})
    with pytest.raises((UsageError, PassError), match=reason):
        pipeline("train", foreign=[text], plugins=[file])


def test_installed_plugins_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    file = plugin(tmp_path, {"name": "installed"})
    spec = importlib.util.spec_from_file_location("an_installed_plugin", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "an_installed_plugin", module)
    spec.loader.exec_module(module)
    entry = SimpleNamespace(name="one", dist=SimpleNamespace(name="their-package", version="1.2"), load=lambda: module)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == "flarec.plugins" else [])
    assert passes_by_name()["installed"].origin == "their-package 1.2"
    assert "installed" in [step.name for step in pipeline("train", foreign=["installed"])]

    def broken() -> None:
        raise ImportError("no such thing")

    entry.load = broken
    with pytest.raises(UsageError, match=r"plugin their-package 1\.2 cannot be loaded: ImportError: no such thing"):
        passes_by_name()
    assert pipeline("train"), "a broken plugin that nobody asks for is in nobody's way"


def test_the_needs_of_a_target_are_what_its_own_pipeline_gives() -> None:
    for target, steps in PIPELINES.items():
        holds = check_order(steps, GIVEN)
        assert needs(target) == holds - YOUNG and check_order(PIPELINES["train"], GIVEN) > YOUNG
        lost = {name for step in steps for name in names_of(step.invalidates)}
        assert holds == GIVEN.union(*(names_of(step.provides) for step in steps)) - lost


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose decode pipeline caps its logits."""
    _, path = converted(tmp_path_factory.mktemp("plugin"), "lfm2")
    manifest = Manifest.read(path)
    assert manifest is not None
    steps = {t: pipeline(t, foreign=["cap-logits(limit=2.0)"], plugins=[EXAMPLE]) for t in PIPELINES}
    manifest = replace(
        manifest, pipelines={t: pipeline_text(s) for t, s in steps.items()}, plugins={"cap-logits": EXAMPLE.name}
    )
    (path / NAME).write_text(manifest.to_json())
    return path


def test_the_manifest_decides_what_runs(checkpoint: Path) -> None:
    manifest = open_checkpoint(checkpoint).manifest
    assert manifest is not None
    for kernels in ("torch", "reference"):
        steps = pipeline_of(manifest, "decode", kernels=kernels, plugins=[EXAMPLE])
        text = pipeline_text(steps)
        assert "cap-logits(limit=2.0)" in text and ("reference" in text) == (kernels == "reference")
    model = load(checkpoint, plugins=[EXAMPLE])
    assert "logits-capped" in model.decode_program.properties
    assert model.generate("w3 w4", max_new_tokens=3).new_tokens == 3


def test_a_checkpoint_without_its_plugin_says_which_one(checkpoint: Path) -> None:
    reason = r"made with the pass 'cap-logits' of plugin cap_logits.py, which is not installed; .*--plugin"
    with pytest.raises(CheckpointError, match=reason):
        load(checkpoint)
    run = CliRunner().invoke(main, ["generate", str(checkpoint), "w3"])
    assert run.exit_code != 0 and "cap_logits.py" in run.output and "Traceback" not in run.output


def test_a_checkpoint_without_plugins_says_nothing_about_them(tmp_path: Path) -> None:
    _, path = converted(tmp_path, "lfm2")
    assert "plugins" not in json.loads((path / NAME).read_text())


def test_a_pipeline_that_leaves_something_out_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    table = json.loads((copy / NAME).read_text())
    table["pipelines"]["decode"] = "canonicalize()\nduplicate-streams()"
    del table["sha256"]
    (copy / NAME).write_text(json.dumps({**table, "format_version": 1}))
    with pytest.raises(PassError, match="after the pipeline 'decode' the property 'cached' does not hold"):
        load(copy)


@pytest.mark.parametrize("command", ["inspect", "generate", "eval", "verify", "convert"])
def test_every_command_takes_plugins(command: str) -> None:
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert "--plugin" in text and "--pass" in text


def test_inspect_shows_the_pass_and_the_grid(tmp_path: Path) -> None:
    source, _ = converted(tmp_path, "lfm2")
    arguments = ["inspect", str(source), "--plugin", str(EXAMPLE), "--pass", "cap-logits(limit=4.0)"]
    assert "cap-logits(limit=4.0)" in CliRunner().invoke(main, arguments).output
    text = CliRunner().invoke(main, [*arguments, "--pipeline", "--target", "decode"]).output
    assert "cap-logits(limit=4.0)" in text and "logits-capped" in text and "(plugin)" in text
    table = json.loads(CliRunner().invoke(main, [*arguments, "--pipeline", "--format", "json"]).output)
    assert [row["pass"] for row in table if not row["built_in"]] == ["cap-logits(limit=4.0)"]
    assert CliRunner().invoke(main, [*arguments, "--pipeline", "--format", "svg"]).output.startswith("<svg")


def test_the_grid_marks_what_a_pass_does() -> None:
    steps = pipeline("decode")
    columns, rows = grid(steps)
    for step, marks in zip(steps, rows, strict=True):
        for name, mark in zip(columns, marks, strict=True):
            assert (mark in "+*") == (name in names_of(step.provides)), (step.name, name)
            assert name not in names_of(step.requires) or mark in "o*", (step.name, name)
    assert all(step.name in pipeline_as_text(steps, "decode") for step in steps)
    assert all(name in pipeline_as_svg(steps, "decode") for name in columns)


def test_passes_are_listed_with_where_they_come_from() -> None:
    table = json.loads(CliRunner().invoke(main, ["passes", "--json", "--plugin", str(EXAMPLE)]).output)
    rows = {row["name"]: row for row in table["passes"]}
    assert {*PASSES, "cap-logits"} == set(rows)
    assert rows["cap-logits"]["from"] == "cap_logits.py" and rows["narrow-head"]["from"] == "flarec"
    assert table["properties"]["logits-capped"] == {"provides_it": ["cap-logits"]}
    assert "cap-logits" in table["properties"]["narrowed"]["requires_it"]
    text = CliRunner().invoke(main, ["passes"]).output
    assert all(name in text for name in PASSES)


def test_a_plugin_needs_no_other_module() -> None:
    assert all(hasattr(flarec.plugin, name) for name in flarec.plugin.__all__)
    imports = [line for line in EXAMPLE.read_text().splitlines() if "flarec" in line and "import" in line]
    assert imports == ["from flarec.plugin import Claims, Pass, Program, Property, PropertyError, locate"]
