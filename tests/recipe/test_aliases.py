"""Names of transformers' TrainingArguments: what each becomes, at which level, and what is refused."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import BitsAndBytesConfig, TrainingArguments

from flarec.errors import RecipeError
from flarec.recipe import Reading, Recipe, load_recipe
from flarec.recipe.aliases import DIRECT, NAMES, REFUSED
from flarec.train.options import Options


def changed(recipe: Recipe, base: Recipe) -> dict[str, Any]:
    before = {entry.key: entry.value for entry in base.describe()}
    return {entry.key: entry.value for entry in recipe.describe() if entry.value != before[entry.key]}


def test_the_names_are_those_of_transformers() -> None:
    """But for those of its trainers for language models, of trl's adapters and of bitsandbytes' options, and of
    versions before."""
    elsewhere = {"max_length", "max_seq_length", "packing", "warmup_ratio", "group_by_length", "overwrite_output_dir"}
    elsewhere |= {"logging_dir", "tf32", "fp16"}
    elsewhere |= {"use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "target_modules"}
    elsewhere |= {"load_in_8bit", *inspect.signature(BitsAndBytesConfig).parameters}
    assert NAMES - {item.name for item in fields(TrainingArguments)} <= elsewhere
    keys = {entry.key for entry in load_recipe("flare").describe()}
    assert set(DIRECT.values()) <= keys
    assert all(len(words) > 5 for words in REFUSED.values())


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        (["learning_rate=3e-4"], {"optimizer.lr": 3e-4}),
        (["max_steps=7"], {"optimizer.steps": 7}),
        (["weight_decay=0.1"], {"optimizer.weight_decay": 0.1}),
        (["max_grad_norm=0.5"], {"optimizer.clip": 0.5}),
        (["adam_beta2=0.95"], {"optimizer.betas": (0.9, 0.95)}),
        (["adam_beta1=0.8", "adam_beta2=0.95", "adam_epsilon=1e-6"],
         {"optimizer.betas": (0.8, 0.95), "optimizer.eps": 1e-6}),
        (["eval_steps=5", "save_steps=6", "save_total_limit=3"],
         {"evaluation.every": 5, "save.every": 6, "save.total_limit": 3}),
        (["eval_strategy=no"], {"evaluation.every": 0}),
        (["eval_strategy=steps", "save_strategy=steps", "optim=adamw_torch", "logging_steps=10"], {}),
        (["bf16=true"], {"optimizer.precision": "bf16"}),
        (["bf16=false"], {"optimizer.precision": "float32"}),
        (["fp16=false"], {}),
        (["gradient_checkpointing=true"], {"train.memory": "recompute"}),
        (["gradient_checkpointing=false"], {"train.memory": "keep"}),
        (["torch_compile=true"], {"train.compile": "on"}),
        (["torch_compile=false"], {"train.compile": "off"}),
        (["max_seq_length=512"], {"data.max_length": 512}),
        (["warmup_steps=5"], {"optimizer.warmup_steps": 5}),
        (["warmup_steps=0.1"], {"optimizer.warmup_ratio": 0.1, "optimizer.warmup_steps": 0}),
        (["warmup_ratio=0.03"], {"optimizer.warmup_ratio": 0.03, "optimizer.warmup_steps": 0}),
        (["warmup_ratio=0"], {}),
        (["lr_scheduler_type=cosine"], {"optimizer.schedule": "cosine"}),
        (["lr_scheduler_type=constant"], {"optimizer.warmup_steps": 0}),
        (["lr_scheduler_type=constant_with_warmup", "warmup_steps=9"], {"optimizer.warmup_steps": 9}),
        (["per_device_train_batch_size=4", "gradient_accumulation_steps=8"],
         {"optimizer.micro_rows": 4, "optimizer.batch_rows": 32}),
        (["per_device_train_batch_size=4"], {"optimizer.micro_rows": 4, "optimizer.batch_rows": 4}),
        (["gradient_accumulation_steps=16"], {"optimizer.batch_rows": 16}),
        (["gradient_accumulation_steps=2", "optimizer.micro_rows=3"],
         {"optimizer.micro_rows": 3, "optimizer.batch_rows": 6}),
        (["seed=3"], {}),
        (["optim=adamw_torch"], {}),
        (["optim=adamw_torch_fused"], {}),
        (["optim=adamw_8bit"], {"optimizer.moments": "8bit"}),
        (["optim=adamw_bnb_8bit"], {"optimizer.moments": "8bit"}),
        (["optim=adamw_torch_8bit"], {"optimizer.moments": "8bit"}),
    ],
)
def test_what_a_name_becomes(given: list[str], becomes: dict[str, Any], tmp_path: Path) -> None:
    """The same in `--set` and in a file; each name is said with what it became."""
    base, reading = load_recipe("flare"), Reading()
    recipe = base.override(given, reading)
    assert changed(recipe, base) == becomes
    names = [text.partition("=")[0] for text in given]
    said = " ".join(reading.lines)
    assert all(f"{name} = " in said for name in names if (name in NAMES and name != "adam_beta2") or len(names) == 1)
    assert all(path in said for path in becomes if path not in names and "optimizer.micro_rows=3" not in given)

    def toml(text: str) -> str:
        name, _, value = text.partition("=")
        quoted = value if value in ("true", "false") or value[0].isdigit() else f'"{value}"'
        return f"{name} = {quoted}\n"

    file = tmp_path / "mine.toml"
    file.write_text('base = "flare"\n' + "".join(map(toml, given)))
    in_file, from_file = Reading(), load_recipe("flare").override(["name=mine"])
    assert changed(load_recipe(file, in_file), from_file) == becomes
    assert (in_file.lines, in_file.seed) == (reading.lines, reading.seed)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["learning_rate=1e-4", "optimizer.lr=1e-4"], "learning_rate and optimizer.lr are given, and are the same"),
        (["max_length=9", "max_seq_length=9"], "max_seq_length and data.max_length are given"),
        (["bf16=true", "optimizer.precision=float32"], "bf16 and optimizer.precision"),
        (["warmup_steps=3", "warmup_ratio=0.1"], "a warmup is given twice"),
        (["optimizer.warmup_steps=3", "warmup_ratio=0.1"], "a warmup is given twice"),
        (["optimizer.warmup_steps=3", "optimizer.warmup_ratio=0.1"], "a warmup is given twice"),
        (["lr_scheduler_type=constant", "warmup_steps=3"], "write constant_with_warmup"),
        (["lr_scheduler_type=polynomial"], "choose constant, constant_with_warmup, linear, cosine"),
        (["num_train_epochs=3"], "num_train_epochs is no key of a recipe: the length of a run is optimizer.steps"),
        (["optimizer.num_train_epochs=3"], "num_train_epochs is no key of a recipe: the length"),
        (["lora_r=8"], "lora_r is no key of a recipe: set adapter.rank"),
        (["adapter.lora_alpha=8"], "set adapter.alpha"),
        (["report_to=wandb"], "give --report-to"),
        (["fp16=true"], "give bf16 = true"),
        (["bf16=1"], "give true or false"),
        (["gradient_checkpointing=1"], "give true or false"),
        (["torch_compile=yes"], "give true or false"),
        (["torch_compile_mode=max-autotune"], "it is inductor's default"),
        (["gradient_checkpointing=true", "train.memory=keep"], "gradient_checkpointing and train.memory"),
        (["gradient_checkpointing_kwargs=x"], "leave it out"),
        (["optim=adafactor"], "the optimizer is AdamW"),
        (["optim=adamw_torch_4bit"], "the optimizer is AdamW (adamw_torch), with 8-bit moments (adamw_8bit) if wanted"),
        (["optim=paged_adamw_8bit"], "optim = 'paged_adamw_8bit' is not there"),
        (["optim=adamw_8bit", "optimizer.moments=float32"], "optim and optimizer.moments are given"),
        (["optimizer.moments=int8"], "optimizer.moments = 'int8' is not allowed; give"),
        (["eval_strategy=epoch"], "set evaluation.every"),
        (["save_total_limit=1"], "save.total_limit = 1 is not allowed; give a whole number, at least 2"),
        (["learning_rate=fast"], "optimizer.lr = 'fast' is not allowed"),
        (["gradient_accumulation_steps=0"], "gradient_accumulation_steps = 0 is not allowed"),
        (["seed=-1"], "seed = -1 is not allowed"),
    ],
)
def test_what_is_refused(given: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=r"^[^\n]*$") as caught:
        load_recipe("flare").override(given)
    assert words in str(caught.value)


def test_rows_per_process_need_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"set optimizer\.batch_rows, the rows of a step of all processes together"):
        load_recipe("flare").override(["per_device_train_batch_size=2"])


def test_levels(tmp_path: Path) -> None:
    """A name of either kind overrides what a base says under the other one; within a file both are refused."""
    base_text = 'learning_rate = 1e-4\nwarmup_ratio = 0.5\nmax_steps = 10\nadam_beta1 = 0.7\n'
    (tmp_path / "base.toml").write_text(base_text)
    top_text = 'base = "base.toml"\nadam_beta2 = 0.8\n[optimizer]\nlr = 2e-4\nwarmup_steps = 3\n'
    (tmp_path / "top.toml").write_text(top_text)
    base, top = (load_recipe(tmp_path / name).optimizer for name in ("base.toml", "top.toml"))
    assert (base.lr, base.warmup, base.betas, base.steps) == (1e-4, 5, (0.7, 0.999), 10)
    assert (top.lr, top.warmup, top.betas, top.steps) == (2e-4, 3, (0.7, 0.8), 10)
    (tmp_path / "both.toml").write_text("learning_rate = 1e-4\n[optimizer]\nlr = 1e-4\n")
    with pytest.raises(RecipeError, match=r"recipe .*both.toml: learning_rate and optimizer.lr are given"):
        load_recipe(tmp_path / "both.toml")


def test_a_warmup_by_ratio_follows_the_number_of_steps(tmp_path: Path) -> None:
    optimizer = load_recipe("flare").override(["warmup_ratio=0.1", "max_steps=25"]).optimizer
    assert (optimizer.warmup, optimizer.lr_at(0), optimizer.lr_at(2)) == (3, optimizer.lr / 3, optimizer.lr)
    file = tmp_path / "printed.toml"  # as `flarec recipes --toml` prints it, with every key
    printed = load_recipe("flare").override(["warmup_ratio=0.1"])
    file.write_text(printed.to_toml())
    assert load_recipe(file) == printed
    longer = load_recipe("flare").override(["warmup_ratio=0.1"]).override(["max_steps=200"]).optimizer
    assert longer.warmup == 20


def test_one_warmup_holds(tmp_path: Path) -> None:
    """The form that is given takes the place of the other one underneath, under whatever name, and says so."""
    file = tmp_path / "mine.toml"
    file.write_text("[optimizer]\nwarmup_ratio = 0.5\n")
    reading = Reading()
    assert load_recipe(file, reading).optimizer.warmup_steps == 0
    assert reading.lines == ["optimizer.warmup_steps = 0, instead of 100: the warmup is given otherwise"]
    for name in ("optimizer.warmup_steps", "warmup_steps"):
        reading = Reading()
        optimizer = load_recipe(file).override([f"{name}=7"], reading).optimizer
        assert (optimizer.warmup_ratio, optimizer.warmup) == (0, 7)
        assert reading.lines[-1] == "optimizer.warmup_ratio = 0, instead of 0.5: the warmup is given otherwise"


def test_the_seed_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "flare"\nseed = 5\n')
    file = str(tmp_path / "mine.toml")
    assert Options("m", recipe=file).seed == Options("m", recipe=file, seed=5).seed == 5
    assert Options("m", recipe=file, overrides=("seed=6",)).seed == 6
    with pytest.raises(RecipeError, match="--seed 4 and seed = 5 of the recipe are given"):
        Options("m", recipe=file, seed=4)


@pytest.mark.parametrize("text", ["max_steps=6", "optimizer.steps=6", "max_length=64", "data.max_length = 64"])
def test_an_option_and_the_key_that_it_stands_for(text: str) -> None:
    option = "--steps 5" if "steps" in text else "--max-length 32"
    with pytest.raises(RecipeError, match=f"^{option} and --set {text} are the same key: leave one of them out$"):
        Options("m", overrides=(text,), steps=5, max_length=32).load_recipe()
