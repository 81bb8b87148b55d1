"""predict-horizon: two layers on the rows of the head; elastic decoding on real programs, recomputed at every step."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flarec.decode import Engine
from flarec.decode.horizon import HorizonProgram
from flarec.errors import PassError, PropertyError
from flarec.ir.pipeline import parse_pipeline, pipeline_text
from flarec.ir.program import Program
from flarec.ir.slots import HORIZON
from flarec.layout import Block, build_layout
from flarec.passes import PASSES, PredictHorizon, lower, pipeline
from flarec.passes.narrow_head import NarrowHead
from flarec.passes.predict_horizon import check_horizon_predicted
from flarec.verify import Subject
from flarec.verify.decoding import near_tie, random_sampling
from tests.models import FAMILIES, VOCABULARY, captured, shared_model

SIZE, WIDTH, MASK = 3, 16, VOCABULARY - 1
STEP = PredictHorizon(SIZE, WIDTH)


def steps_with(step: PredictHorizon = STEP, kernels: str = "torch") -> list:
    found = []
    for other in pipeline("decode", kernels=kernels):
        found += [other, step] if isinstance(other, NarrowHead) else [other]
    return found


def add_head(program: Program, seed: int) -> nn.Sequential:
    """A random head, which the captured program holds from now on."""
    features = int(program.config.get_text_config().hidden_size)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(nn.Linear(features, WIDTH), nn.SiLU(), nn.Linear(WIDTH, SIZE + 1))
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(program.device)
    program.extra |= {f"horizon.{name}": parameter for name, parameter in head.named_parameters()}
    return head


def with_head(family: str, seed: int = 0) -> tuple[Program, Program, nn.Sequential]:
    """(captured, lowered with a random head, the head) of a family."""
    program = captured(family).clone()
    head = add_head(program, seed)
    return program, lower(program, "decode", steps=steps_with(), debug=True), head


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_of_the_docstring_and_the_same_logits(family: str) -> None:
    program, lowered, _ = with_head(family)
    assert lowered.outputs[0] == "logits" and HORIZON in lowered.outputs
    (record,) = [item for item in lowered.history if item.name == STEP.name]
    assert record.delta == {"linear": 2, "silu": 1}
    plain = lower(program, "decode")
    assert HORIZON not in plain.outputs
    assert [slot.name for slot in plain.cache_slots] == [slot.name for slot in lowered.cache_slots]


def test_text_and_shapes() -> None:
    text = pipeline_text(steps_with())
    assert "predict-horizon(positions=3, width=16)" in text
    assert parse_pipeline(text, PASSES) == steps_with()
    program, lowered, _ = with_head("bamba")
    with pytest.raises(PassError, match=r"'horizon\.0\.weight' is \[16, \d+\], and this program takes \[7, \d+\]"):
        lower(program, "decode", steps=steps_with(PredictHorizon(SIZE, 7)))
    lowered.outputs = tuple("other" if name == HORIZON else name for name in lowered.outputs)
    with pytest.raises(PropertyError, match="no output 'horizon'"):
        check_horizon_predicted(lowered)


class Recomputed:
    """The decoder of docs/semantics.md section 4, reading everything anew at every step, on the training program."""

    def __init__(self, program: Program, head: nn.Sequential) -> None:
        self.train = lower(program, "train")
        self.head = head

    def rows(self, prefix: list[int]) -> tuple[Tensor, Tensor]:
        """(hidden rows, logits) of the last clean row and of a masked block behind it."""
        length = len(prefix)
        layout = build_layout([[length]], [[Block(0, length, SIZE, 0, "causal")]])
        ids = torch.tensor([[*prefix, *[MASK] * SIZE]])
        wanted = torch.arange(length - 1, length + SIZE)
        with torch.no_grad():
            hidden, *_ = self.train.results(ids, layout=layout, head_rows=wanted)
            assert self.train.head is not None
            logits = self.train.head.logits(self.train.module, hidden)
        logits[:, MASK] = -torch.inf
        return hidden, logits

    def generate(self, prompt: list[int], count: int, threshold: float) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        taken_by_step = []
        while len(tokens) < count:
            hidden, logits = self.rows(prompt + tokens)
            confidence, choice = logits.softmax(1).max(1)
            horizon = int(self.head(hidden[:1]).argmax())
            taken = 0
            while taken < horizon and confidence[1 + taken] >= threshold:
                taken += 1
            tokens += choice[: 1 + taken].tolist()
            taken_by_step.append(taken)
        return tokens[:count], taken_by_step


@functools.cache
def elastic(family: str) -> tuple[Program, Engine, nn.Sequential]:
    program, lowered, head = with_head(family, seed=2)
    engine = Engine(
        lower(program, "decode"), mask_token_id=MASK, block_size=SIZE, readouts={"ar-trust": "causal"}, eos_ids=(),
        max_positions=256, suppress=[MASK], horizon=lambda: HorizonProgram(lowered),
    )
    return program, engine, head


@pytest.mark.parametrize("family", FAMILIES)
def test_elastic_decoding_with_a_recheck_of_one_is_causal(family: str) -> None:
    """Few ids, so that some drafts of a model that was never trained are right."""
    _, engine, _ = elastic(family)
    few, rng = frozenset(range(4, VOCABULARY)), random.Random(3)
    prompts = [[rng.randrange(MASK) for _ in range(rng.randint(1, 12))] for _ in range(16)]
    each = [replace(random_sampling(rng), max_new_tokens=16, suppress=few) for _ in prompts]
    causal = engine.generate(prompts, each, mode="causal")
    found = engine.generate(prompts, each, mode="elastic", threshold=0.0, recheck=1.0)
    assert isinstance(engine.program, Program)
    made = Subject(engine.program, engine.program, shared_model(family), mask_token_id=MASK, block_size=SIZE)
    for prompt, setting, row, other in zip(prompts, each, found, causal, strict=True):
        same = row.token_ids == other.token_ids
        assert same or near_tie(made, prompt, setting, other.token_ids, row.token_ids)
    assert sum(row.taken_back for row in found) and sum(row.origins.count("accepted") for row in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.0, 0.03])
def test_elastic_decoding_equals_recomputing_every_step(family: str, threshold: float) -> None:
    program, engine, head = elastic(family)
    rng = random.Random(4)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (5, 9, 2)]
    slow, seen = Recomputed(program, head), set()
    for prompt, result in zip(
        prompts, engine.generate(prompts, mode="elastic", threshold=threshold, max_new_tokens=14), strict=True
    ):
        tokens, taken = slow.generate(prompt, 14, threshold)
        assert result.token_ids == tokens
        assert result.forwards == len(taken)
        assert result.accepted == [taken.count(n) for n in range(max(taken) + 1)]
        seen |= {*taken}
    assert len(seen) > 1, "steps take different numbers of drafts"
