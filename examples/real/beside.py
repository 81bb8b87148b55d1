"""What `keeps.py` measured of a model beside what it measured of its source, prompt by prompt."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flarec.evaluation.statistics import interval, paired

RESAMPLES = 2000


def mean(values: Sequence[float], places: Sequence[int]) -> float:
    return sum(values[place] for place in places) / len(places)


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Sum of the firsts over that of the seconds, with its 95 % interval from a bootstrap over pairs; None over 0."""
    draw, values = random.Random(0), list[float]()
    for _ in range(RESAMPLES):
        chosen = draw.choices(pairs, k=len(pairs))
        below = sum(second for _, second in chosen)
        values += [sum(first for first, _ in chosen) / below] if below else []
    below = sum(second for _, second in pairs)
    if not below:
        return {"ratio": None, "interval": None}
    values.sort()
    return {"ratio": sum(first for first, _ in pairs) / below,
            "interval": [values[int(0.025 * len(values))], values[int(0.975 * len(values)) - 1]]}


def accuracy(own: Sequence[int], source: Sequence[int]) -> dict[str, Any]:
    """Of the same tasks: both accuracies with Wilson's intervals, the paired comparison, the ratio."""
    return {
        "tasks": len(own), "accuracy": sum(own) / len(own), "interval": list(interval(own)),
        "source": sum(source) / len(source), "source_interval": list(interval(source)),
        "paired": asdict(paired(own, source)), "to_source": ratio(list(zip(own, source, strict=True))),
    }


def compared(kept: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What a row says, of what `keeps.py` measured of it and of the source; parts that are missing say why."""
    found: dict[str, Any] = {}
    missing = {"error": "not measured"}
    for split in ("choose", "report") if "choose" in kept else ("report",):
        own = kept.get(split, missing)
        if "error" in own:
            found[split] = own
            continue
        right, theirs = own["right"], base[split]["right"]
        groups: dict[str, list[int]] = {}
        for place in base["counted"][split]:
            for name in base["named"][split][place]:
                groups.setdefault(name, []).append(place)
        everything = base["counted"][split]
        found[split] = {
            **accuracy([right[place] for place in everything], [theirs[place] for place in everything]),
            "equal_answers": sum(one == two for one, two in zip(own["answers"], base[split]["answers"], strict=True)),
            "answers": len(right),
            "by_group_and_kind": {
                name: {"tasks": len(places), "accuracy": mean(right, places), "source": mean(theirs, places)}
                for name, places in groups.items()
            },
        }
    found["texts"] = texts(kept.get("texts", missing), base.get("texts", missing))
    found["drafts"] = kept.get("drafts", missing)
    for part in ("denoise", "elastic"):
        if part in kept:
            found[part] = kept[part] if "error" in kept[part] else _at_threshold(kept[part])
    return found


def _at_threshold(part: dict[str, Any]) -> dict[str, Any]:
    """Beside causal decoding of the same weights, which is "source" in `accuracy`."""
    own, causal = part["report"], part["causal"]
    found = {name.replace("source", "causal"): value for name, value in accuracy(own["right"], causal["right"]).items()}
    return {"choose": part["choose"], "causal, choose": part["causal, choose"], "threshold": part["threshold"],
            "recheck": part["recheck"], **found,
            "equal_answers": sum(one == two for one, two in zip(own["answers"], causal["answers"], strict=True)),
            "tokens_per_forward": ratio(list(zip(own["tokens"], own["forwards"], strict=True)))}


def texts(own: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Loss of the texts in nats per token and perplexity, of both; their ratio is exp of the difference."""
    if "error" in own or "error" in source:
        return {"error": own.get("error") or source.get("error")}
    tokens = own["tokens"]
    apart = ratio([(one - two, count) for one, two, count in zip(own["nats"], source["nats"], tokens, strict=True)])
    loss, theirs = sum(own["nats"]) / sum(tokens), sum(source["nats"]) / sum(tokens)
    return {"texts": len(tokens), "tokens": sum(tokens), "loss": loss, "source_loss": theirs,
            "perplexity": math.exp(loss), "source_perplexity": math.exp(theirs), "loss_change": apart["ratio"],
            "loss_change_interval": apart["interval"], "perplexity_to_source": math.exp(apart["ratio"]),
            "perplexity_to_source_interval": [math.exp(end) for end in apart["interval"]]}


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """As Markdown: ratios to the source with intervals, tokens per forward of loop-free answers."""
    print("| recipe | rate | accuracy to the source's | p | perplexity to the source's | T = 0 | T = 1 | unverified |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [name, row.get("rate", ""), row.get("error", "")]
        if "report" in row and "error" not in row["report"]:
            kept = row["report"]
            cells[2:] = [_span(kept["to_source"]["ratio"], kept["to_source"]["interval"]),
                         f"{kept['paired']['p_value']:.2g}"]
            told = row["texts"]
            cells.append("" if "error" in told else _span(told["perplexity_to_source"],
                                                         told["perplexity_to_source_interval"]))
            for temperature in ("T=0", "T=1"):
                free = row["drafts"].get(temperature, {}).get("loop-free")
                cells.append(_span(free["tokens_per_forward"], free["interval"]) if free else "")
            bold = row.get("denoise") or row.get("elastic") or {}
            if "threshold" in bold:
                tokens = bold["tokens_per_forward"]["ratio"]
                cells.append(f"{bold['accuracy']:.2f} of {bold['causal']:.2f} at {tokens:.2f} "
                             f"(threshold {bold['threshold']}, "
                             f"recheck {bold['recheck']})")
        print("| " + " | ".join(cells) + " |")


def _span(value: float | None, ends: Sequence[float] | None) -> str:
    return "" if value is None or ends is None else f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
