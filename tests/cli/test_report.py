"""`flarec report`: a page of a checkpoint, and its errors before anything slow."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from flarec import api
from flarec.report import recorded
from flarec.train.state import StateDirectory
from tests.checkpoints import converted
from tests.cli.conversions import flarec


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = converted(tmp_path_factory.mktemp("report"), "llama")[1]
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "ar_loss": 0.5, "diffusion_loss": 1.5}) + "\n{")
    return path


def test_samples_and_a_record(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = api.load(checkpoint)
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
    (tmp_path / "prompts.txt").write_text("Hello <b>\nthere\nnever asked\n")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Hello", "response": " there"}))
    record = tmp_path / "record.json"
    long = ["--max-new-tokens", "24"]
    evaluated = flarec("eval", checkpoint, "--data", tmp_path / "data.jsonl", "--out", record, *long)
    assert evaluated.exit_code == 0, evaluated.output
    answer = json.loads(record.read_text())["answers"][0]
    assert len(answer["origins"]) == answer["new_tokens"] and answer["origins"][0] == "c"

    page, text = tmp_path / "page.html", tmp_path / "page.md"
    result = flarec(
        "report", checkpoint, "--out", page, "--markdown", text, "--prompts", tmp_path / "prompts.txt",
        "--samples", "2", "--eval", record, *long,
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"written: {page}", f"written: {text}"]
    shown = page.read_text()
    assert "Hello &lt;b&gt;" in shown and "never asked" not in shown
    outputs = model.generate(["Hello <b>", "there"], max_new_tokens=24)
    for found, output in zip(re.findall(r'<pre class="text">\n(.*?)</pre>', shown, re.DOTALL), outputs, strict=True):
        assert html.unescape(re.sub(r'<span class="\w+">|</span>', "", found)) == output.text
        counts = {origin: output.origins.count(origin) for origin in output.origins}
        assert ", ".join(f"{count} {origin}" for origin, count in counts.items()) in shown
    graded = text.read_text().partition("## Accuracy against forwards")[2]
    assert graded and "this checkpoint" not in graded, "no answer is graded"
    assert "0.5" in text.read_text() and "1: record.json" in text.read_text()


def test_alone(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load", None)
    result = flarec("report", checkpoint)
    assert result.stdout == f"written: {checkpoint.name}-report.html\n"
    assert "No samples were asked for" in (tmp_path / f"{checkpoint.name}-report.html").read_text()
    assert flarec("report", checkpoint, "--markdown", "m.md").stdout == "written: m.md\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/page.html"], "there is no directory no"),
        (["--out", "."], "has no name"),
        (["--out", "a.html", "--markdown", "a.html"], "are both a.html"),
        (["--markdown", "empty.txt", "--prompts", "empty.txt"], "choose another --markdown"),
        (["--samples", "2"], "--samples is for --prompts"),
        (["--out", "a.html", "--temperature", "0"], "--temperature is for --prompts"),
        (["--chat"], "--chat is for --prompts"),
        (["--out", "{checkpoint}/page.html"], "which is read"),
        (["--out", "a.html", "--eval", "none.json"], "none.json"),
        (["--out", "a.html", "--prompts", "none.txt"], "none.txt"),
        (["--out", "a.html", "--prompts", "empty.txt"], "no prompts"),
        (["--out", "empty.txt", "--prompts", "empty.txt"], "is the output empty.txt"),
    ],
)
def test_errors(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load", None)
    Path("empty.txt").write_text("")
    result = flarec("report", checkpoint, *(argument.format(checkpoint=checkpoint) for argument in arguments))
    assert result.exit_code != 0 and message in result.stderr and "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"] and Path("empty.txt").read_text() == ""


def test_a_checkpoint_of_the_hub_has_its_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that of the snapshot, which is a hash."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorded, "resolve", lambda path: checkpoint)
    assert flarec("report", "owner/mine").stdout == "written: mine-report.html\n"
    assert "<h1>owner/mine</h1>" in Path("mine-report.html").read_text()


def test_two_names_of_one_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("page")
    result = flarec("report", checkpoint, "--out", tmp_path / "link", "--markdown", tmp_path / "page")
    assert result.exit_code == 2 and "give two names" in result.stderr and not (tmp_path / "page").exists()


def test_an_unfinished_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the checkpoint that is not there yet, also one that could be a hub id, and by its own."""
    monkeypatch.chdir(tmp_path)
    state = StateDirectory(Path("out/mine.partial"))
    Path("out").mkdir()
    state.create({"recipe": {}})
    for name in ("out/mine", "out/mine.partial", "out/mine.partial/"):
        result = flarec("report", name)
        assert result.exit_code == 2 and "flarec finish out/mine.partial" in result.stderr, result.output
        assert result.stderr.count("\n") == 1


def test_a_source_is_none(checkpoint: Path) -> None:
    result = flarec("report", checkpoint.parent / "source")
    assert result.exit_code == 2 and ("was not converted" in result.stderr or "does not exist" in result.stderr)
