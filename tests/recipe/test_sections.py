"""Recipes: what is built in, overriding, files, error messages, round trips."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarec import recipes
from flarec.errors import RecipeError
from flarec.recipe import Recipe, load_recipe, recipe_from_toml
from flarec.recipe.diffusion import Diffusion
from flarec.recipe.sections import Decode, Optimizer


@pytest.mark.parametrize("name", recipes.NAMES)
def test_builtin_recipes_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert recipe_from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_builtin_recipes_are_those_of_the_contract() -> None:
    def kinds(name: str) -> list[tuple[float, str, int, str, str, str]]:
        pairs = load_recipe(name).diffusion.kinds
        return [(p, k.mask, k.views, k.supervise, k.readout, k.loss) for p, k in pairs]

    flare = ("random", 2, "masked-input", "block_end", "ce")
    draft = ("all", 1, "masked-input", "causal", "kl")
    assert kinds("flare") == [(1.0, *flare)]
    assert kinds("draft") == [(1.0, *draft)]
    denoise = ("random", 2, "masked-target", "block_end", "ce")  # trains the rows that a denoising step uses
    assert kinds("dual") == [(0.5, *denoise), (0.5, *draft)]
    assert load_recipe("flare").readouts() == {"ar-trust": "block_end", "diffusion-trust": "block_end"}
    assert load_recipe("draft").readouts() == {"ar-trust": "causal", "diffusion-trust": "causal"}
    assert load_recipe("dual").readouts() == {"ar-trust": "causal", "diffusion-trust": "block_end"}
    for name in ("flare", "draft", "dual"):
        optimizer, objective = load_recipe(name).optimizer, load_recipe(name).objective
        published = (optimizer.lr, optimizer.warmup_steps, optimizer.schedule, optimizer.weight_decay, optimizer.clip)
        assert published == (1e-5, 100, "constant", 0.0, 1.0)
        assert (objective.ar_weight, objective.diffusion_weight) == (1.0, 1.0)
        assert load_recipe(name).adapter.rank == 0


def test_adapter_recipes_are_those_of_the_contract() -> None:
    adapter, both = load_recipe("adapter"), load_recipe("adapter-dual")
    draft = replace(load_recipe("draft").diffusion, block_size=3)
    steps = adapter.optimizer.steps
    assert adapter.diffusion_at(0) == adapter.diffusion_at(steps // 2 - 1) == draft
    assert adapter.diffusion_at(steps // 2) == adapter.diffusion_at(steps - 1) == replace(draft, loss="el")
    for recipe in (adapter, both):
        assert (recipe.adapter.rank, recipe.objective.ar_weight, recipe.mask_choice) == (64, 0.0, "vector")
        assert set(recipe.readouts().values()) == {"causal"}
    (half, first), (_, second) = both.diffusion.kinds
    assert half == 0.5 and first is both.diffusion
    assert replace(both.diffusion, second=adapter.diffusion.second) == adapter.diffusion
    found = (second.mask, second.views, second.supervise, second.readout, second.loss)
    assert found == ("random", 1, "masked-target", "causal", "kl")


def test_the_recipe_of_spans_is_that_of_the_contract() -> None:
    """`adapter-dual` whose spans grow, and whose random half shows wrong tokens."""
    fluid, steps = load_recipe("fluid"), load_recipe("fluid").optimizer.steps
    assert {kind.readout for _, kind in fluid.diffusion.kinds} == {"causal"} and fluid.diffusion.span_entropy > 0
    lengths = [fluid.diffusion_at(step).block_size for step in range(steps)]
    assert lengths == sorted(lengths) and lengths[0] == 2 and lengths[-1] == fluid.diffusion.block_size == 6
    assert fluid.diffusion_at(0).span_entropy == fluid.diffusion.span_entropy
    (_, drafts), (half, denoises) = fluid.diffusion.kinds
    assert (half, drafts.wrong_tokens, denoises.wrong_tokens, denoises.mask) == (0.5, 0.0, 0.1, "random")
    both = load_recipe("adapter-dual")
    assert replace(fluid.diffusion.second, wrong_tokens=0.0) == both.diffusion.second
    assert (fluid.objective, fluid.optimizer, fluid.adapter.rank) == (both.objective, both.optimizer, 16)


def test_every_key_is_documented_and_can_be_set_to_its_own_value() -> None:
    recipe = load_recipe("dual")
    entries = recipe.describe()

    def leaves(table: dict[str, Any], prefix: str = "") -> set[str]:
        items = [(prefix + key, value) for key, value in table.items()]
        return set().union(*(leaves(value, f"{key}.") if isinstance(value, dict) else {key} for key, value in items))

    assert {entry.key for entry in entries} == leaves(recipe.to_dict())
    assert all(len(entry.doc) > 10 for entry in entries)
    for key, value, _ in entries:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert recipe.override([f"{key}={text}"]) == recipe, key


@given(
    st.fixed_dictionaries(
        {
            "diffusion.block_size": st.integers(1, 64),
            "diffusion.supervise": st.sampled_from(["masked-input", "masked-target", "masked-both"]),
            "diffusion.views": st.sampled_from([1, 2]),
            "diffusion.second.probability": st.floats(0, 1),
            "optimizer.lr": st.floats(1e-12, 1.0),
            "optimizer.steps": st.integers(1, 10**9),
            "description": st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=9),
        }
    )
)
def test_overrides_survive_toml(values: dict[str, object]) -> None:
    recipe = load_recipe("flare").override([f"{key}={value}" for key, value in values.items()])
    described = {entry.key: entry.value for entry in recipe.describe()}
    assert {key: described[key] for key in values} == values
    assert recipe_from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("diffusion.blok_size=4", ["diffusion.blok_size", "did you mean diffusion.block_size?"]),
        ("optimizer.learning_rate=1", ["unknown recipe key", "did you mean learning_rate, without a section?"]),
        ("warmup_step=1", ["did you mean optimizer.warmup_steps?"]),
        ("lr=1", ["did you mean optimizer.lr?"]),
        ("diffusion=4", ["diffusion is a section of a recipe, not a key", "diffusion.block_size"]),
        ("train=1", ["train is a section of a recipe, not a key", "train.memory, train.shard, train.compile"]),
        ("diffusion.second=1", ["diffusion.second is a section", "diffusion.second.mask"]),
        ("diffusion.block_size", ["write key=value"]),
        ("diffusion.block_size=0", ["diffusion.block_size = 0", "at least 1"]),
        ("diffusion.block_size=2.5", ["diffusion.block_size = 2.5", "a whole number"]),
        ("diffusion.block_size=true", ["diffusion.block_size = True", "a whole number"]),
        ("diffusion.block_size=four", ["diffusion.block_size = 'four'", "a whole number"]),
        ("diffusion.views=3", ["diffusion.views = 3", "1 or 2"]),
        ("diffusion.supervise=input", ["diffusion.supervise = 'input'", "masked-input or masked-target"]),
        ("diffusion.second.probability=1.5", ["diffusion.second.probability = 1.5", "at most 1"]),
        ("diffusion.mask=all", ["diffusion.views = 1"]),
        ("diffusion.loss=l1", ["diffusion.loss = 'l1'", "ce or kl or tv or el"]),
        ("diffusion.loss=el", ['diffusion: loss "el" needs diffusion.mask = "all"']),
        ('diffusion.earlier_losses=["el:0.5"]', ['diffusion: loss "el" needs diffusion.mask = "all"']),
        ('diffusion.earlier_losses=["kl"]', ["diffusion.earlier_losses holds 'kl'", "VALUE:FRACTION"]),
        ('diffusion.earlier_losses=["kl:0.5", "ce:0.5"]', ["holds 'ce:0.5'", "fractions that rise"]),
        ("diffusion.earlier_losses=kl:1", ["holds 'kl:1'", "between 0 and 1"]),
        ("diffusion.earlier_losses=l1:0.5", ["diffusion.earlier_losses = 'l1'", "ce or kl"]),
        ("diffusion.earlier_block_sizes=0:0.5", ["diffusion.earlier_block_sizes = 0", "at least 1"]),
        ("diffusion.earlier_block_sizes=two:0.5", ["diffusion.earlier_block_sizes = 'two'", "a whole number"]),
        ("diffusion.grids=5", ["diffusion.grids = 5", "blocks of 4 can start at 4 places"]),
        ("diffusion.slot_weights=accept-until-fail", ["diffusion: slot_weights", 'needs diffusion.mask = "all"']),
        ("optimizer.lr=0", ["optimizer.lr = 0", "above 0"]),
        ("optimizer.lr=nan", ["optimizer.lr = nan"]),
        ("optimizer.betas=0.9", ["optimizer.betas", "2 numbers"]),
        (f"optimizer.steps={10**400}", ["optimizer.steps = an integer of 1329 bits", "a whole number"]),
        (f"optimizer.lr={10**400}", ["optimizer.lr = an integer of 1329 bits", "a number, above 0"]),
        ("optimizer.steps=" + "9" * 5000, ["optimizer.steps = '999", "a whole number"]),
        ("optimizer.micro_rows=3", ["optimizer.batch_rows = 8", "optimizer.micro_rows = 3"]),
        ("decode.ar_trust_readout=causal", ["decode.ar_trust_readout", "no kind of block trains"]),
    ],
)
def test_bad_overrides_say_what_is_wrong(assignment: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("flare").override([assignment])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_expected_length_weighs_slots_by_itself() -> None:
    with pytest.raises(RecipeError, match=r'diffusion\.second\.loss = "el" weighs the slots by itself'):
        load_recipe("dual").override(["diffusion.second.loss=el", "diffusion.second.slot_weights=accept-until-fail"])


def test_phases_are_a_function_of_the_step() -> None:
    recipe = load_recipe("dual").override([
        "optimizer.steps=30", "diffusion.block_size=4", 'diffusion.earlier_block_sizes=["1:0.1", "2:0.5"]',
        "diffusion.grids=3", "diffusion.second.loss=el", 'diffusion.second.earlier_losses=["ce:0.1", "kl:0.7"]',
    ])
    found = [recipe.diffusion_at(step) for step in range(30)]
    assert [d.block_size for d in found] == [1] * 3 + [2] * 12 + [4] * 15
    assert [d.grids for d in found] == [1] * 3 + [2] * 12 + [3] * 15
    assert [d.second.loss for d in found] == ["ce"] * 3 + ["kl"] * 18 + ["el"] * 9
    assert {d.loss for d in found} == {"ce"}
    assert all(not (d.earlier_block_sizes or d.earlier_losses or d.second.earlier_losses) for d in found)
    assert found[29] == recipe.diffusion.at(29, 30) and recipe_from_toml(recipe.to_toml()) == recipe


def test_slot_weights_hold_for_the_losses_that_are_not_the_expected_length() -> None:
    recipe = load_recipe("draft").override([
        "optimizer.steps=2", "diffusion.slot_weights=accept-until-fail", "diffusion.loss=el",
        "diffusion.earlier_losses=kl:0.5",
    ])
    found = [(d.loss, d.slot_weights) for d in map(recipe.diffusion_at, range(2))]
    assert found == [("kl", "accept-until-fail"), ("el", "uniform")]


def test_new_checkpoints_have_a_recheck() -> None:
    """docs/quality.md says why, and the README that it is causal decoding's text."""
    assert {load_recipe(name).decode.recheck for name in recipes.NAMES} == {1.0}


