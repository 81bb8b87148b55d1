"""Optimizer steps: losses fall, micro batches add up, the mask token learns, bad numbers stop the run by name."""

from __future__ import annotations

import math

import pytest
import torch

from flarec.errors import RecipeError, TrainingError, UsageError
from flarec.passes import lower
from flarec.passes.embed_mask import PARAMETER
from flarec.train.mask_token import MaskToken, choose_mask_token, initialise_mask_token, used_rows
from flarec.train.objective.batch import build_batches
from flarec.train.objective.noise import step_generator
from tests.models import END_ID, FAMILIES, PAD_ID, TOKENS, VOCABULARY, tiny_config, tiny_tokenizer
from tests.train.small_run import recipe, small, source


@pytest.mark.parametrize("family", FAMILIES)
def test_both_losses_fall_on_a_batch_that_can_be_memorised(family: str) -> None:
    """All-masked blocks: the loss of a step does not depend on a draw of mask rates. Kimi's experts train, too."""
    chosen = recipe("flare", "diffusion.mask=all", "diffusion.views=1")
    trainer = small(family).trainer(chosen)
    steps = [trainer.advance().read(tiny_tokenizer()) for _ in range(10)]
    for name in ("ar_loss", "diffusion_loss"):
        assert steps[-1][name] < 0.75 * steps[0][name]
    assert all(math.isfinite(step["gradient_norm"]) and step["gradient_norm"] > 0 for step in steps)
    still = [name for name, value in trainer.parameters.items() if torch.equal(value, small(family).start[name])]
    assert not still, "every parameter learns"


