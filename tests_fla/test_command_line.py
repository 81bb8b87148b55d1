"""A converted model of the library from the command line: no GPU, none of the library's kernels, no flash-attn package.

In a process of its own, which has not replaced anything in the library as the tests here do.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conformance.shared import converted

COMMAND = "import sys; from flarec.cli import main; sys.exit(main())"


@pytest.mark.xdist_group("gated_deltanet")
def test_generate_in_every_mode() -> None:
    path = converted("gated_deltanet").path
    texts = {}
    for mode in ("causal", "ar-trust", "diffusion-trust"):
        arguments = ["generate", str(path), "some text", "--mode", mode, "--max-new-tokens", "12"]
        run = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, check=False)
        assert run.returncode == 0, run.stderr.decode()
        texts[mode] = run.stdout
    assert texts["causal"].strip() and texts["causal"] == texts["ar-trust"]
    assert texts["diffusion-trust"].strip()
