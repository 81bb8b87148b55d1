"""AR-Trust inside vLLM: the model drafts for itself in the forward that verifies the drafts before.

    proposal  what a request drafts next, as a function of what came of its last forward; knows neither torch nor vLLM
    checks    what a checkpoint, a family and a version of vLLM must have; `python -m flarec.serve.vllm.checks CKPT`
    command   the command line that starts vLLM's own server with the classes below
    repair    a function of vLLM that is wrong on CPUs, where it is
    adapter   an adapter on noisy rows by vLLM's own LoRA
    proposer  the class that vLLM loads as `custom_class`
    runner    what is put before vLLM's model runner: the mask's logit, the best token of each row
    worker    the class of `--worker-cls`
    scheduler the class of `--scheduler-cls`: acceptance is counted without masks

A step verifies `pending d1 .. dK M .. M` causally, K drafts and B masks behind them. No mask is ever accepted, because
its logit is minus infinity, so vLLM takes back the keys and states of the mask rows as it does with every rejected
draft. Their logits are the drafts of the next step, if all drafts before them were accepted: AR-Trust with `drafts =
"single"` (docs/semantics.md section 4), in one forward and with one copy of the weights.

The modules import torch, vLLM and the light half of `flarec.checkpoint`: no transformers, no capture.
"""
