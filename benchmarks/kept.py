"""What a training step keeps for its backward pass: eager, as the partitioner of the compiler says, and compiled.

    python -m benchmarks.kept --out kept.json --commit $(git rev-parse HEAD)

A few layers of the 2 B shape, one pass of `--micro` rows. "counted" is what `train.memory = auto` looks at
(`flarec.ir.partition`); it should keep what "compiled" does. Without a GPU: `--shape tiny --length 64`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flarec.bench.shapes import SHAPES, build
from flarec.bench.training.part import GIB, Steps, lowered, stream
from flarec.bench.training.shapes import AHEAD_LAYERS, RECIPES, PartPlan
from flarec.ir.compiled import Codes
from flarec.ir.partition import PartitionedCodes
from flarec.train.loop import Trainer
from flarec.train.memory import Kept

CODES: dict[str, Callable[[], Codes]] = {
    "eager": lambda: Codes("eager"), "counted": PartitionedCodes, "compiled": Codes,
}


class Listed(Kept):
    """Also by shape and dtype."""

    def __init__(self, program: Any) -> None:
        super().__init__(program)
        self.listed: Counter[str] = Counter()

    def _note(self, tensor: Tensor) -> Tensor:
        before = self.bytes
        found = super()._note(tensor)
        if not isinstance(tensor, FakeTensor) and self.bytes != before:
            self.listed[f"{tuple(tensor.shape)} {tensor.dtype}"] += self.bytes - before
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="2B", choices=[*SHAPES])
    parser.add_argument("--part", default="flare", choices=[*RECIPES])
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    plan = PartPlan(options.part, options.shape, options.device, options.micro, options.length, (options.micro,), "on")
    model = build(options.shape, options.device, layers=AHEAD_LAYERS)
    program, mask = lowered(plan, model, *RECIPES[options.part])
    steps, found = Steps(plan, model, program, mask), dict[str, Any]()
    for name, codes in CODES.items():
        begin = time.perf_counter()
        data = stream(plan, model.config.vocab_size)
        trainer = Trainer(program, steps.recipe(options.micro), mask, data, seed=0, codes=codes())
        batches = trainer.feed.take(0).batches
        trainer.accumulate(batches)
        trainer.weights.forget()
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with Listed(trainer.program) as kept:
            trainer.accumulate(batches)
        peak = torch.cuda.max_memory_allocated() - before if cuda else 0
        trainer.weights.forget()
        found[name] = {"kept_gib": kept.bytes / GIB, "peak_gib": peak / GIB, "seconds": time.perf_counter() - begin,
                       "largest": kept.listed.most_common(24)}
        print(name, {key: value for key, value in found[name].items() if key != "largest"}, flush=True)
        for what, size in found[name]["largest"][:12]:
            print(f"   {size / GIB:8.4f} GiB  {what}", flush=True)
        del trainer, kept
        if options.out:
            name_of = torch.cuda.get_device_name() if cuda else platform.processor()
            versions = {"torch": torch.__version__, "python": platform.python_version()}
            given = {key: str(value) for key, value in vars(options).items()}
            record = {"what": __doc__, "device": name_of, "versions": versions, **given, "found": found}
            options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
