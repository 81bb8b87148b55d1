"""`flarec serve --engine vllm` as a user runs it: vLLM's own server, drafting, asked with the openai client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests_vllm.conftest import MODELS, ROOT, SETTINGS, record

FLAREC = ROOT / ".venv" / "bin" / "flarec"
KEY = "a secret"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [FLAREC, "serve", MODELS / "llama", "--engine", "vllm", "--python", sys.executable, "--port", port,
             "--dtype", "float32", "--", "--max-model-len", 512, "--enforce-eager", "--max-num-seqs", 8,
             "--kv-cache-memory-bytes", 96 << 20]
    environment = {**os.environ, **SETTINGS, "FLAREC_API_KEY": KEY}
    log = tmp_path_factory.mktemp("server") / "log"
    process = subprocess.Popen(
        [str(word) for word in words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail(log.read_text()[-4000:])
    assert KEY not in log.read_text()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate()


def test_answers_are_those_of_flarec(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    own = record("llama")
    done = client.completions.create(model="llama", prompt=own["prompts"][:6], temperature=0, max_tokens=96,
                                     extra_body={"return_token_ids": True})
    found = [choice.model_dump()["token_ids"] for choice in sorted(done.choices, key=lambda choice: choice.index)]
    assert found == own["tokens"][:6]


def test_chats_stream(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    messages = [{"role": "user", "content": "What is 12 + 7?"}]
    asked = {"model": "llama", "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert whole and "".join(pieces) == whole and len(pieces) > 2


def test_it_asks_for_the_key(url: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="another").models.list()


def test_metrics_count_drafts_without_masks(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    client.completions.create(model="llama", prompt=record("llama")["prompts"][7], temperature=0, max_tokens=96)
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = [line.rsplit(" ", 1) for line in page.read().decode().splitlines() if not line.startswith("#")]
    counts = {
        kind: sum(float(value) for name, value in lines if name.startswith(f"vllm:spec_decode_num_{kind}_total"))
        for kind in ("drafts", "draft_tokens", "accepted_tokens")
    }
    assert 0 < counts["accepted_tokens"] < counts["draft_tokens"] < 4 * counts["drafts"]


def test_what_cannot_be_served_is_told_at_once() -> None:
    done = subprocess.run(
        [FLAREC, "serve", Path("examples/tiny/model"), "--engine", "vllm", "--python", sys.executable], cwd=ROOT,
        capture_output=True, text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("Error: examples/tiny/model was not converted")