def test_values_are_checked_when_built_in_python() -> None:
    with pytest.raises(RecipeError, match=r"diffusion\.block_size = 0"):
        Diffusion(block_size=0)
    with pytest.raises(RecipeError, match=r"confidence_threshold"):
        Decode(confidence_threshold=2)
    assert isinstance(Optimizer(lr=1).lr, float)


def test_overrides_apply_together() -> None:
    recipe = load_recipe("flare").override(["diffusion.mask=all", "diffusion.views=1"])
    assert (recipe.diffusion.mask, recipe.diffusion.views) == ("all", 1)
    assert recipe.override(["optimizer.betas=[0.8, 0.9]"]).optimizer.betas == (0.8, 0.9)


def test_recipe_files(tmp_path) -> None:
    first, second = tmp_path / "mine.toml", tmp_path / "other.toml"
    first.write_text('base = "draft"\n[diffusion]\nblock_size = 7\n[optimizer]\nlr = 1e-3\n')
    second.write_text('base = "mine.toml"\nname = "named"\n[optimizer]\nsteps = 5\n')
    mine = load_recipe(first)
    assert mine.name == "mine"
    assert mine == load_recipe("draft").override(
        ["diffusion.block_size=7", "optimizer.lr=1e-3", "name=mine"]
    )
    assert load_recipe(str(second)) == mine.override(["optimizer.steps=5", "name=named"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[diffusion]\nblock_sizes = 3\n", ["diffusion.block_sizes", "did you mean diffusion.block_size?"]),
        ("diffusion = 3\n", ["diffusion is a section"]),
        ("[optimizr]\nlr = 1\n", ["unknown recipe key optimizr"]),
        ("[diffusion]\nreadout = 'both'\n", ["diffusion.readout = 'both'", "block_end or causal"]),
        ("[diffusion\n", ["not TOML"]),
        ("base = 'bad.toml'\n", ["its own base"]),
        ("base = 'flair'\n", ["flair", "did you mean flare?"]),
        ("base = 3\n", ["base = 3"]),
    ],
)
def test_bad_recipe_files_are_named(tmp_path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_recipe_name() -> None:
    with pytest.raises(RecipeError, match="did you mean draft"):
        load_recipe("drafts")
    with pytest.raises(RecipeError, match="flare, draft, dual"):
        load_recipe("zzz")


def test_learning_rate_schedules() -> None:
    def rates(**keys: Any) -> list[float]:
        optimizer = Optimizer(lr=1.0, steps=14, warmup_steps=4, **keys)
        return [optimizer.lr_at(step) for step in range(15)]

    for schedule in ("constant", "linear", "cosine"):
        values = rates(schedule=schedule)
        assert values[:4] == [0.25, 0.5, 0.75, 1.0] and values[4] == 1.0
        assert sorted(values[4:], reverse=True) == values[4:]
    assert set(rates(schedule="constant")[4:]) == {1.0}
    assert rates(schedule="linear")[9] == pytest.approx(0.5)
    assert rates(schedule="cosine")[9] == pytest.approx(0.5)
    assert rates(schedule="linear")[14] == rates(schedule="cosine")[14] == 0.0
