"""From the arms' results to one table: means over seeds, and the difference that every step of the ladder makes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.ladder.arms import STEPS

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
"""Two-sided 95 % quantiles of Student's t, by degrees of freedom."""
KEEPS = 0.9
"""Share of causal decoding's accuracy that a threshold must keep on the tasks that choose it."""


def values_of(result: dict[str, Any], source: dict[str, Any]) -> dict[str, float]:
    """The numbers of one arm with one seed."""
    found = {
        "AR loss change": result["loss"]["text"] - source["loss"]["text"],
        "AR loss change, tasks": result["loss"]["tasks"] - source["loss"]["tasks"],
        "accuracy, causal": _accuracy(result["causal"]),
    }
    if "ar-trust" in result:
        rows = result["ar-trust"]
        found |= {f"tokens per forward, {name}": _speed(rows[name]["all"]) for name in ("T=0", "T=1", "T=0 single")}
        if rows["T=0"]["loop-free"]["forwards"]:
            found["tokens per forward, T=0 loop-free"] = _speed(rows["T=0"]["loop-free"])
        found["tokens per forward, tasks"] = _speed(rows["tasks"])
    if "diffusion-trust" in result:
        curves = result["diffusion-trust"]
        threshold = chosen(curves["choose"], _accuracy(result["causal choose"]))
        row = curves["report"][threshold]
        found["Diffusion-Trust, threshold"] = float(threshold)
        found["Diffusion-Trust, accuracy"] = _accuracy(row)
        found["Diffusion-Trust, tokens per forward"] = _speed(row)
        if result["causal"]["right"]:
            found["Diffusion-Trust, of causal accuracy"] = row["right"] / result["causal"]["right"]
        for name, at in curves["report"].items():
            found[f"Diffusion-Trust at {name}, accuracy"] = _accuracy(at)
            found[f"Diffusion-Trust at {name}, tokens per forward"] = _speed(at)
    return found


def chosen(curve: dict[str, dict[str, Any]], base: float) -> str:
    """The smallest threshold that keeps `KEEPS` of an accuracy, else the most accurate one."""
    good = [name for name, row in curve.items() if _accuracy(row) >= KEEPS * base]
    return min(good, key=float) if good else max(curve, key=lambda name: (_accuracy(curve[name]), float(name)))


def summarised(results: Sequence[dict[str, Any]], source: dict[str, Any]) -> dict[str, Any]:
    """{"arms": {name: {value: mean, interval, by seed}}, "steps": [difference of every step, paired by seed],
    "failed": [...]}. Intervals are Student's, 95 %, over seeds; none for one seed."""
    by_arm: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    failed = []
    for result in results:
        if "error" in result:
            failed.append({name: result[name] for name in ("arm", "seed", "error")})
        else:
            by_arm[result["arm"]][result["seed"]] = values_of(result, source)
    table = {
        arm: {
            name: _spread({seed: values[name] for seed, values in seeds.items() if name in values})
            for name in dict.fromkeys(key for values in seeds.values() for key in values)
        }
        for arm, seeds in by_arm.items()
    }
    steps = []
    for step, with_it, without in STEPS:
        shared = sorted(by_arm.get(with_it, {}).keys() & by_arm.get(without, {}).keys())
        if shared:
            pairs = [(seed, by_arm[with_it][seed], by_arm[without][seed]) for seed in shared]
            names = [name for name in pairs[0][1] if all(name in one and name in other for _, one, other in pairs)]
            found = {name: _spread({seed: one[name] - other[name] for seed, one, other in pairs}) for name in names}
            steps.append({"step": step, "arm": with_it, "against": without, "difference": found})
    return {"arms": table, "steps": steps, "failed": failed}


def _spread(by_seed: dict[int, float]) -> dict[str, Any]:
    count, mean = len(by_seed), sum(by_seed.values()) / len(by_seed)
    interval = None
    if count > 1:
        error = math.sqrt(sum((value - mean) ** 2 for value in by_seed.values()) / (count - 1) / count)
        half = T95[count - 1] * error
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "by_seed": by_seed}


def _accuracy(row: dict[str, Any]) -> float:
    return float(row["right"] / row["prompts"])


def _speed(row: dict[str, Any]) -> float:
    return float(row["tokens"] / row["forwards"])
