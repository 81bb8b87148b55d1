"""`flarec recipes`: the list, the keys of one, TOML that can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from flarec import recipes
from flarec.cli import main
from flarec.recipe import load_recipe, recipe_from_toml


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["recipes", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list_has_every_recipe_with_its_description() -> None:
    lines = run().splitlines()
    for name in recipes.NAMES:
        assert any(line.split()[0] == name and load_recipe(name).description in line for line in lines if line)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_one_recipe_documents_every_key(name: str) -> None:
    words = " ".join(run(name).split())
    for entry in load_recipe(name).describe():
        assert f"{entry.key} = " in words
        assert " ".join(entry.doc.split()) in words


@pytest.mark.parametrize("name", recipes.NAMES)
def test_toml_reads_back(name: str) -> None:
    assert recipe_from_toml(run(name, "--toml")) == load_recipe(name)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "draft"\n[diffusion]\nblock_size = 9\n')
    assert "diffusion.block_size = 9" in run(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("arguments", "message"), [(["flair"], "did you mean flare?"), (["--toml"], "--toml needs a recipe")]
)
def test_errors(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["recipes", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
