"""Names of transformers' `TrainingArguments` in recipes and `--set`: what each of them is here, or why it is nothing.

They stand at the top of a recipe file, as bare names. What a name becomes is said in a line; a name beside the key that
it stands for is refused, and so is one that has no meaning here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.fields import LARGEST, is_number, limits, shown
from ..errors import RecipeError

_STEPS, _RATIO = _WARMUPS = ("optimizer.warmup_steps", "optimizer.warmup_ratio")
DIRECT = {
    "learning_rate": "optimizer.lr",
    "max_steps": "optimizer.steps",
    "warmup_steps": _STEPS,
    "warmup_ratio": _RATIO,
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip",
    "eval_steps": "evaluation.every",
    "save_steps": "save.every",
    "save_total_limit": "save.total_limit",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
}
"""Names that only have another name here."""


def spellings(path: str) -> set[str]:
    """Names under which a key can be given."""
    return {path, *(name for name, own in DIRECT.items() if own == path)}


SEED = "seed"
_SWITCHES = {
    "gradient_checkpointing": ("train.memory", "recompute", "keep"),
    "torch_compile": ("train.compile", "on", "off"),
}
_SPECIAL = (
    "adam_beta1", "adam_beta2", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type",
    "bf16", "fp16", *_SWITCHES, "optim", "eval_strategy", "save_strategy", "logging_steps",
    "logging_strategy", SEED,
)
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
_FLOAT32, _EIGHT_BIT = ("adamw_torch", "adamw_torch_fused"), ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")
"""AdamW among transformers' optimizers, by what its moments are kept in; those that page them are not here."""
REFUSED = {
    "num_train_epochs": "the length of a run is optimizer.steps (--dry-run says how many epochs that is)",
    "per_device_eval_batch_size": "held-out documents are scored optimizer.micro_rows at a time",
    "eval_accumulation_steps": "leave it out, evaluations keep no logits",
    "gradient_checkpointing_kwargs": "leave it out, what is computed again are decoder layers",
    "lr_scheduler_kwargs": "schedules have no options; optimizer.schedule is constant, linear or cosine",
    "label_smoothing_factor": "losses are those of diffusion.loss",
    "packing": "rows are always packed (data.lookahead)",
    "remove_unused_columns": "leave it out, records may hold more than what is read",
    "dataloader_num_workers": "leave it out, inputs are made a step ahead on a GPU",
    "group_by_length": "leave it out, the packer fills rows",
    "load_best_model_at_end": "leave it out, the checkpoint is that of the last step",
    "metric_for_best_model": "leave it out, the checkpoint is that of the last step",
    "output_dir": "give --out",
    "overwrite_output_dir": "give --overwrite",
    "resume_from_checkpoint": "give --resume",
    "report_to": "give --report-to",
    "run_name": "runs are named after --out",
    "push_to_hub": "give --push-to-hub REPO",
    "hub_model_id": "give --push-to-hub REPO",
    "data_seed": "give --seed, of data order and noise",
    "tf32": "leave it out, optimizer.precision is bf16 or float32",
    "deepspeed": "there is none",
    "fsdp": "there is none in a recipe",
    "torch_compile_backend": "it is inductor",
    "torch_compile_mode": "it is inductor's default",
    "use_liger_kernel": "give --kernels",
    "neftune_noise_alpha": "there is none",
    "do_train": "leave it out",
    "do_eval": "set evaluation.every, 0 for none",
    "use_peft": "give --recipe adapter",
    "lora_r": "set adapter.rank, or give --recipe adapter",
    "lora_alpha": "set adapter.alpha",
    "lora_dropout": "leave it out, an adapter has no dropout",
    "lora_target_modules": "set adapter.targets",
    "target_modules": "set adapter.targets",
    "load_in_4bit": "set adapter.base = nf4, with a recipe that has an adapter",
    "load_in_8bit": "set adapter.base = int8, with a recipe that has an adapter",
    "bnb_4bit_quant_type": "set adapter.base = nf4",
    "bnb_4bit_use_double_quant": "leave it out, scales of adapter.base = nf4 always are codes, too",
    "bnb_4bit_compute_dtype": "leave it out, products are computed in optimizer.precision",
}
"""Names without a counterpart, those of adapters in trl among them, and what to do instead."""
NAMES = {*DIRECT, *_SPECIAL, *REFUSED}


