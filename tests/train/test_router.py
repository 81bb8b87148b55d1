"""Router statistics: counted as HF routes the clean rows, apart from the noisy ones, without changing the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from flarec import ops
from flarec.ir.program import Program
from flarec.layout import PADDING
from flarec.train.loop import Trainer
from flarec.train.objective.batch import Batch, build_batches
from flarec.train.objective.noise import step_generator
from flarec.train.progress import ConsoleReporter
from flarec.train.router import ExpertLoad, describe, worst
from tests.models import tiny_tokenizer
from tests.train.small_run import recipe, small

EXPERTS, CHOICES = 8, 2  # of the tiny configurations
FAMILIES = ("kimi_linear", "qwen3_5_moe_text")


class Recorder(fx.Interpreter):
    """Runs a program node by node and keeps the choices that its expert layers are called with."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.choices: list[torch.Tensor] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if ops.mixer_of(target) is ops.MOE_EXPERTS:
            self.choices.append(kwargs["index"])
        return super().call_function(target, args, kwargs)


def batches_of(trainer: Trainer, name: str, micro_rows: int) -> list[Batch]:
    chosen = recipe(name)
    return build_batches(
        trainer.rows.rows(2), chosen.diffusion, trainer.mask.token_id, step_generator(0, 0), micro_rows=micro_rows
    )


def expected(trainer: Trainer, batch: Batch) -> list[torch.Tensor]:
    """Counts per expert layer [2, experts], with a loop over the tokens."""
    program, layout = trainer.program, batch.layout
    given = program.given(batch.input_ids, layout=layout, head_rows=batch.head_rows)
    recorder = Recorder(program.module)
    recorder.run(*[given[name] for name in program.inputs])
    length, result = layout.length, []
    for choices in recorder.choices:
        counts = torch.zeros(2, EXPERTS, dtype=torch.int64)
        for flat, chosen in enumerate(choices.tolist()):
            row, slot = divmod(flat, length)
            noisy = slot >= layout.clean_length
            if noisy:
                real = layout.noisy_block[row, slot - layout.clean_length] != PADDING
            else:
                real = layout.clean_document[row, slot] != PADDING
            for expert in chosen:
                counts[int(noisy), expert] += int(real)
        result.append(counts)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_is_that_of_a_count_by_hand(family: str) -> None:
    trainer = small(family).trainer(recipe("dual"))
    batch = batches_of(trainer, "dual", 2)[0]
    *_, load = trainer.accumulate([batch])
    assert load is not None
    by_hand = expected(trainer, batch)
    assert len(by_hand) == len(load.counts) == len(load.layers) > 0
    for ours, theirs in zip(load.counts, by_hand, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.sum(1).tolist() == [batch.clean_tokens * CHOICES, batch.noisy_tokens * CHOICES]


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_rows_are_counted_where_the_source_model_sends_them(family: str) -> None:
    run = small(family)
    trainer = run.trainer(recipe("flare"))
    batch = batches_of(trainer, "flare", 2)[0]
    *_, load = trainer.accumulate([batch])
    assert load is not None
    layout = batch.layout
    seen: dict[int, torch.Tensor] = {}
    modules = {name: module for name, module in run.model.named_modules() if name.endswith(".experts")}

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            choices = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            for expert in choices.flatten().tolist():
                seen.setdefault(int(name.split("layers.")[1].split(".")[0]), torch.zeros(EXPERTS))[expert] += 1

        return hook

    handles = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in modules.items()]
    try:
        for row in range(2):
            for document in range(int(layout.clean_document[row].max()) + 1):
                ids = batch.input_ids[row, : layout.clean_length][layout.clean_document[row] == document]
                with torch.no_grad():
                    run.model(ids[None])
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == list(load.layers)
    for layer, counts in zip(load.layers, load.counts, strict=True):
        moved = (counts[0] - seen[layer]).abs().sum()
        assert moved <= 2, "but for a choice that rounding decides"


def without_counts(trainer: Trainer) -> Program:
    """The trainer's program with the counts taken out."""
    program = trainer.program.clone()
    output = program.output_node()
    output.args = (output.args[0][:1],)  # type: ignore[index]
    program.outputs = program.outputs[:1]
    program.graph.eliminate_dead_code()
    program.finish()
    assert not program.calls(ops.count_experts)
    return program


