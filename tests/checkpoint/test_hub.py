"""`--push-to-hub`, against a stand-in of the hub's client that takes what the real one takes."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from flarec.checkpoint.hub import check_push
from flarec.checkpoint.manifest import Manifest
from flarec.errors import UsageError
from tests.checkpoints import tree
from tests.cli.conversions import QUICK, flarec, place_of_conversions

REAL = huggingface_hub.HfApi


class Hub:
    """Repositories in memory."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.error: Exception | None = None

    def client(self) -> Any:
        hub = self

        class Client:
            def create_repo(self, *arguments: Any, **keywords: Any) -> huggingface_hub.RepoUrl:
                values = inspect.signature(REAL.create_repo).bind(self, *arguments, **keywords).arguments
                assert values["exist_ok"] and values["repo_type"] == "model"
                hub.repositories.setdefault(values["repo_id"], {})
                return huggingface_hub.RepoUrl(f"https://huggingface.co/{values['repo_id']}")

            def upload_folder(self, *arguments: Any, **keywords: Any) -> None:
                values = inspect.signature(REAL.upload_folder).bind(self, *arguments, **keywords).arguments
                folder = values["folder_path"]
                assert Manifest.read(folder) is not None, "only what is complete is pushed"
                if hub.error is not None:
                    raise hub.error
                files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
                         if path.is_file()}
                hub.repositories[values["repo_id"]] = files

        return Client()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", made.client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return made


def test_pushed_when_complete_and_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    place_of_conversions(tmp_path, monkeypatch)
    command = ["convert", "source", "--data", "data.jsonl", "--out", "out", *QUICK, "--steps", "2", "--set",
               "evaluation.every=0", "--push-to-hub", "me/mine"]
    assert flarec(*command, "--stop-after", "1").exit_code == 0
    assert hub.repositories == {}, "nothing is complete yet"
    hub.error = ConnectionError("the network is unreachable\nmore")
    failed = flarec(*command, "--resume")
    last = failed.stderr.splitlines()[-1]
    assert (failed.exit_code, last) == (
        1, "Error: out is complete, but it could not be pushed to me/mine: the network is unreachable; push it with "
        "`hf upload me/mine out`, or with the same command and --resume",
    )
    assert not (tmp_path / "out.partial").exists()
    hub.error = None
    again = flarec(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert "pushed: https://huggingface.co/me/mine" in again.stderr
    written = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
               for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert hub.repositories == {"me/mine": written}


@pytest.mark.parametrize(
    ("repo", "token", "offline", "words"),
    [
        ("me/mine", None, False, "nobody is logged in; run `hf auth login`, or set HF_TOKEN"),
        ("me/mine", "hf_x", True, "HF_HUB_OFFLINE is set"),
        ("me/mine/more", "hf_x", False, "Repo id must be"),
    ],
)
def test_what_can_be_known_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, repo: str, token: str | None, offline: bool, words: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    before = tree(tmp_path)
    result = flarec("convert", tmp_path / "nowhere", "--out", tmp_path / "out", "--push-to-hub", repo)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert tree(tmp_path) == before


def test_the_hub_is_asked_for_nothing_that_others_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run checks the name before anything imported `huggingface_hub.constants`, which the package then lacks."""
    monkeypatch.delattr(huggingface_hub, "constants", raising=False)
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        check_push("owner/name")
