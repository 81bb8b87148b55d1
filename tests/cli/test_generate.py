"""`flarec generate`: what goes to stdout and stderr, prompts from everywhere, and its errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flarec import api
from flarec.base.generation import GenerationOptions
from flarec.cli import main
from tests.checkpoints import converted
from tests.cli.conversions import flarec
from tests.models import few_checkpoint

KEYS = [
    "text", "token_ids", "mode", "forwards", "new_tokens", "tokens_per_forward", "accepted", "seconds", "stop_reason",
    "origins", "taken_back",
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, checkpoint)"""
    return converted(tmp_path_factory.mktemp("cli"), "bamba")


@pytest.fixture(scope="module")
def model(paths: tuple[Path, Path]) -> api.Model:
    return api.load(paths[1])


@pytest.fixture
def generate(paths: tuple[Path, Path], model: api.Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command on the checkpoint, which is captured only once for all tests."""
    asked: list[dict[str, Any]] = []

    def load(path: str, **options: Any) -> api.Model:
        asked.append({"path": path, **options})
        return model

    monkeypatch.setattr(api, "load", load)

    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, ["generate", str(paths[1]), *arguments], input=stdin)

    run.asked = asked  # type: ignore[attr-defined]
    return run


def test_raw_text_by_default(generate: Callable[..., Result], model: api.Model) -> None:
    result = generate("Hello there", "--max-new-tokens", "12")
    assert result.exit_code == 0
    assert result.stdout == model.generate("Hello there", max_new_tokens=12).text + "\n"
    assert result.stderr == ""


def test_options_reach_the_model(generate: Callable[..., Result], model: api.Model) -> None:
    result = generate(
        "Hello", "--mode", "diffusion-trust", "--max-new-tokens", "14", "--temperature", "0.8", "--top-k", "30",
        "--top-p", "0.9", "--seed", "7", "--threshold", "0.2", "--denoising-steps", "2", "--json",
        "--device", "cpu", "--dtype", "float32", "--kernels", "reference",
    )
    expected = model.generate(
        "Hello", mode="diffusion-trust", max_new_tokens=14, temperature=0.8, top_k=30, top_p=0.9, seed=7, threshold=0.2,
        denoising_steps=2,
    )
    (item,) = json.loads(result.stdout)
    assert {**item, "seconds": 0} == {**expected.to_dict(), "seconds": 0}
    (asked,) = generate.asked  # type: ignore[attr-defined]
    assert (asked["device"], asked["dtype"], asked["kernels"]) == ("cpu", "float32", "reference")


def test_wrong_options_are_said_before_the_model_is_opened(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["generate", str(tmp_path / "nowhere"), "Hello", "--top-p", "2"])
    assert (result.exit_code, result.stderr.count("top_p is 2.0")) == (2, 1)


def test_single_drafts_and_stops(generate: Callable[..., Result], model: api.Model) -> None:
    free = model.generate("Hello", max_new_tokens=20)
    stop = free.text[6:8]
    result = generate("Hello", "--drafts", "single", "--max-new-tokens", "20", "--stop", "never", "--stop", stop)
    assert result.stdout == free.text[: free.text.index(stop)] + "\n"


def test_json_is_one_array_even_for_one_prompt(generate: Callable[..., Result]) -> None:
    result = generate("Hello", "--json", "--stats", "--max-new-tokens", "5")
    (item,) = json.loads(result.stdout)
    assert list(item) == KEYS
    assert item["new_tokens"] == len(item["token_ids"]) == 5
    assert (item["mode"], item["stop_reason"]) == ("ar-trust", "length")
    assert "ar-trust, 5 tokens in" in result.stderr


@pytest.mark.parametrize(("given", "share"), [([], 0.0), (["--recheck", "0.3"], 0.3), (["--recheck", "1"], 1.0)])
def test_a_recheck_is_the_checkpoints_unless_given(
    generate: Callable[..., Result], model: api.Model, given: list[str], share: float
) -> None:
    asked = "Hello", "--mode", "diffusion-trust", "--threshold", "0", "--max-new-tokens", "24"
    result = generate(*asked, "--json", "--stats", *given)
    (item,) = json.loads(result.stdout)
    options = GenerationOptions(mode="diffusion-trust", threshold=0.0, recheck=share, max_new_tokens=24)
    direct = model.generate("Hello", options)
    assert (item["token_ids"], item["taken_back"]) == (direct.token_ids, direct.taken_back)
    assert (f"recheck {share:g}: {direct.taken_back} taken back" in result.stderr) == bool(share)
    if share == 1:
        assert direct.token_ids == model.generate("Hello", mode="causal", max_new_tokens=24).token_ids
        assert direct.taken_back


def test_json_keeps_the_order_of_the_prompts(
    generate: Callable[..., Result], model: api.Model, tmp_path: Path
) -> None:
    prompts = ["a longer prompt than the others", "b", "and a third"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, ""]))
    result = generate("--prompts", str(tmp_path / "prompts.txt"), "--json", "--max-new-tokens", "9")
    expected = [model.generate(prompt, max_new_tokens=9).token_ids for prompt in prompts]
    assert [item["token_ids"] for item in json.loads(result.stdout)] == expected


def test_several_prompts_as_text(generate: Callable[..., Result], model: api.Model, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\r\n\ntwo")
    result = generate("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "6", "--stats")
    texts = [model.generate(prompt, max_new_tokens=6).text for prompt in ("one", "two")]
    assert result.stdout == f"--- prompt 1\n{texts[0]}\n--- prompt 2\n{texts[1]}\n"
    lines = result.stderr.splitlines()  # the model has answered other tests before, maybe with a recheck
    *each, engine, threads, pays = (line for line in lines if not line.startswith("recheck:"))
    assert [line[:9] for line in each] == ["prompt 1:", "prompt 2:"]
    counted = r"[0-9.]+ tokens/s, [0-9.]+ ms per forward, [0-9]+ forwards, [0-9]+ of prompts \([0-9.]+ s\)"
    assert re.fullmatch(counted, engine)
    assert threads.startswith("threads: ")
    assert re.fullmatch(r"a step of AR-Trust takes [0-9.]+ ms, a causal one [0-9.]+ ms: AR-Trust is .*", pays)


def test_jsonl_prompts(generate: Callable[..., Result], model: api.Model, tmp_path: Path) -> None:
    question = {"role": "user", "content": "Hello"}
    records = [
        {"prompt": "two\nlines"},
        {"messages": [question]},
        {"messages": [question, {"role": "assistant", "content": "left out"}], "answer": "x"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    items = json.loads(generate("--prompts", str(tmp_path / "p.jsonl"), "--json", "--max-new-tokens", "6").stdout)
    chat = model.generate("Hello", chat=True, max_new_tokens=6).token_ids
    expected = [model.generate("two\nlines", max_new_tokens=6).token_ids, chat, chat]
    assert [item["token_ids"] for item in items] == expected


def test_stdin_and_chat(generate: Callable[..., Result], model: api.Model) -> None:
    expected = model.generate("two\nlines", max_new_tokens=6)
    assert generate("-", "--max-new-tokens", "6", stdin="two\nlines\n").stdout == expected.text + "\n"
    chat = model.generate("two\nlines", chat=True, max_new_tokens=6)
    assert generate("-", "--chat", "--max-new-tokens", "6", stdin="two\nlines").stdout == chat.text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one PROMPT"),
        (["Hello", "--prompts", "x"], "give one PROMPT"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["Hello", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["Hello", "--top-p", "2"], "top_p is 2.0"),
        (["Hello", "--temperature", "1e38"], "temperature is 1e+38; give a number, at least 0, at most 1000000"),
        (["Hello", "--temperature", "nan"], "temperature is nan"),
        (["Hello", "--seed", "9" * 4000], "seed is an integer of 13288 bits; give a whole number"),
        (["Hello", "--denoising-steps", "0"], "denoising_steps is 0"),
        (["€" * 400], "context of 1024"),
        ([""], "prompt 0 is empty"),
        (["Hello", "--stop", ""], "stop strings must not be empty"),
    ],
)
def test_errors(arguments: list[str], message: str, generate: Callable[..., Result]) -> None:
    result = generate(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("p.txt", b"", "no prompts"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{', "line 2: not JSON"),
        ("p.jsonl", b'{"text": "a"}', 'line 1: no "prompt" text'),
        ("p.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: holds nothing but a turn"),
        ("p.jsonl", b"[1]", "begins as a JSON array; call the file .json"),
    ],
)
def test_bad_prompt_files(
    name: str, contents: bytes, message: str, generate: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(contents)
    result = generate("--prompts", str(tmp_path / name), "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_stdin_that_is_not_text(generate: Callable[..., Result]) -> None:
    result = generate("-", stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "stdin is not UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "not a model directory"),
        (lambda path: path.write_text(""), "is a file"),
    ],
)
def test_directories_that_are_no_models(damage: Any, message: str, tmp_path: Path) -> None:
    damage(tmp_path / "x")
    result = CliRunner().invoke(main, ["generate", str(tmp_path / "x"), "Hello"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_what_small_files_tell_is_said_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not converted, a tokenizer without a chat template."""
    source = few_checkpoint(tmp_path, "bamba")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')

    def load(*_: Any, **__: Any) -> api.Model:
        raise AssertionError("too late")

    monkeypatch.setattr(api, "load", load)
    for command in (["generate", str(source), "Hello"], ["chat", str(source)], ["eval", str(source), f"--data={data}"]):
        result = CliRunner().invoke(main, [*command, "--mode", "ar-trust"])
        assert result.exit_code == 2
        assert "not converted" in result.stderr and "flarec convert" in result.stderr
    (source / "chat_template.jinja").unlink()
    for command in (["generate", str(source), "Hello", "--chat"], ["chat", str(source)]):
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, "has no chat template" in result.stderr) == (2, True), result.stderr


