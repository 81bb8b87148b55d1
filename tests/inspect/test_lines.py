"""`flarec inspect --diff`: the lines that passes take out and put in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from flarec.cli import main
from flarec.inspect.lines import Recorder, difference, lines_of
from flarec.ir.pipeline import run_pipeline
from flarec.ir.program import layer_of
from flarec.passes import pipeline
from flarec.passes.properties import CHECKS
from tests.models import captured, tiny_checkpoint


@pytest.fixture(scope="module")
def recorded() -> Recorder:
    recorder = Recorder()
    run_pipeline(captured("lfm2"), pipeline("decode"), CHECKS, on_pass=recorder)
    return recorder


def test_every_pass_is_recorded_and_its_lines_make_the_next_graph(recorded: Recorder) -> None:
    assert [step for step, _ in recorded.steps] == ["", *(step.text() for step in pipeline("decode"))]
    for (_, before), (_, after) in zip(recorded.steps, recorded.steps[1:], strict=False):
        for layer in {*before, *after}:
            old, new = before.get(layer, []), after.get(layer, [])
            changes = difference(old, new)
            gone = [line for sign, line in changes if sign == "-"]
            came = [line for sign, line in changes if sign == "+"]
            left = list(old)
            for line in gone:
                left.remove(line)
            assert sorted(left + came) == sorted(new)


def test_equal_graphs_have_no_difference_and_order_counts() -> None:
    assert difference(["a", "b"], ["a", "b"]) == []
    assert sorted(difference(["a", "b"], ["b", "a"])) in ([("+", x), ("-", x)] for x in "ab")


def test_alike_layers_are_shown_once_and_others_apart(recorded: Recorder) -> None:
    layers = sorted(layer for layer in recorded.steps[0][1] if layer is not None)
    shown = dict(recorded.changes([layers]))["thread-cache()"]
    places = [place for place, _ in shown if place.startswith("layer")]
    kinds = {
        tuple(re.sub(r"\\d+", "", line) for _, line in lines) for place, lines in shown if place.startswith("layer")
    }
    assert len(places) == len(kinds) == 2, "a conv layer and an attention layer"


def test_a_line_names_what_a_node_calls(recorded: Recorder) -> None:
    lines = [line for lines in recorded.steps[-1][1].values() for line in lines]
    assert any(
        re.match(r"%\w+ = lowered\.short_conv_step\(x=%\w+, weight=%\w+, .*layout=%layout\)$", line) for line in lines
    )
    assert any(line.startswith("return [%") for line in lines)
    count = sum(node.op != "get_attr" for node in captured("lfm2").graph.nodes)
    assert count == sum(map(len, recorded.steps[0][1].values())) == sum(map(len, lines_of(captured("lfm2")).values()))
    assert set(recorded.steps[0][1]) == {
        layer_of(node) for node in captured("lfm2").graph.nodes if node.op != "get_attr"
    }


def test_the_command_shows_them_in_colour_on_a_terminal(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    plain = CliRunner().invoke(main, ["inspect", str(source), "--diff"])
    assert "        + %linear_" in plain.output and "\x1b[" not in plain.output
    colour = CliRunner().invoke(main, ["inspect", str(source), "--diff"], color=True)
    assert "\x1b[32m        + %" in colour.output and "\x1b[31m        - %" in colour.output
    out = tmp_path / "text"
    CliRunner().invoke(main, ["inspect", str(source), "--diff", "--out", str(out)], color=True)
    assert "        + %" in out.read_text() and "\x1b[" not in out.read_text()
