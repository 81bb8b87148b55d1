"""Triton kernels compile for an H100, and ptxas makes right code of them: no stack pointer that is a number."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.compiled_code import stack_pointer_as_number

ROOT = Path(__file__).resolve().parent.parent

GOOD = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   VIADD R1, R1, 0xfffff900 ;
        /*0f10*/                   STL [R1+0x190], R178 ;
        /*b510*/                   LDL.LU R195, [R1+0x190] ;
        /*b780*/                   IADD3 R178, P1, R10, 0x40, RZ ;
        /*b790*/              @!P0 IADD3 R178, P1, R11, R100, RZ ;
        /*b7a0*/               @P1 IADD3 R1, R1, 0x10, RZ ;
"""
BAD = """
        /*0ee0*/                   IADD3 R178, P1, R1, 0x40, RZ ;
        /*1010*/                   IADD3.X R10, R1.reuse, -0x7fffffe0, RZ, P1, !PT ;
"""


def test_addresses_on_the_stack_are_no_fault() -> None:
    assert list(stack_pointer_as_number(GOOD)) == []


def test_computing_with_the_stack_pointer_is() -> None:
    assert len(list(stack_pointer_as_number(GOOD + BAD))) == 2


KERNELS = {"linear": 12, "kda": 22, "conv": 2, "attention": 3, "decode": 1}


def test_kernels_compile_without_a_gpu() -> None:
    """In bfloat16 at the sizes of the benchmark; the interpreter, which runs them elsewhere, compiles nothing."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compile_kernels", *KERNELS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    found = dict(zip(*[iter(re.split(r"^([\w-]+):$", done.stdout, flags=re.MULTILINE)[1:])] * 2, strict=True))
    needs = {
        op: re.findall(r"(\w+)_kernel +(\d+) registers +(\d+) B stack +(\d+) B shared", text)
        for op, text in found.items()
    }
    assert {op: len(kernels) for op, kernels in needs.items()} == KERNELS, done.stdout
    assert all(int(shared) <= 227 * 1024 for kernels in needs.values() for *_, shared in kernels)
