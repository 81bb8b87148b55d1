"""What benchmarks/train_steps.py makes of its measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.train_steps import chosen, length, rows_of, union

RATE, CLEAN = 790e12, 16384


def result(*tries: tuple[int, float, float], processed: int = CLEAN, heads: int = CLEAN) -> dict[str, Any]:
    """(micro rows, seconds, GiB)"""
    listed = [
        {"micro_rows": micro, "seconds": seconds, "spread": 0.0, "peak_gib": peak, "idle_share": 0.03,
         "processed": processed, "head_rows": heads}
        for micro, seconds, peak in tries
    ]
    return {"tries": listed, "parameters": 1_882_000_000, "head": 508_559_360}


def test_spans_that_overlap_count_once() -> None:
    assert union([(5, 9), (0, 2), (6, 7), (2, 3), (8, 11)]) == [(0, 3), (5, 11)]
    assert (length(union([(0, 4), (1, 2)])), length(union([]))) == (4, 0)


def test_the_fastest_that_fits_counts() -> None:
    found = result((4, 0.9, 90.0), (2, 1.0, 54.0), (1, 1.2, 50.0))
    assert chosen(found, 55.0) == found["tries"][1]
    assert chosen(found, None) == found["tries"][0]
    assert chosen(found, 10.0) == found["tries"][0], "the fastest, if none fits"
    assert chosen({"error": "no time left"}, 55.0) is None
    assert chosen({"tries": [{"micro_rows": 8, "error": "out of memory"}]}, None) is None


def test_rows_and_verdicts() -> None:
    results = {
        "stock": result((8, 0.644, 114.0), (4, 0.676, 66.0)),
        "flare": result((2, 1.2, 54.0), processed=3 * CLEAN, heads=2 * CLEAN),
        "draft": {"error": "no time left"},
    }
    rows = {line["name"]: line for line in rows_of(results, RATE, CLEAN)}
    assert rows["stock-us-per-token"]["value"] == 1e6 * 0.644 / CLEAN
    assert rows["flare-to-stock"]["value"] == 1.2 / 0.644
    assert rows["flare-to-stock"]["verdict"] == "met"
    body = 1_882_000_000 - 508_559_360
    mfu = 6 * (body * 3 + 508_559_360 * 2) * CLEAN / 1.2 / RATE
    assert rows["flare-mfu"]["value"] == mfu and rows["flare-mfu"]["verdict"] == ("met" if mfu >= 0.45 else "missed")
    assert rows["flare-peak"]["verdict"] == rows["flare-idle"]["verdict"] == "met"
    assert rows["stock-mfu"]["verdict"] == "reported"
    assert rows["draft-to-stock"]["status"] == "not measured"
    assert rows["draft-to-stock"]["message"] == "no time left"
    alone = {line["name"]: line for line in rows_of({"flare": results["flare"]}, RATE, CLEAN)}
    assert alone["flare-to-stock"]["value"] is None and "no stock step" in alone["flare-to-stock"]["message"]


def test_an_adapter_is_compared_with_fine_tuning_that_computes_again_too() -> None:
    results = {
        "ar-recompute": result((8, 0.7, 40.0), (4, 0.75, 36.0)),
        "adapter-recompute": result((8, 0.9, 25.0), (4, 1.0, 15.0)),
        "flare-recompute": result((4, 1.9, 44.0)),
    }
    rows = {line["name"]: line for line in rows_of(results, RATE, CLEAN)}
    memory = rows["adapter-recompute-memory-to-ar"]
    assert memory["value"] == 25.0 / 40.0 and "8 rows" in memory["title"] and memory["verdict"] == "missed"
    assert rows["adapter-recompute-peak"]["value"] == 15.0, "the fastest on a card of 24 GB"
    assert rows["adapter-recompute-peak"]["verdict"] == "met"
    assert rows["flare-recompute-peak"]["verdict"] == "aim reached"
