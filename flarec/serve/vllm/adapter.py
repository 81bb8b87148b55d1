"""An adapter on noisy rows (docs/semantics.md section 6) by vLLM's own LoRA, whose mapping is by row.

vLLM applies a LoRA to all rows of the requests that name it, but what its layers read is an index for every row of a
forward. Here rows of masks get the adapter and all others none, whatever their request. The mask's embedding, a vector
that is no row of the model, is put in the place of a row that is no word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flarec.errors import CheckpointError

SLOT = 1
"""vLLM's number of the adapter, the only one."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""
SLOTS = 2
"""For `--max-loras`. On a CPU a row without an adapter reads the last slot (index -1), so one has to be empty."""


def mask_vector(folder: Path) -> Tensor:
    """What stands for a mask in the files of an adapter: [width]. Raises `CheckpointError`."""
    path = folder / "flarec.safetensors"
    tensors = load_file(path) if path.is_file() else {}
    found: list[Tensor] = [tensor for tensor in tensors.values() if tensor.dim() == 1]
    if len(found) != 1:
        raise CheckpointError(f"{path} holds {len(found)} mask vectors instead of one; copy the adapter again")
    return found[0]


def place_vector(model: nn.Module, mask: int, vector: Tensor) -> int:
    """Let the embedding of a model give `vector` [width] for the token `mask`; how many modules look tokens up."""
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    def give(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.where((arguments[0] == mask).unsqueeze(-1), vector.to(out), out)

    found = [
        module for module in model.modules()
        if isinstance(module, (VocabParallelEmbedding, VocabParallelEmbeddingWithLoRA))
        and not isinstance(module, ParallelLMHead)
    ]
    for module in found:  # around one another at most: the outer one's vector is the inner one's
        module.register_forward_hook(give)
    return len(found)


class MaskRowAdapter:
    """The adapter of a checkpoint, in vLLM.

    folder: in peft's layout. mask: the token whose rows it acts on.
    """

    def __init__(self, folder: Path, mask: int) -> None:
        self.folder, self.mask = folder, mask
        self.vector = mask_vector(folder)

    def attach(self, runner: Any) -> None:
        """Load the adapter into the model of a runner, so that one which vLLM cannot read ends the start."""
        if not place_vector(runner.model, self.mask, self.vector):
            raise CheckpointError(f"{type(runner.model).__name__} of vLLM has no embedding that a mask can be put into")
        runner.lora_manager.add_adapter(self._request())

    def choose(self, runner: Any, input_batch: Any, scheduled: Any, sampled: Any) -> None:
        """Say which rows of a forward are adapted. scheduled, sampled: rows and logits of every request."""
        from vllm.lora.layers import LoRAMapping

        request = self._request()
        input_batch.lora_id_to_lora_request.setdefault(SLOT, request)  # CUDA graphs are chosen by how many there are
        rows = runner.input_ids.cpu[: int(scheduled.sum())] == self.mask
        logits = len(scheduled) if sampled is None else int(sampled.sum())
        # Without a mask the flag lets vLLM on a CPU leave the adapter out; with some it would sort rows into segments,
        # for which it has place for one of every request
        mapping = LoRAMapping(
            tuple((rows.long() * SLOT).tolist()), (0,) * logits, is_prefill=not bool(rows.any())
        )
        runner.lora_manager.set_active_adapters({request}, mapping)

    def _request(self) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest("flarec-noisy-rows", SLOT, str(self.folder))
