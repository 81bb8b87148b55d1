"""The decode modes of flarec inside transformers:

    model = AutoModelForCausalLM.from_pretrained(DIR)
    model.generate(ids, custom_generate=DIR, trust_remote_code=True, mode="ar-trust", max_new_tokens=64)

Modes: causal, ar-trust, diffusion-trust. Needs the package flarec (pip install flarec).
"""


def generate(inputs=None, generation_config=None, *, model, mode="ar-trust", **kwargs):
    from flarec.hf_generate import generate as flarec_generate

    return flarec_generate(model, inputs, generation_config, mode=mode, **kwargs)
