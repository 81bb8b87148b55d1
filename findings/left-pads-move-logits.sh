#!/bin/sh
# transformers 5.23.0, torch 2.13.0, on a CPU, 2026-11-30.
#
# Three pads at the left of a prompt, with the attention mask and the positions that `generate` gives: the last token's logits are those of
# the prompt without pads, to rounding, in LLaMA, Bamba, Jamba and LFM2. In RecurrentGemma they move by percents: nothing keeps pads
# out of its convolutions and its recurrence. So they do in Jamba with `mamba_proj_bias` and in LFM2 with `conv_bias`: there masked
# inputs are set to zero before a bias is added to them.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0
cat > run.py <<'PY'
import torch
import transformers as hf

COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
JAMBA = dict(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4)
LFM2 = dict(num_hidden_layers=2, layer_types=["conv", "full_attention"], block_multiple_of=8)
SAME = {
    "Llama": ("Llama", dict(num_hidden_layers=2)),
    "Bamba": ("Bamba", dict(
        num_hidden_layers=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
    )),
    "Jamba": ("Jamba", JAMBA),
    "LFM2": ("Lfm2", LFM2),
}
MOVED = {
    "RecurrentGemma": ("RecurrentGemma", dict(num_hidden_layers=3, lru_width=32, attention_window_size=64, head_dim=16)),
    "Jamba, mamba_proj_bias": ("Jamba", {**JAMBA, "mamba_proj_bias": True}),
    "LFM2, conv_bias": ("Lfm2", {**LFM2, "conv_bias": True}),
}
PADS, LENGTH = 3, 9


def moved(name, options):
    """The largest change of the last token's logits by pads, relative to the largest logit."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**COMMON, **options})
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():  # as in trained models: biases, decays that remember, weights that matter
        if key.endswith("A_log"):
            torch.nn.init.normal_(parameter, mean=-1.5, std=0.4)
        elif key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in key else parameter.shape[-1] ** -0.5)
    ids = torch.randint(1, 64, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.full((1, PADS), 5), ids], dim=1)
    mask = (torch.arange(PADS + LENGTH) >= PADS).long()[None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits[0, -1]
        behind = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[0, -1]
    return float((plain - behind).abs().max() / plain.abs().max())


for models, holds in ((SAME, lambda value: value < 1e-5), (MOVED, lambda value: value > 1e-3)):
    for name, (kind, options) in models.items():
        value = moved(kind, options)
        print(f"{name}: {value:.0e}")
        assert holds(value), "the behaviour has changed"
PY
venv/bin/python run.py
# Llama: 2e-07
# Bamba: 9e-07
# Jamba: 3e-07
# LFM2: 2e-07
# RecurrentGemma: 2e-02
# Jamba, mamba_proj_bias: 1e-01
# LFM2, conv_bias: 1e-02
