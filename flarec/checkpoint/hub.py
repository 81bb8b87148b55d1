"""A finished checkpoint on the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants  # the package's own attribute is there only once something imported it
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import TrainingError, UsageError, first_line


def check_push(repo: str) -> None:
    """Raise `UsageError` if nothing can be pushed to a repository of this name: it is none, nobody is logged in, or the
    hub is switched off. Asks no server."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {repo}: {first_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set; unset it, or leave the option out")
    if not huggingface_hub.get_token():
        raise UsageError(f"--push-to-hub {repo}: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def push(directory: Path, repo: str) -> str:
    """Upload a checkpoint to a model repository, which is made if it is not there; the address.

    Raises `TrainingError` that says how to push later; the directory stays as it is.
    """
    try:
        api = huggingface_hub.HfApi()
        made = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=directory, repo_type="model", commit_message="Checkpoint of flarec"
        )
    except Exception as error:  # of the network, the hub, its client: the checkpoint is there all the same
        later = shlex.join(["hf", "upload", repo, str(directory)])
        raise TrainingError(
            f"{directory} is complete, but it could not be pushed to {repo}: {first_line(error)}; push it with "
            f"`{later}`, or with the same command and --resume"
        ) from error
    return str(made)