# --- as a process of its own


def test_stdout_is_json_alone_and_nothing_unneeded_is_imported(paths: tuple[Path, Path], model: api.Model) -> None:
    """A whole process: what libraries print while they load must not reach stdout, nor their notices stderr."""
    code = (
        "import sys; from flarec.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted(sys.modules.keys() & {'datasets', 'matplotlib', 'pandas'}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", str(paths[1]), "Hello", "--json", "--max-new-tokens", "4"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (item,) = json.loads(done.stdout)
    assert item["token_ids"] == model.generate("Hello", max_new_tokens=4).token_ids
    assert done.stderr.strip() == ""


WAITS_FOR_CTRL_C = """
import signal, click
from flarec.cli import main
echo, pieces = click.echo, []
def counted(*arguments, **options):
    echo(*arguments, **options)
    pieces.append(None)
    if len(pieces) == 200: signal.pause()  # a test that is late must not find the text complete
click.echo = counted
main()
"""


def test_text_streams_and_ctrl_c_ends_with_130(paths: tuple[Path, Path]) -> None:
    """Text comes while the rest is still being generated, and most of the rest never comes."""
    arguments = ["generate", str(paths[1]), "Hello", "--max-new-tokens", "900", "--mode", "causal"]
    running = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_CTRL_C, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    with running:
        assert running.stdout is not None
        try:
            first = running.stdout.read(1)
            assert first and running.poll() is None
            running.send_signal(signal.SIGINT)
            rest, errors = running.communicate()
        finally:
            running.kill()
    assert running.returncode == 130
    assert len(first + rest) < 600, "900 tokens are some 970 characters, those before the pause some 220"
    assert "Traceback" not in errors


def test_a_checkpoint_is_checked_whole_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are too large to be hashed whenever they are opened; `verify` always reads them."""
    source, out = converted(tmp_path)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    monkeypatch.setattr("flarec.checkpoint.manifest.HASHED_AT_OPEN", len(data) - 1)
    for command in (["generate", out, "red", "--check"], ["verify", out]):
        result = flarec(*command)
        assert result.exit_code == 2, result.output
        assert "model.safetensors was changed after it was written" in result.stderr
    result = flarec("generate", source, "red", "--check")
    assert (result.exit_code, "has no flarec.json" in result.stderr) == (2, True)


def test_a_deleted_manifest_is_one_line(tmp_path: Path) -> None:
    _, out = converted(tmp_path)
    (out / "flarec.json").unlink()
    result = flarec("generate", out, "red", "--max-new-tokens", "2", "--stats")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "flarec.json" in line]
    assert lines == [
        f"Warning: {out} was converted by flarec but has no flarec.json: it decodes as its config.json says, and "
        "nobody checks its files; copy it again"
    ]
    assert "ar-trust, 2 tokens" in result.stderr
