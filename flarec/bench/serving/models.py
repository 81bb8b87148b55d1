"""Models with random weights in the shapes that are measured, and the program that decodes them."""

from __future__ import annotations

from typing import Any

import torch

from flarec.decode import Engine
from flarec.decode.stores import Static
from flarec.errors import UsageError
from flarec.frontend.export import capture
from flarec.ir.compiled import compiled_by_region
from flarec.ir.program import Program
from flarec.passes import lower

from ..session import Session

_SIZES = {"head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
          "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 248320}
SHAPES: dict[str, dict[str, int]] = {
    "2B": {**_SIZES, "linear_num_value_heads": 16, "hidden_size": 2048, "intermediate_size": 6144,
           "num_hidden_layers": 24},
    "4B": {**_SIZES, "linear_num_value_heads": 32, "hidden_size": 2560, "intermediate_size": 9216,
           "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4},
    "tiny": {"head_dim": 32, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
             "linear_num_value_heads": 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320},
}
"""Of Qwen3.5: three layers of linear attention to one of softmax attention, tied embeddings."""


class ServingSession(Session):
    """A run over one model. block = noisy positions per block, context = tokens of a prompt, steps = timed ones;
    compile = whether steps are compiled by region."""

    def __init__(
        self, device: torch.device, shape: str, *, block: int = 3, context: int = 512, steps: int = 200,
        budget_ms: float = 100, compile: bool = False,
    ) -> None:
        super().__init__(device, budget_ms=budget_ms)
        if shape not in SHAPES:
            raise UsageError(f"unknown shape {shape}; choose {', '.join(SHAPES)}")
        self.shape = shape
        self.block = block
        self.context = context
        self.steps = steps
        self.compile = compile
        self.on_gpu = device.type == "cuda"

    @property
    def model(self) -> Any:
        """The transformers model: bfloat16 on a GPU, float32 elsewhere."""
        return self.measured("model", self._build)

    def _build(self) -> Any:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        torch.manual_seed(0)
        config = Qwen3_5TextConfig(tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, **SHAPES[self.shape])
        with self.device:
            model = Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16 if self.on_gpu else torch.float32)
        model.tie_weights()
        return model.eval()

    @property
    def program(self) -> Program:
        kernels = "triton" if self.on_gpu else "torch"
        return self.measured("program", lambda: lower(
            capture(self.model), "decode", kernels=kernels, fast=self.compile, regions=self.compile
        ))

    @property
    def vocabulary(self) -> int:
        return SHAPES[self.shape]["vocab_size"]

    def engine(self, slots: int, *, graphs: str = "auto", kind: type[Engine] = Engine) -> Engine:
        mask = self.vocabulary - 1
        return kind(
            self.program, mask_token_id=mask, block_size=self.block, eos_ids=(), max_positions=1 << 20, slots=slots,
            readouts={"ar-trust": "causal", "diffusion-trust": "block_end"}, suppress=(mask,), graphs=graphs,
            static=Static(self._compiled) if self.compile and graphs == "auto" else None,
        )

    def _compiled(self, program: Any) -> Program:
        """One for all engines: what was compiled is not compiled again."""
        return self.measured("compiled", lambda: compiled_by_region(program))

    def prompts(self, requests: int, tokens: int | None = None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        size = (requests, self.context if tokens is None else tokens)
        ids: list[list[int]] = torch.randint(0, self.vocabulary - 8, size, generator=generator).tolist()
        return ids

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
