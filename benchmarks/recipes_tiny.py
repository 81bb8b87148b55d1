"""Convert the bundled tiny model with each recipe and compare the checkpoints: `examples/demo.py` once per recipe.

    python benchmarks/recipes_tiny.py --device cuda --steps 200 --out benchmarks/results/tiny-recipes.json

Every recipe gets the same data order, steps and rows. The published rate (1e-5) is far too small for a model of this
size, so the runs that train all of it share one that suits it; adapters have that of their recipes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = (
    "optimizer.schedule=cosine", "optimizer.warmup_steps=20", "optimizer.batch_rows=4", "optimizer.micro_rows=4",
    "data.max_length=512", "evaluation.every=0",
)
FULL_RATE = "optimizer.lr=3e-4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--recipes", default="flare,draft,dual", help="names or files, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--commit", default=None, help="commit of the tree, where git cannot tell")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiny-recipes.json"))
    options = parser.parse_args()
    reports: dict[str, Any] = {}
    for recipe in options.recipes.split(","):
        reports[recipe] = _convert(recipe, options)
        if options.commit:
            reports[recipe]["run"]["commit"] = options.commit
        command = "python benchmarks/recipes_tiny.py " + " ".join(sys.argv[1:])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"command": command, "recipes": reports}, indent=1) + "\n")
    _print(reports)


def _convert(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--recipe", recipe, "--out", folder]
        command += ["--device", options.device, "--steps", str(options.steps), "--tasks", str(options.tasks)]
        rate = [] if recipe.startswith("adapter") else [FULL_RATE]
        for item in (*SHARED, *rate, *options.set):
            command += ["--set", item]
        subprocess.run(command, cwd=ROOT, check=True)
        report: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    return report


def _print(reports: dict[str, Any]) -> None:
    print("| recipe | mode | accuracy | loss | tokens per forward | seconds |\n|---|---|---|---|---|---|")
    for recipe, report in reports.items():
        for mode in ("source", "causal", "ar-trust", "diffusion-trust"):
            if mode not in report:
                continue
            row = report[mode]
            print(
                f"| {recipe} | {mode} | {row['accuracy']:.3f} | {row['loss']:.4f} | {row['tokens_per_forward']:.2f} "
                f"| {row['seconds']:.1f} |"
            )


if __name__ == "__main__":
    main()
