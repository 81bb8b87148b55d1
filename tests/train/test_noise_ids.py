"""Random ids as noise (docs/semantics.md sections 3 and 5): what the loss covers, and who sees what a block shows."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.decode.noise_ids import pool_of
from flarec.errors import RecipeError
from flarec.passes.adapt_noisy_stream import adapter_parameters
from flarec.recipe import Recipe, load_recipe
from flarec.train.data.document import PackedRow
from flarec.train.mask_token import MaskToken, choose_mask_token
from flarec.train.objective.batch import Batch, build_batches
from flarec.train.objective.noise import step_generator
from tests.models import FAMILIES, TOKENS, VOCABULARY, tiny_config, tiny_tokenizer
from tests.train.documents import MASK, make_document
from tests.train.small_run import adapter_recipe, small

RANGES = ((4, 9), (11, 50))
CHOSEN = adapter_recipe("mask_token=random", "diffusion.grids=2")
ROWS = [
    PackedRow((make_document([(2, 9), (1, 4)]), make_document([(1, 12)], first=3))),
    PackedRow((make_document([(4, 7)], tail=2, first=9),)),
]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("adapter").override(["diffusion.block_size=3", *overrides])


def built(chosen: Recipe, step: int = 0, noise: bool = True, micro_rows: int | None = None) -> list[Batch]:
    return build_batches(
        ROWS, chosen.diffusion_at(0), MASK, step_generator(3, step), micro_rows=micro_rows,
        noise_ids=RANGES if noise else (),
    )


@pytest.mark.parametrize("overrides", [(), ("diffusion.grids=3", "diffusion.grid_offset=random")], ids=["one", "three"])
def test_the_loss_covers_what_a_mask_token_would(overrides: tuple[str, ...]) -> None:
    """Layout, rows with logits, targets and weights are the same; masked positions show ids of the pool, no others."""
    chosen = recipe(*overrides)
    (random,), (masked,) = built(chosen), built(chosen, noise=False)
    for item in fields(Batch):
        one, other = getattr(random, item.name), getattr(masked, item.name)
        if item.name == "layout":
            assert all(torch.equal(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
        elif isinstance(one, Tensor) and item.name != "input_ids":
            assert torch.equal(one, other), item.name
    hidden = masked.input_ids == MASK
    assert torch.equal(hidden[:, masked.layout.clean_length :], masked.layout.noisy_block >= 0), "all are masked"
    assert torch.equal(random.input_ids[~hidden], masked.input_ids[~hidden])
    assert torch.isin(random.input_ids[hidden], pool_of(RANGES)).all()
    rows = masked.head_rows[masked.noisy_index]
    assert hidden.flatten()[rows].all() and len(rows) == masked.diffusion_count


def test_the_ids_are_of_seed_step_and_place_alone() -> None:
    chosen = recipe("diffusion.grids=3", "diffusion.grid_offset=random")

    def noisy(batches: list[Batch]) -> list[list[int]]:
        return [
            ids[batch.layout.clean_length :][block >= 0].tolist()
            for batch in batches for ids, block in zip(batch.input_ids, batch.layout.noisy_block, strict=True)
        ]

    assert noisy(built(chosen)) == noisy(built(chosen, micro_rows=1)) != noisy(built(chosen, step=1))
    (batch,) = built(chosen)
    shown: dict[tuple[int, ...], set[int]] = {}
    for row, (blocks, ids) in enumerate(zip(batch.layout.noisy_block.tolist(), batch.input_ids.tolist(), strict=True)):
        positions = batch.layout.noisy_position[row].tolist()
        for block, position, token in zip(blocks, positions, ids[batch.layout.clean_length :], strict=True):
            if block >= 0:
                document = int(batch.layout.block_document[row, block])
                shown.setdefault((row, document, position), set()).add(token)
    assert any(len(ids) == 3 for ids in shown.values()), "every grid draws its own"


def test_every_id_is_as_likely() -> None:
    batches = [built(recipe(), step)[0] for step in range(60)]
    found = torch.cat([
        batch.input_ids[:, batch.layout.clean_length :][batch.layout.noisy_block >= 0] for batch in batches
    ])
    pool = pool_of(RANGES)
    counts = torch.bincount(found, minlength=MASK)[pool].double()
    expected = len(found) / len(pool)
    assert float(((counts - expected) ** 2 / expected).sum()) < 78, "chi squared, 43 degrees: 0.1 %"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_its_own_block_sees_what_it_shows(family: str) -> None:
    """Clean rows are those of any other noise, bit for bit, and so are the rows of the other blocks; training moves the
    adapter and nothing else."""
    run = small(family, "random", chosen=CHOSEN)
    assert run.mask.kind == "random" and "flarec_mask_vector" not in run.program.extra
    trainer = run.trainer(CHOSEN)
    made = trainer.feed.take(0).batches[0]
    for name, value in run.program.extra.items():
        if name.endswith("lora_B.weight"):
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) / 2
    layout, clean = made.layout, made.layout.clean_length
    last = layout.noisy_block == layout.noisy_block.amax(1, keepdim=True)
    assert (made.input_ids[:, clean:] < TOKENS).all()
    other = made.input_ids.clone()
    other[:, clean:] = torch.where(last, (other[:, clean:] + 41) % TOKENS, other[:, clean:])

    def hidden(ids: Tensor) -> Tensor:
        everything = torch.arange(ids.numel())
        results, *_ = run.program.results(ids, layout=layout, head_rows=everything, derived=run.program.derive(layout))
        return results.view(*ids.shape, -1)

    with torch.no_grad():
        one, two = hidden(made.input_ids), hidden(other)
    real, noisy = layout.clean_document >= 0, layout.noisy_block >= 0
    assert torch.equal(one[:, :clean][real], two[:, :clean][real])
    if family != "kimi_linear":  # an expert's product holds all rows that chose it
        assert torch.equal(one[:, clean:][noisy & ~last], two[:, clean:][noisy & ~last])
    torch.testing.assert_close(one[:, clean:][noisy & ~last], two[:, clean:][noisy & ~last])
    assert not torch.equal(one[:, clean:][last], two[:, clean:][last])

    trainer = run.trainer(CHOSEN)
    trainer.advance().read(tiny_tokenizer())
    trainer.advance().read(tiny_tokenizer())
    own = {*adapter_parameters(run.program)}
    assert trainer.parameters.keys() == own
    assert all(torch.equal(value, run.start[name]) == (name not in own) for name, value in
               run.program.parameters().items())


def test_regular_ids_are_drawn() -> None:
    """No special token, none that the configuration names, none behind the tokenizer's."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<word>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    config = tiny_config("bamba", bos_token_id=50)
    mask = choose_mask_token("random", config, tokenizer)
    drawn = set(pool_of(mask.ids).tolist())
    assert (mask.kind, mask.token_id, mask.suppress) == ("random", VOCABULARY, None)
    assert drawn == {*range(TOKENS + 1)} - {0, 1, 2, 50}, "padding, the start and the end of a turn"
    assert TOKENS in drawn and len(tokenizer) == TOKENS + 2
    named = tiny_config("bamba", eos_token_id=list(range(TOKENS + 2)))
    with pytest.raises(RecipeError, match="every token of the tokenizer is a special one"):
        choose_mask_token("random", named, tokenizer)
    assert replace(mask, ids=()) == MaskToken("random", VOCABULARY)


@pytest.mark.parametrize(("name", "overrides", "said"), [
    ("draft", (), "is for recipes that freeze the model"),
    ("flare", (), "is for recipes that freeze the model"),
    ("adapter-dual", (), 'needs diffusion.second.mask = "all": random ids do not say which positions'),
    ("fluid", (), 'needs diffusion.second.mask = "all"'),
    ("adapter", ("diffusion.mask=random",), 'needs diffusion.mask = "all"'),
    ("adapter", ("decode.diffusion_trust_readout=causal",), "decode.diffusion_trust_readout is for Diffusion-Trust"),
])
def test_recipes_that_cannot_have_them_say_why(name: str, overrides: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as found:
        load_recipe(name).override(["mask_token=random", *overrides])
    assert "\n" not in str(found.value)


def test_the_recipe_names_what_it_is_for() -> None:
    chosen = load_recipe("adapter").override(["mask_token=random"])
    assert (chosen.mask_choice, chosen.readouts()) == ("random", {"ar-trust": "causal"})
    assert load_recipe("adapter").readouts().keys() == {"ar-trust", "diffusion-trust"}