def check_not_refused(name: str) -> None:
    """Raise `RecipeError` with what to do for a name that has no counterpart here."""
    if name in REFUSED:
        raise RecipeError(f"{name} is no key of a recipe: {REFUSED[name]}")


@dataclass
class Reading:
    """What was found while a recipe was read: the files, what names of transformers became, and a seed among them."""

    files: list[Path] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    seed: int | None = None


class _Names:
    """Aliases of one level (a file, or all `--set`) to own keys. own: keys of that level; below: values underneath."""

    def __init__(self, given: Mapping[str, Any], own: Mapping[str, Any], below: Callable[[str], Any]) -> None:
        self.given = dict(given)
        self.own = own
        self.below = below
        self.found: dict[str, Any] = {}
        self.reading = Reading()

    def put(self, name: str, path: str, value: Any) -> None:
        if path in self.own or path in self.found:
            raise RecipeError(f"{name} and {path} are given, and are the same: leave one of them out")
        self.found[path] = value
        self.say(name, f"{path} = {_written(value)}")

    def say(self, name: str, what: str) -> None:
        self.reading.lines.append(f"{name} = {_written(self.given[name])}: {what}")

    def instead(self, path: str, none: float) -> None:
        """The other form of a key that is given takes the place of what is underneath."""
        self.found[path] = none
        if before := self.below(path):
            self.reading.lines.append(f"{path} = {none:g}, instead of {before:g}: the warmup is given otherwise")

    def read(self) -> None:
        for name in self.given:
            check_not_refused(name)
        for name, path in DIRECT.items():
            if name in self.given:
                self._direct(name, path, self.given[name])
        self._betas()
        self._rows()
        self._schedule()
        self._precision()
        self._switches()
        self._rest()

    def _direct(self, name: str, path: str, value: Any) -> None:
        if name == "warmup_steps" and isinstance(value, float) and 0 < value < 1:  # as transformers reads it
            path = _RATIO
        self.put(name, path, value)

    def _betas(self) -> None:
        names = [name for name in ("adam_beta1", "adam_beta2") if name in self.given]
        if names:
            betas = list(self.below("optimizer.betas"))
            for name in names:
                betas[int(name[-1]) - 1] = self.given[name]
            self.put(names[0], "optimizer.betas", betas)

    def _rows(self) -> None:
        """Rows of a forward pass and passes of a step; the rows of a step follow."""
        passes = [name for name in ("per_device_train_batch_size", "gradient_accumulation_steps") if name in self.given]
        if not passes:
            return
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            raise RecipeError(
                f"{passes[0]} counts for one process, and there are several: set optimizer.batch_rows, the rows of a "
                "step of all processes together, and optimizer.micro_rows, those of a forward pass"
            )
        rows = self._count(passes[0]) if passes[0].startswith("per") else None
        if rows is not None:
            self.put(passes[0], "optimizer.micro_rows", rows)
        micro = rows or self.own.get("optimizer.micro_rows") or self.below("optimizer.micro_rows")
        accumulated = self._count(passes[-1]) if passes[-1].startswith("gradient") else 1
        self.put(passes[-1], "optimizer.batch_rows", int(micro) * accumulated)

    def _count(self, name: str) -> int:
        value = self.given[name]
        if not is_number(value, int, limits(low=1, high=LARGEST)):
            raise RecipeError(f"{name} = {shown(value)} is not allowed; give a whole number, at least 1")
        return int(value)

    def _schedule(self) -> None:
        name = "lr_scheduler_type"
        if name not in self.given:
            return
        kind = self.given[name]
        if kind not in _SCHEDULES:
            raise RecipeError(f"{name} = {shown(kind)} is not there; choose {', '.join(_SCHEDULES)}")
        self.put(name, "optimizer.schedule", _SCHEDULES[kind])
        if kind == "constant":
            if any(self.found.get(path) or self.own.get(path) for path in _WARMUPS):
                raise RecipeError(f"{name} = constant has no warmup in transformers; write constant_with_warmup")
            if not any(path in self.found or path in self.own for path in _WARMUPS):
                self.put(name, _STEPS, 0)

    def _precision(self) -> None:
        if self.given.get("fp16"):
            raise RecipeError("fp16 is not there; give bf16 = true, or optimizer.precision")
        for name in ("bf16", "fp16"):
            if name in self.given and type(self.given[name]) is not bool:
                raise RecipeError(f"{name} = {shown(self.given[name])} is not allowed; give true or false")
        if "bf16" in self.given:
            self.put("bf16", "optimizer.precision", "bf16" if self.given["bf16"] else "float32")
        elif "fp16" in self.given:
            self.say("fp16", "so it is here")

    def _switches(self) -> None:
        """What is true or false there and has names here."""
        for name, (path, yes, no) in _SWITCHES.items():
            if name in self.given:
                value = self.given[name]
                if type(value) is not bool:
                    raise RecipeError(f"{name} = {shown(value)} is not allowed; give true or false")
                self.put(name, path, yes if value else no)

    def _rest(self) -> None:
        given = self.given
        if "optim" in given:
            if given["optim"] not in (*_FLOAT32, *_EIGHT_BIT):
                raise RecipeError(
                    f"optim = {shown(given['optim'])} is not there; the optimizer is AdamW (adamw_torch), with 8-bit "
                    "moments (adamw_8bit) if wanted"
                )
            self.put("optim", "optimizer.moments", "8bit" if given["optim"] in _EIGHT_BIT else "float32")
        for name, path in (("eval_strategy", "evaluation.every"), ("save_strategy", "save.every")):
            if given.get(name) == "no" and name == "eval_strategy":
                self.put(name, path, 0)
            elif name in given and given[name] != "steps":
                raise RecipeError(f"{name} = {shown(given[name])} is not there; it goes by steps, set {path}")
            elif name in given:
                self.say(name, f"so it is here ({path})")
        for name in ("logging_steps", "logging_strategy"):
            if name in given:
                self.say(name, "every step is logged, to metrics.jsonl and --report-to")
        if SEED in given:
            if not is_number(given[SEED], int, limits(low=0, high=LARGEST)):
                raise RecipeError(f"seed = {shown(given[SEED])} is not allowed; give a whole number, at least 0")
            self.reading.seed = given[SEED]
            self.say(SEED, "--seed")


def translated(
    given: Mapping[str, Any], own: Mapping[str, Any], below: Callable[[str], Any], reading: Reading | None = None
) -> dict[str, Any]:
    """Own keys, by their dotted paths, of the aliases `given`. Raises `RecipeError`.

    own: keys of the same file or command; below: the value of a key in what they are put over. What they became is
    noted in `reading`.
    """
    names = _Names(given, own, below)
    names.read()
    found = names.found
    both = {**own, **found}
    if all(path in both for path in _WARMUPS):
        if all(both[path] for path in _WARMUPS) or any(path in found for path in _WARMUPS):
            raise RecipeError("a warmup is given twice, in steps and as a part of the run: leave one of them out")
    elif _STEPS in both:
        names.instead(_RATIO, 0.0)
    elif both.get(_RATIO):
        names.instead(_STEPS, 0)
    if reading is not None:
        reading.lines += names.reading.lines
        reading.seed = reading.seed if names.reading.seed is None else names.reading.seed
    return found


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
