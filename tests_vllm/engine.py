"""One vLLM engine in a process of its own, which answers rounds of requests and ends.

    python -m tests_vllm.engine JOB.json OUT.json

JOB: {"model": path, "drafting": bool or speculative_config, "engine": {arguments of LLM}, "rounds": [[request, ...]]}.
The requests of a round run together, and each round ends before the next begins. A request is {"prompt": token ids,
...SamplingParams}, or with "regex" what an answer must match.
OUT: {"answers": [[{"tokens", "cached", "logprobs"}]], "counts": [{name: value}] after each round, "versions"}.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    import vllm
    from vllm.sampling_params import StructuredOutputsParams

    options = dict(job["engine"])
    if isinstance(job["drafting"], dict):
        options["speculative_config"] = job["drafting"]
    elif job["drafting"]:
        from flarec.serve.vllm.checks import proposal_of
        from flarec.serve.vllm.proposer import PROPOSER, SCHEDULER, WORKER

        width = proposal_of(Path(job["model"])).width
        options |= {
            "worker_cls": WORKER, "scheduler_cls": SCHEDULER,
            "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": width},
        }
    llm = vllm.LLM(
        job["model"], enforce_eager=True, seed=0, kv_cache_memory_bytes=96 << 20, disable_log_stats=False, **options
    )
    answers, counts = [], []
    for requests in job["rounds"]:
        prompts, params = [], []
        for request in requests:
            values = dict(request)
            prompts.append({"prompt_token_ids": values.pop("prompt")})
            if "regex" in values:
                values["structured_outputs"] = StructuredOutputsParams(regex=values.pop("regex"))
            params.append(vllm.SamplingParams(**values))
        done = llm.generate(prompts, params, use_tqdm=False)
        answers.append([{
            "tokens": [list(one.token_ids) for one in answer.outputs],
            "cached": answer.num_cached_tokens,
            "logprobs": [[{str(token): value.logprob for token, value in place.items()} for place in one.logprobs]
                         for one in answer.outputs if one.logprobs is not None],
        } for answer in done])
        counts.append({
            metric.name.removeprefix("vllm:spec_decode_"): metric.values if hasattr(metric, "values") else metric.value
            for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode_")
        })
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version()}
    return {"answers": answers, "counts": counts, "versions": versions}


if __name__ == "__main__":
    out = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(out))
