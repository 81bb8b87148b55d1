"""The decode modes of flarec inside transformers:

    model = AutoModelForCausalLM.from_pretrained(DIR)
    model.generate(ids, custom_generate=DIR, trust_remote_code=True, mode="ar-trust", max_new_tokens=64)

Modes: causal, ar-trust, diffusion-trust. Needs the package flarec.
"""

from typing import Any


def generate(
    inputs: Any = None, generation_config: Any = None, *, model: Any, mode: str = "ar-trust", **kwargs: Any
) -> Any:
    """See `flarec.hf_generate.generate` for the arguments. `model` comes by keyword, or bound by transformers."""
    from flarec.hf_generate import generate as flarec_generate

    return flarec_generate(model, inputs, generation_config, mode=mode, **kwargs)
