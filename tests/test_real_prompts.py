"""examples/real/prompts.py on packages made for the test: splits share no package and no text."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "real" / "prompts.py"
DOC = "Return the number of {0} in a text, which may be empty, as a whole number that is at least zero. ({0})"
CODE = '''
def documented_{0}(text):
    """{1}"""
    return text.count("{0}")

def bare_{0}(text):
    found = [piece for piece in text.split() if piece == "{0}"]
    return len(found), found

def shared(text):
    return [piece for piece in text.split() if piece], "every package ships these same lines of code"
'''
PAGE = "# {0}\n\nCounts {0} in texts of any length, and says where they are. Made for a test of this repository.\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_prompts", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_prompts"] = module
    spec.loader.exec_module(module)
    return module


def test_splits_share_nothing(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"package-{number}" for number in range(30)]
    for name in names:
        module = name.replace("-", "_")
        for file, text in {
            f"{module}/__init__.py": CODE.format(module, DOC.format(module)),
            f"{module}/tests/test_it.py": CODE.format("of_tests", DOC.format("of_tests")),
            f"{module}/_vendor/other.py": CODE.format("vendored", DOC.format("vendored")),
            f"{module}/broken.py": "def (",
            f"{module}-1.dist-info/METADATA": f"Name: {name}\nVersion: 1\n\n{PAGE.format(name)}",
        }.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
        files = [path for path in (tmp_path / module).rglob("*") if path.is_file()]
        record = "".join(f"{path.relative_to(tmp_path)},,\n" for path in files)
        (tmp_path / f"{module}-1.dist-info" / "RECORD").write_text(record)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: str(tmp_path / "no standard library"))
    places = list(script.packages(metadata.distributions(path=[str(tmp_path)])))
    splits = script.split([script.read_package(*place) for place in places], 400)
    assert {name: {item.package for item in splits[name]} for name in splits} == {
        name: {package for package in names if script.split_of(package) == name} for name in splits
    }
    every = [item for items in splits.values() for item in items]
    assert len(every) == len({item.text for item in every}) == 3 * len(names), "docstring, code and page of each"
    assert all(item.text in item.prompt for item in every)
    assert not any(word in item.text for item in every for word in ("same lines", "vendored", "of_tests"))
    few = script.split([script.read_package(*place) for place in places], 1)
    assert sum(map(len, few.values())) == len(names)
    shares = [script.split_of(f"some-{number}") for number in range(2000)]
    assert [round(shares.count(name) / 20) for name in script.SHARES] == pytest.approx([80, 10, 10], abs=3)
