"""The command group: cheap help, one-line errors, exit codes."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from flarec import __version__, cli
from flarec.errors import CheckpointError, FlarecError, GenerationError, TrainingError


def run_command(monkeypatch: pytest.MonkeyPatch, body: Any, *arguments: str) -> Any:
    """Run `flarec recipes` with another body."""

    @click.command("recipes")
    def command() -> None:
        body()

    monkeypatch.setattr("flarec.cli.recipes.command", command)
    return CliRunner().invoke(cli.main, ["recipes", *arguments])


def fail_with(error: BaseException) -> Any:
    def body() -> None:
        click.echo("before")
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code"),
    [(GenerationError("no"), 2), (CheckpointError("no"), 2), (TrainingError("no"), 1), (FlarecError("no"), 1)],
)
def test_errors_are_one_line_and_an_exit_code(
    error: FlarecError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_command(monkeypatch, fail_with(error))
    assert (result.exit_code, result.stderr, result.stdout) == (code, "Error: no\n", "before\n")


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    error = GenerationError("no")
    result = run_command(monkeypatch, fail_with(error), "--debug")
    assert result.exception is error


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_command(monkeypatch, fail_with(KeyboardInterrupt()))
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def test_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_command(monkeypatch, fail_with(TypeError("a bug")))
    assert isinstance(result.exception, TypeError)


def test_wrong_usage_is_2() -> None:
    for arguments in (["nonsense"], ["recipes", "--nonsense"], ["generate"], ["eval", "x"]):
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [("convert", "--bad"), ("convert", "model", "--seed", "-1"), ("convrt",)])
def test_of_several_ranks_the_first_says_what_is_wrong_with_their_arguments(arguments: tuple[str, ...]) -> None:
    alone = CliRunner().invoke(cli.main, arguments)
    first, second = (
        CliRunner().invoke(cli.main, arguments, env={"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    )
    assert alone.exit_code == first.exit_code == second.exit_code == 2
    assert first.stderr == alone.stderr != "" and second.output == ""


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    for name in cli.COMMANDS:
        assert name in result.stdout
    assert CliRunner().invoke(cli.main, ["--version"]).stdout == f"flarec, version {__version__}\n"


def test_python_m_flarec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["flarec", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("flarec", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"flarec, version {__version__}\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_exists_and_takes_debug(name: str) -> None:
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {name}")
    assert "--debug" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["recipes"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    code = f"""
import sys
from flarec.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0, end.code
print(*sorted(sys.modules.keys() & {{"torch", "transformers", "datasets", "matplotlib"}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
