"""Chunks and tiles fit the shared memory of the GPU that is there; where not even the smallest do, flarec says so."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from flarec.errors import PassError
from flarec.kernels.linear_attention.tiles import schedule
from flarec.kernels.linear_attention.tiles.schedule import H100_SHARED, bytes_needed, largest_chunk, shared_memory
from flarec.passes import lower
from tests.models import captured

pytest.importorskip("triton")
from flarec.kernels.linear_attention.tiles.train import LARGEST_DIM, unsupported

BF16, SINGLE = torch.bfloat16, torch.float32
CASES = [(BF16, 128), (BF16, 256), (SINGLE, 64), (SINGLE, 128), (SINGLE, 256)]


def gpu_with(monkeypatch: pytest.MonkeyPatch, kibibytes: int) -> None:
    """A device that has nothing but shared memory."""
    properties = SimpleNamespace(shared_memory_per_block_optin=kibibytes << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("kibibytes", "rows"),
    [
        (227, [64, 64, 64, 32, 16]),  # H100, H200
        (164, [64, 32, 64, 32, 16]),  # A100
        (99, [32, 16, 32, 16, 0]),  # RTX 4090, L40S
        (48, [16, 0, 16, 0, 0]),
    ],
)
def test_rows_of_a_chunk(kibibytes: int, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_with(monkeypatch, kibibytes)
    assert [largest_chunk(dtype, dim, dim) for dtype, dim in CASES] == rows
    for (dtype, dim), size in zip(CASES, rows, strict=True):
        why = unsupported(dtype, dim, dim)
        assert (why is None) == (size > 0)
        assert bytes_needed(size, dtype, dim, dim) <= kibibytes << 10
        if why is not None:
            assert f"on this GPU: the smallest tiles take {bytes_needed(16, dtype, dim, dim) >> 10} KiB" in why
            assert why.endswith(f"and it has {kibibytes}")


def test_without_a_gpu_kernels_are_those_of_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert shared_memory() == H100_SHARED == 227 << 10
    for key_dim, value_dim in itertools.product((4, 16, 64, 80, 128, 160, LARGEST_DIM), repeat=2):
        assert largest_chunk(BF16, key_dim, value_dim) == 64
        wide = 32 if key_dim <= 128 else 16
        assert largest_chunk(SINGLE, key_dim, value_dim) == (wide if max(key_dim, value_dim) > 64 else 64)


def test_a_pipeline_says_in_one_sentence_that_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "shared_memory", lambda: 1 << 10)
    monkeypatch.setattr("flarec.kernels.linear_attention.tiles.train.shared_memory", lambda: 1 << 10)
    with pytest.raises(PassError, match=r"the smallest tiles take \d+ KiB of shared memory, and it has 1; use --"):
        lower(captured("qwen3_5_text"), "train", kernels="triton")