def test_the_step_is_the_same_and_micro_batches_add_up() -> None:
    trainer = small("kimi_linear").trainer(recipe("dual"))
    plain = without_counts(trainer)
    halves = batches_of(trainer, "dual", 1)
    for batch in halves:
        given: dict[str, Any] = {"layout": batch.layout, "head_rows": batch.head_rows}
        with torch.no_grad():
            first = trainer.program.results(batch.input_ids, **given)[0]
            assert torch.equal(first, plain.results(batch.input_ids, **given)[0])
    *_, load = trainer.accumulate(halves)
    assert load is not None
    for number, counts in enumerate(load.counts):
        assert torch.equal(counts, torch.stack([expected(trainer, batch)[number] for batch in halves]).sum(0))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.bincount)
        self.count += func.overloadpacket in waiting
        return func(*args, **(kwargs or {}))


def test_counting_does_not_wait_for_the_device() -> None:
    trainer = small("kimi_linear").trainer(recipe("dual"))
    plain = without_counts(trainer)
    batch = batches_of(trainer, "dual", 2)[0]
    given: dict[str, Any] = {"layout": batch.layout, "head_rows": batch.head_rows}
    given["derived"] = trainer.program.derive(batch.layout)
    with torch.no_grad():
        trainer.program.results(batch.input_ids, **given)  # what is made once is made here
        with Waits() as uncounted:
            plain.results(batch.input_ids, **given)
        with Waits() as counted:
            load = ExpertLoad.of(trainer.program.outputs, trainer.program.results(batch.input_ids, **given))
            assert load is not None
            _ = load + load
        before = counted.count
        with Waits() as read:
            float(load.counts[0][0, 0])
    assert before == uncounted.count
    assert read.count == 1, "this is what a wait looks like"


def test_a_step_reports_both_streams() -> None:
    values = small("kimi_linear").trainer(recipe("dual")).advance().read(tiny_tokenizer())
    router = values["router"]
    for name in ("clean", "noisy"):
        assert len(router[name]["max_over_mean"]) == len(router["layers"])
        assert all(1 <= value <= EXPERTS for value in router[name]["max_over_mean"])
        assert all(0 <= value <= 1 for value in router[name]["entropy"])
    assert router["clean"] != router["noisy"]


def test_a_model_without_experts_has_no_router() -> None:
    trainer = small("qwen3_5_text").trainer(recipe("dual"))
    step = trainer.advance()
    assert step.experts is None
    assert "router" not in step.read(tiny_tokenizer())


def test_even_and_collapsed_loads() -> None:
    even, collapsed, nothing = [5, 5, 5, 5], [0, 20, 0, 0], [0, 0, 0, 0]
    load = ExpertLoad((1, 3), (torch.tensor([even, collapsed]), torch.tensor([collapsed, nothing])))
    summary = (load + load).summary()
    assert summary["layers"] == [1, 3]
    assert summary["clean"] == {"max_over_mean": [1.0, 4.0], "entropy": [pytest.approx(1.0), 0.0]}
    assert summary["noisy"] == {"max_over_mean": [4.0, None], "entropy": [0.0, None]}
    assert worst(summary) == {
        "clean": {"max_over_mean": 4.0, "entropy": 0.0}, "noisy": {"max_over_mean": 4.0, "entropy": 0.0},
    }
    assert describe(summary) == "busiest expert clean 4.0x, noisy 4.0x the mean"


def test_dropped_choices_and_padding_count_for_nobody() -> None:
    stream = torch.tensor([0, 0, 1, 2])
    index = torch.tensor([[0, 3], [1, 0], [3, 2], [0, 1]])  # of three experts: 3 is a dropped choice
    assert ops.count_experts(index, stream, 3).tolist() == [[2, 1, 0], [0, 0, 1]]


def test_progress_lines_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    router = {"layers": [1]} | {
        name: {"max_over_mean": [value], "entropy": [0.9]} for name, value in (("clean", 1.25), ("noisy", 6.5))
    }
    values = {"step": 5, "ar_loss": 1.0, "diffusion_loss": 2.0, "tokens_per_second": 10.0, "seconds": 1.0}
    reporter = ConsoleReporter()
    reporter.begin(4, 5)
    reporter.step({**values, "router": router})
    assert "busiest expert clean 1.2x, noisy 6.5x the mean" in capsys.readouterr().err
