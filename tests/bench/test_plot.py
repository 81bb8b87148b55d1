"""The picture: which curves a results file gives, and what it says to files without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from flarec.bench import rows as kernels
from flarec.bench.figures import FORMATS, write_figure
from flarec.bench.plot import curves
from flarec.bench.rates import is_decoding, rates
from flarec.bench.serving import rows as serving
from flarec.bench.training import rows as training
from flarec.cli import main


def row(name: str, value: float, **values: float) -> dict[str, Any]:
    return {"name": name, "status": "measured", "value": value, "values": values}


ROWS = [
    row("linear-train", 1.2, ours_ms=5.0, baseline_ms=4.0),
    row("linear-block-8", 0.9, ours_ms=4.5, block_4_ms=5.0),
    row("linear-block-1", 1.1, ours_ms=5.5, block_4_ms=5.0),
    row("one-view-block-4", 3.0),
    {"name": "one-view-block-8", "status": "failed", "value": None, "values": {}},
    row("simple-block-4", 120.0),
    row("virtual-queries-block-4", 28.0),
]


def test_curves_join_what_was_measured() -> None:
    assert curves({item["name"]: item for item in ROWS}) == {
        "flarec, two views": [(1, 5.5), (4, 5.0), (8, 4.5)],
        "flarec, one view": [(4, 3.0)],
        "library calls, virtual queries, one view": [(4, 28.0)],
        "library calls, stored states, one view": [(4, 120.0)],
    }


DECODING = [
    row("causal-step-1", 0.4, ours_ms=2.0, stock_graph_ms=5.0),
    row("ar-trust-step-1", 1.2, ar_trust_ms=2.5, causal_ms=2.0),
    row("ar-trust-step-8", 1.2, ar_trust_ms=3.0, causal_ms=2.5),
    row("ar-trust-rate-8", 5.0, tokens_per_s=6000.0, stock_graph_tokens_per_s=1200.0),
    row("ar-trust-step-1-eager", 50.0),
    {"name": "ar-trust-rate-32", "status": "not measured", "value": None, "values": {}},
]


def test_rates_of_decoding(tmp_path: Path) -> None:
    assert rates({item["name"]: item for item in DECODING}) == {
        "AR-Trust": [(8, 6000.0)],
        "causal": [(1, 500.0), (8, 3200.0)],
        "transformers, static cache, CUDA graph": [(1, 200.0), (8, 1200.0)],
    }
    results, out = tmp_path / "results.json", tmp_path / "rates.svg"
    results.write_text(json.dumps({"rows": DECODING}))
    done = CliRunner().invoke(main, ["bench", "plot", str(results), "--out", str(out)])
    assert done.exit_code == 0 and b"tokens per second" in out.read_bytes(), done.output


def test_every_format_that_is_named_is_drawn_and_no_other(tmp_path: Path) -> None:
    """The help names them, and so does what is said of another one; pgf needs LaTeX."""
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": ROWS}))
    said = " ".join(CliRunner().invoke(main, ["bench", "plot", "--help"]).stdout.split())
    assert f"format: {', '.join(FORMATS[:-1])} or {FORMATS[-1]}." in said
    assert set(FORMATS) == set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"}
    for suffix in ("webp", "eps"):
        write_figure(Figure(figsize=(1, 1)), tmp_path / f"out.{suffix}")
    done = CliRunner().invoke(main, ["bench", "plot", str(results), "--out", str(tmp_path / "out.pgf")])
    assert done.exit_code == 2 and f"no picture 'pgf'); give {', '.join(FORMATS)}" in done.stderr


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_command_draws(tmp_path: Path, suffix: str) -> None:
    results, out = tmp_path / "results.json", tmp_path / f"blocks.{suffix}"
    results.write_text(json.dumps({"rows": ROWS}))
    done = CliRunner().invoke(main, ["bench", "plot", str(results), "--out", str(out)])
    assert done.exit_code == 0, done.output
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        assert b"stored states" in content and b"block size" in content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{}", "holds no results"),
        ("[", "holds no results"),
        ('{"rows": []}', "no measured block sizes"),
        (json.dumps({"rows": [{**ROWS[0], "status": "failed"}]}), "no measured block sizes"),
        (json.dumps({"rows": [row("sampling-16", 0.1)]}), "has no measured steps to draw; run `flarec bench decode`"),
        (json.dumps({"rows": [{**DECODING[1], "status": "failed"}]}), "no measured steps"),
        (json.dumps({"rows": [row("stock-step", 1.0)]}),
         "rows that have no picture (stock-step); give what `flarec bench kernels` or `flarec bench decode` wrote"),
        ('{"rows": [{"mode": "causal", "clients": 1}]}', "`flarec bench kernels` or `flarec bench decode`"),
    ],
)
def test_files_that_hold_nothing_to_draw(tmp_path: Path, text: str | None, words: str) -> None:
    results = tmp_path / "results.json"
    if text is not None:
        results.write_text(text)
    done = CliRunner().invoke(main, ["bench", "plot", str(results), "--out", str(tmp_path / "out.svg")])
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "out.svg").exists()


def test_rows_of_decoding_are_known_by_their_names() -> None:
    assert all(is_decoding({case.name: {}}) for case in serving.ROWS)
    others = [row.name for row in kernels.ROWS] + [case.name for case in training.ROWS]
    assert not any(is_decoding({name: {}}) for name in others)