@pytest.mark.parametrize("name", ["flare", "draft", "dual"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(name: str) -> None:
    run = small("qwen3_5_text")
    chosen = recipe(name, "optimizer.batch_rows=4")
    results = []
    for micro_rows in (4, 2, 1):
        trainer = run.trainer(chosen)
        rows = trainer.rows.rows(4)
        batches = build_batches(
            rows, chosen.diffusion, run.mask.token_id, step_generator(0, 0), micro_rows=micro_rows
        )
        losses, *_ = trainer.accumulate(batches)
        assert len(losses) == 4 // micro_rows
        gradients = {key: value.grad.clone() for key, value in trainer.parameters.items() if value.grad is not None}
        results.append((losses.sum(), gradients))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_diffusion_the_clean_stream_trains_alone(family: str) -> None:
    """No noisy token is computed; the gradient is that of the AR loss in a batch that has them."""
    run, chosen = small(family), recipe("draft", "optimizer.micro_rows=2")
    alone = run.trainer(chosen.override(["objective.diffusion_weight=0"]))
    given = alone.feed.take(0)
    assert [batch.noisy_tokens for batch in given.batches] == [0]
    alone.accumulate(given.batches)
    gradients = {name: value.grad.clone() for name, value in alone.parameters.items() if value.grad is not None}
    both = run.trainer(chosen)
    rows = both.rows.rows(2)
    (batch,) = build_batches(rows, chosen.diffusion, run.mask.token_id, step_generator(0, 0))
    both.recipe = both.feed.recipe = chosen.override(["objective.diffusion_weight=0"])
    both.accumulate([batch])
    for name, value in gradients.items():
        torch.testing.assert_close(value, both.parameters[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    step = alone.advance().read(tiny_tokenizer())
    assert step["noisy_tokens"] == 0 and step["diffusion_loss"] == 0.0 and step["all_masked_accuracy"] == [None] * 3


def test_learning_rate_follows_the_schedule() -> None:
    chosen = recipe("draft", "optimizer.warmup_steps=4", "optimizer.lr=1e-3")
    trainer = small("qwen3_5_text").trainer(chosen)
    rates = [trainer.advance().lr for _ in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_clipping_bounds_the_step_but_not_the_reported_norm() -> None:
    """With a tiny limit on the norm, AdamW's epsilon dominates and nothing moves; without one everything does."""
    run = small("qwen3_5_text")
    moved = {}
    for clip in (0.0, 1e-12):
        trainer = run.trainer(recipe("draft", f"optimizer.clip={clip}"))
        assert trainer.advance().read(tiny_tokenizer())["gradient_norm"] > 1
        moved[clip] = max(float((v.detach() - run.start[n]).abs().max()) for n, v in trainer.parameters.items())
    assert moved[0.0] > 1e-3 > 1e-5 > moved[1e-12]


def test_noise_depends_on_seed_and_step_alone() -> None:
    run, chosen = small("qwen3_5_text"), recipe("dual")

    def losses(seed: int, steps: int = 3) -> list[float]:
        trainer = run.trainer(chosen, seed=seed)
        return [trainer.advance().read(tiny_tokenizer())["loss"] for _ in range(steps)]

    first = losses(1)
    assert losses(1) == first
    assert losses(2) != first


def test_a_loss_that_is_not_finite_names_step_and_documents() -> None:
    run = small("qwen3_5_text")
    trainer = run.trainer(recipe("dual"))
    trainer.advance().read(tiny_tokenizer())
    data = source()
    broken = data.document(2)
    with torch.no_grad():  # an embedding that one document alone uses
        others = {int(token) for index in (0, 1, 3) for token in data.document(index).ids}
        token = next(int(token) for token in broken.ids if int(token) not in others)
        run.model.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(TrainingError, match=r"loss of step \d+ is not finite \(row \d of 2, documents") as caught:
        for _ in range(8):
            trainer.advance().read(tiny_tokenizer())
    run.trainer(recipe("dual"))  # leaves the shared model as it was
    assert repr(tiny_tokenizer().decode(broken.ids[:16].tolist())[:48]) in str(caught.value)


def test_a_gradient_that_is_not_finite_is_found_although_the_loss_is() -> None:
    trainer = small("qwen3_5_text").trainer(recipe("draft"))
    weight = next(iter(trainer.parameters.values()))
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    try:
        with pytest.raises(TrainingError, match="the gradient of step 1 is not finite"):
            trainer.advance().read(tiny_tokenizer())
    finally:
        handle.remove()


def test_mask_row_starts_at_the_mean_of_the_used_rows_and_learns_through_the_embedding_alone() -> None:
    run = small("qwen3_5_text")
    trainer = run.trainer(recipe("dual"))
    table = run.model.get_input_embeddings().weight
    torch.testing.assert_close(table[run.mask.token_id], table[:TOKENS].mean(0))
    trainer.advance()
    head = run.model.get_output_embeddings().weight
    assert table.grad is not None and head.grad is not None
    assert table.grad[run.mask.token_id].abs().max() > 0
    assert head.grad[run.mask.token_id].abs().max() == 0, "its logit is minus infinity in every loss"
    assert head.grad[run.mask.token_id + 1].abs().max() > 0


def test_mask_vector_learns_and_is_one_parameter_of_all_lowered_programs() -> None:
    run = small("qwen3_5_text", "vector")
    trainer = run.trainer(recipe("dual"))
    decode = lower(run.captured, "decode", mask_vector=True)
    assert decode.extra[PARAMETER] is run.program.extra[PARAMETER]
    trainer.advance()
    vector = run.program.extra[PARAMETER]
    assert vector.grad is not None and vector.grad.abs().max() > 0
    assert decode.parameters()[PARAMETER] is vector


class TestChoiceOfTheMaskToken:
    def test_first_spare_row(self) -> None:
        assert choose_mask_token("auto", tiny_config("bamba"), tiny_tokenizer()) == MaskToken("row", TOKENS)

    def test_ids_that_the_configuration_names_are_not_spare(self) -> None:
        config = tiny_config("bamba", eos_token_id=[END_ID, TOKENS], bos_token_id=TOKENS + 1)
        assert choose_mask_token("row", config, tiny_tokenizer()) == MaskToken("row", TOKENS + 2)

    def test_holes_in_the_vocabulary_are_not_spare(self) -> None:
        class Holes:
            def __len__(self) -> int:
                return 10

            def get_vocab(self) -> dict[str, int]:
                return {"a": 0, "b": TOKENS + 7}

        assert used_rows(Holes()) == TOKENS + 8
        assert choose_mask_token("auto", tiny_config("bamba"), Holes()).token_id == TOKENS + 8

    def test_a_full_vocabulary_gets_a_vector(self) -> None:
        config = tiny_config("bamba", vocab_size=TOKENS)
        mask = choose_mask_token("auto", config, tiny_tokenizer())
        assert mask == MaskToken("vector", TOKENS)
        assert mask.suppress is None
        with pytest.raises(RecipeError, match=r'mask_token = "row", but all 300 rows'):
            choose_mask_token("row", config, tiny_tokenizer())

    def test_a_tokenizer_that_is_larger_than_the_model(self) -> None:
        with pytest.raises(UsageError, match="the tokenizer has 300 tokens, but the model embeds only 299"):
            choose_mask_token("auto", tiny_config("bamba", vocab_size=TOKENS - 1), tiny_tokenizer())

    def test_a_vector_starts_at_the_mean_of_the_used_rows(self) -> None:
        run = small("qwen3_5_text", "vector")
        captured = run.captured.clone()
        run.trainer(recipe("dual"))
        initialise_mask_token(MaskToken("vector", VOCABULARY), run.model, captured, tiny_tokenizer())
        table = run.model.get_input_embeddings().weight
        torch.testing.assert_close(captured.extra[PARAMETER], table[:TOKENS].mean(0))
        assert PAD_ID < TOKENS
