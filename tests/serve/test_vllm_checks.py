"""What vLLM cannot draft with is refused by its files, in one sentence, without vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flarec.checkpoint.manifest import AdapterInfo
from flarec.errors import CheckpointError, FlarecError, UsageError
from flarec.frontend.families import FAMILIES
from flarec.serve.vllm import checks
from flarec.serve.vllm.checks import NO_ROLLBACK, ROLLED_BACK, UNKNOWN, check_version, is_hybrid, proposal_of
from flarec.serve.vllm.proposal import Proposal
from tests.serve.vllm_checkpoints import written


def test_a_checkpoint_that_drafts(tmp_path: Path) -> None:
    assert proposal_of(written(tmp_path / "a")) == Proposal(500, 4, 4)
    assert proposal_of(written(tmp_path / "b", "qwen3_5_text"), 2) == Proposal(500, 2, 4)


def test_a_checkpoint_without_its_manifest(tmp_path: Path) -> None:
    table = {"mask": "row", "mask_token_id": 9, "block_size": 3, "readouts": {"ar-trust": "causal"}}
    text = {"model_type": "qwen3_5_text", "dual_mode": table | {"readouts": {"ar-trust": "causal",
                                                                             "diffusion-trust": "causal"}}}
    path = written(tmp_path / "a", "qwen3_5", manifest=False, text_config=text)
    assert proposal_of(path) == Proposal(9, 3, 3)
    assert is_hybrid(path) and not is_hybrid(written(tmp_path / "b"))


@pytest.mark.parametrize(("values", "said"), [
    ({"manifest": False}, "was not converted"),
    ({"manifest": False, "mask_token_id": 9, "block_size": 4}, "readout block_end"),  # of another program
    ({"kind": "vector"}, "is a vector, which vLLM takes of an adapter alone"),
    ({"kind": "vector", "adapter": AdapterInfo(4, 8.0, "all-linear")}, "has no row to spare"),  # no tokenizer
    ({"kind": "random", "adapter": AdapterInfo(4, 8.0, "all-linear")}, "random ids, and vLLM knows the rows"),
    ({"readouts": {"ar-trust": "block_end", "diffusion-trust": "block_end"}}, "readout block_end"),
    ({"readouts": {"diffusion-trust": "block_end"}}, "readout None"),
    ({"adapter": AdapterInfo(4, 8.0, "all-linear", alone=True)}, "an adapter without its model"),
    *[({"model_type": name}, "selective scan") for name in ("jamba", "mamba", "falcon_mamba")],
    ({"model_type": "recurrent_gemma"}, "gated recurrence"),
    ({"model_type": "bamba"}, "no class for bamba"),
])
def test_refused_in_one_sentence(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as found:
        proposal_of(written(tmp_path / "a", **values))
    assert "\n" not in str(found.value)
    assert (str(tmp_path / "a") if "model_type" not in values else values["model_type"]) in str(found.value)


@pytest.mark.parametrize("drafts", [0, 5, -4])
def test_more_drafts_than_masks_can_say(tmp_path: Path, drafts: int) -> None:
    with pytest.raises(UsageError, match="give 1 to 4"):
        proposal_of(written(tmp_path / "a"), drafts)


def test_every_hybrid_family_is_known() -> None:
    """A new row of the table of families must be placed here too."""
    assert {*NO_ROLLBACK, *UNKNOWN, *ROLLED_BACK} == set(FAMILIES)
    assert len({*NO_ROLLBACK}) + len(UNKNOWN) + len(ROLLED_BACK) == len(FAMILIES)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.0.post2"])
def test_versions_that_were_tested(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "0.9.2", None])
def test_versions_that_were_not(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"vllm>=0\.32,<0\.33|0\.32 up to before 0\.33"):
        check_version(version)
    monkeypatch.setenv(checks.ANY_VERSION, "1")
    if version is None:
        with pytest.raises(FlarecError, match="not installed"):
            check_version(version)
    else:
        check_version(version)


def test_the_check_as_a_program(tmp_path: Path) -> None:
    """It runs beside vLLM: neither it nor the classes that vLLM loads import transformers or a model's capture."""
    code = (
        "import sys\n"
        "from flarec.serve.vllm import checks, command, proposer, repair, runner\n"
        "checks.installed = lambda: '0.32.0'\n"
        "heavy = ('transformers', 'flarec.frontend.export', 'flarec.passes', 'flarec.decode', 'click', 'fastapi')\n"
        "print(*map(checks.main, sys.argv[1:]), [name for name in heavy if name in sys.modules])"
    )
    good, bad = written(tmp_path / "good"), written(tmp_path / "bad", kind="vector")
    done = subprocess.run([sys.executable, "-c", code, good, bad], capture_output=True, text=True, check=True)
    assert done.stdout == "0 2 []\n" and done.stderr.startswith("the mask of ") and done.stderr.count("\n") == 1
