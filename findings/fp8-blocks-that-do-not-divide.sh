#!/bin/sh
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, on a CPU, 2026-11-30.
#
# fp8 in blocks (`*_scale_inv`, DeepSeek's layout), opened with `dequantize=True`. Where the last block is smaller than the others
# (200 rows in blocks of 128), transformers takes the length of a block from the sizes of weight and scales: 200 / 2 = 100 rows.
# The rows 100 to 127 get the scale of the second block, without a word. If the sizes do not divide, it refuses.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0
cat > run.py <<'PY'
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

BLOCK, NAME = 128, "model.layers.0.mlp.up_proj.weight"
config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=200, num_hidden_layers=1, num_attention_heads=2)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("model")
tensors = load_file("model/model.safetensors")
weight = tensors[NAME]  # 200 x 128: a block of 128 rows and one of 72
scales = torch.stack([weight[:BLOCK].abs().max(), 50 * weight[BLOCK:].abs().max()])[:, None] / 448
rows = scales.repeat_interleave(BLOCK, 0)[: weight.shape[0]]
tensors[NAME] = (weight / rows).to(torch.float8_e4m3fn)
tensors[f"{NAME}_scale_inv"] = scales
save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
config = AutoConfig.from_pretrained("model")
config.quantization_config = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "dequantize": True}
model = AutoModelForCausalLM.from_pretrained("model", config=config, dtype=torch.float32)
meant = tensors[NAME].float() * rows
found = model.state_dict()[NAME]
factor = (found[:, 0] / meant[:, 0]).nan_to_num(1.0)
print("rows that are not what the file means:", int((found != meant).any(dim=1).sum()), "of", len(meant))
print("factor of rows 99 to 101:", [round(float(value), 1) for value in factor[99:102]])
wrong = (found != meant).any(dim=1)
assert not bool(wrong[:100].any()) and bool(wrong[100:128].all()) and not bool(wrong[128:].any()), "the behaviour has changed"
PY
venv/bin/python run.py
# rows that are not what the file means: 28 of 200
# factor of rows 99 to 101: [1.0, 55.1, 55.1]
