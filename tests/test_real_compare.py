"""examples/real/compare.py with data of an arm's own, and examples/real/pairs.py, which makes such data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flarec.cli.convert import command as convert
from flarec.recipe import load_recipe
from tests.real_scripts import real_script

CODE = '''
def counted(text):
    """Return how many words a text has, which may be empty, as a whole number that is at least zero."""
    words = [piece for piece in text.split() if piece]
    number = len(words) + 0 * len(text)  # a line that makes it long enough
    return number

class Holder:
    """Holds one value and gives it back when it is asked for it, however often, without changing it."""

    def __init__(self, value):
        self.value = value

    def give(self):
        return self.value

def alone(text):
    """Only a docstring, which leaves nothing behind when it is taken away from the function's code."""

def bare(text):
    return [piece for piece in text.split() if piece], "a function without any docstring at all, of enough letters"

def joined(text): """A docstring on the line of its function, behind which something else follows."""; return text
'''


def test_pairs_are_what_the_package_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = real_script(monkeypatch, "pairs")
    (tmp_path / "module.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("def (")
    for odd in (0, 1):
        monkeypatch.setattr(script, "number", lambda text, odd=odd: odd)
        counted, holder = script.pairs_of("package", [tmp_path / "module.py", tmp_path / "broken.py"])
        scope: dict[str, Any] = {}
        if odd:
            assert counted.kind == "write" and counted.prompt.endswith(f"\n\n{counted.text}")
            exec(counted.answer.removeprefix("```python\n").removesuffix("\n```"), scope)
            assert scope["counted"].__doc__ == counted.text
        else:
            assert counted.kind == "document" and counted.answer == f'"""{counted.text}"""'
            exec(counted.prompt.partition("```python\n")[2].removesuffix("\n```"), scope)
            assert scope["counted"].__doc__ is None and counted.text not in counted.prompt
        assert scope["counted"]("one two") == 2
        assert "class" in holder.prompt.splitlines()[0] and holder.text.startswith("Holds one value")


def record(prompt: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **more}


def test_both_sides_have_the_same_prompts_and_about_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    matched = real_script(monkeypatch, "pairs").matched
    held = {f"p{n}": record(f"p{n}", "x" * (100 + 10 * n)) for n in range(10)} | {"long": record("long", "x" * 900)}
    own = [record(f"p{n}", "own", tokens=120) for n in range(12)] + [record("long", "own", tokens=5)]
    pairs = matched(own, held, 500, len)
    sides = [sum(one["tokens"] for one, _ in pairs), sum(len(two["messages"][1]["content"]) for _, two in pairs)]
    assert all(one["messages"][0] == two["messages"][0] for one, two in pairs)
    names = {one["messages"][0]["content"] for one, _ in pairs}
    assert sides[1] <= 1.02 * sides[0] and "long" not in names and "p11" not in names, "too long, and nothing held"
    assert {f"p{n}" for n in range(4)} <= names and "p9" not in names, "what adds most to the difference goes first"


def test_every_arm_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = real_script(monkeypatch, "arms")
    adapter = load_recipe("adapter")
    found = {name: adapter.override(arms.overrides(name)) for name in arms.ARMS}
    assert found["nf4"].adapter.base == "nf4" and found["base"].adapter.base == "stored"
    assert found["own"] == found["given"] == found["base"]
    assert {*arms.DATA, *arms.BESIDE} <= {*arms.ARMS} and {*arms.BESIDE.values()} <= {*arms.ARMS}


def test_arms_learn_from_data_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = real_script(monkeypatch, "compare")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        script.main(["source", "--prompts", "prompts.jsonl", "--out", "out.json", "--data", "own.jsonl"])
    assert "source, prompts.jsonl does not exist" in capsys.readouterr().err
    Path("source").mkdir()
    Path("prompts.jsonl").touch()
    words = ["source", "--prompts", "prompts.jsonl", "--out", "out.json", "--first-seed", "1", "--seeds", "2"]
    for bad in (["--data-of", "mine=own.jsonl"], [], ["--only", "base", "--data-of", "own=own.jsonl"]):
        with pytest.raises(SystemExit):
            script.main([*words, *bad])
        assert "--data" in capsys.readouterr().err
    seen: list[dict[str, Any]] = []
    drafted = {"own.jsonl": 2.0, "given.jsonl": 1.5}

    def run(command: list[str], limit: float, **_: object) -> Any:
        """A conversion is read as the command line reads it; what is measured depends on its data and seed."""
        if command[3] == "convert":
            seen.append(convert.make_context("convert", command[4:]).params)
        else:
            speed = drafted[seen[-1]["data"][0]] + seen[-1]["seed"] / 10
            row = {"all": None, "loop-free": {"tokens_per_forward": speed}, "equal": 0}
            Path(command[command.index("--out") + 1]).write_text(json.dumps({"T=0": row, "T=1": row}))
        return script.commands.Ran("", 0, "", 1.0)

    monkeypatch.setattr(script.commands, "run", run)
    assert script.main([*words, "--data-of", "own=own.jsonl", "--data-of", "given=given.jsonl"]) == 0
    assert [(one["data"], one["seed"]) for one in seen] == [
        (("own.jsonl",), 1), (("given.jsonl",), 1), (("own.jsonl",), 2), (("given.jsonl",), 2)
    ], "no other arm has data"
    found = json.loads(Path("out.json").read_text())
    assert found["data of given"] == ["given.jsonl"] and found["arms"]["own"]["T=1"]["to_base"] == [0, 0]
    assert found["arms"]["given"]["T=0"]["to_base"] == pytest.approx([-0.5, -0.5])
