"""The page: numbers are those that were recorded, what is not is said, and nothing that a model says is markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flarec.checkpoint.manifest import DecodeDefaults, Manifest, Source
from flarec.decode.request import Origin
from flarec.errors import UsageError
from flarec.report import EvaluationRecord, Recorded, Sample, chapters, to_html, to_markdown
from flarec.report.chapters import MOST_ROWS, NO_CURVE, NO_EVALUATION, NO_RECORD, Topic
from flarec.report.figures import MOST_POINTS, Figure, thinned
from flarec.report.recorded import SPAN, read_evaluations, read_recorded
from flarec.train.mask_token import MaskToken

EVIL = '</pre><script>alert("x")</script><img src=http://x/y onerror=z> & `` ``` | $x$ [a](b)'
MANIFEST = Manifest(Source("origin"), MaskToken("row", 7), DecodeDefaults(3, {"ar-trust": "causal"}))


class Markup(HTMLParser):
    """Tags of a page with their attributes, and the text in elements of a class."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.spans: list[tuple[str | None, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "span":
            self.spans.append((self.tags[-1][1].get("class"), data))


def run(steps: int = 5, **values: Any) -> Recorded:
    lines = [{"step": n, "ar_loss": 1 / n, "diffusion_loss": 2.5, **values} for n in range(1, steps + 1)]
    held = {
        "ar_loss": 0.75, "all_masked_accuracy": [0.5, None, 0.125], "one_minus_tv": [0.25], "expected_accepted": None,
        "tokens_per_forward": 1.875,
    }
    return Recorded("mine", MANIFEST, lines, [{"step": 0, "evaluation": held}])


def record(mode: str = "ar-trust", **changes: Any) -> dict[str, Any]:
    answers = [{"origins": "caax" * 8}, {"origins": "c" * SPAN}, {"origins": "caa"}]
    return {
        "record": "flarec evaluation", "format_version": 1, "model": {"name": "other"}, "data": {"name": "d.jsonl"},
        "settings": {}, "options": {"temperature": 0.5},
        "result": {"mode": mode, "forwards": 30, "generated": 3, "tokens_per_forward": 1.625, "accuracy": 0.5,
                   "accuracy_interval": [0.25, 0.875], "answers": 3}, "answers": answers, **changes,
    }


def part_of(run: Recorded, records: list[EvaluationRecord], title: str, number: int = 0) -> Topic:
    return next(chapter for chapter in chapters(run, records) if chapter.title == title).parts[number]


def points(part: Topic) -> dict[str, list[tuple[float, float]]]:
    assert part.figure is not None and part.table is not None
    return {name: list(found) for name, found in part.figure.series.items()}


def test_numbers_are_those_of_the_metrics() -> None:
    assert points(part_of(run(2), [], "Losses")) == {"training": [(1, 1), (2, 0.5)], "held out": [(0, 0.75)]}
    assert points(part_of(run(), [], "Held-out probes")) == {"position 1": [(0, 0.5)], "position 3": [(0, 0.125)]}
    assert part_of(run(), [], "Held-out probes", 2).note == NO_EVALUATION, "None is no number"
    assert points(part_of(run(), [], "Tokens per forward")) == {"held-out": [(0, 1.875)]}


def test_the_curve_of_settings() -> None:
    title = "Accuracy at tokens per forward, by setting"
    assert part_of(run(), [], title).note == NO_CURVE
    row = {"accuracy": 0.5, "accuracy_interval": [0.25, 0.75], "answers": 4}
    curve = [{**row, "threshold": t, "recheck": f, "tokens_per_forward": 2 + t} for f in (0, 1) for t in (0.5, 0.25)]
    table = {"curve": curve, "causal": {"choosing": {**row, "tokens_per_forward": 1}},
             "chosen": {"threshold": 0.5, "recheck": 1}, "reported": {**row, "tokens_per_forward": 3}}
    measured = replace(MANIFEST, metrics={"tuning": {"elastic": table}})
    part = part_of(replace(run(), manifest=measured), [], title)
    assert points(part) == {
        "causal": [(1, 0.5)], "recheck 0": [(2.5, 0.5), (2.25, 0.5)], "recheck 1": [(2.5, 0.5), (2.25, 0.5)],
        "recheck 1, reporting": [(3, 0.5)],
    }
    assert part.table is not None and len(part.table.rows) == 6 and "recheck of 1 has most" in part.note


def test_tables_show_the_rare_points_too() -> None:
    often = run(500)
    held = [{"step": step, "evaluation": {"ar_loss": step / 1000}} for step in (0, 111, 222)]
    table = part_of(replace(often, evaluations=held), [], "Losses").table
    assert table is not None and len(table.rows) == MOST_ROWS + len(held)
    assert [row for row in table.rows if row[2] != "-"] == [
        ["0", "-", "0"], ["111", "0.009009", "0.111"], ["222", "0.004505", "0.222"],
    ]
    assert [table.rows[1][0], table.rows[-1][0]] == ["1", "500"]


def test_an_answer_that_was_cut_behind_a_draft() -> None:
    """Its last forward has no token of the clean stream: 4 forwards for 16 tokens, not 3."""
    for text, forwards in (("caaaaxaaaaxaaaaa", 4), ("caaaaxaaaaxaaaax", 4), ("c" + "a" * 15 + "x", 1)):
        found = EvaluationRecord("a", True, record(answers=[{"origins": text}]))
        assert found.by_position() == [(8, SPAN / forwards)], text


def test_steps_are_whole() -> None:
    drawn = Figure("t", "step", "share", {"one": [(0, 0.5), (2, 1.0)]}, {}).svg()
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert {"0", "1", "2", "step", "share"} <= set(shown) and "1.5" not in shown


def test_every_curve_is_told_from_the_others() -> None:
    """Those of as many positions as a block may have, and names that matplotlib's legends leave out."""
    names = [*(f"position {number}" for number in range(1, 31)), "_mine", "x" * 200]
    drawn = Figure("t", "step", "share", {name: [(0, 0.5), (1, 0.25)] for name in names}, {}).svg()
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert {name.strip()[:77] for name in names} <= {text.strip().removesuffix("...") for text in shown}
    looks = re.findall(r'<path [^>]*style="(fill: none;[^"]*stroke: var.--series[^"]*)"', drawn)
    assert len(set(looks)) == len(names)


def test_the_least_even_expert_layer() -> None:
    router = {"layers": [0, 1], "clean": {"max_over_mean": [1.5, 2.5], "entropy": [0.9, 0.75]},
              "noisy": {"max_over_mean": [None, 4.0], "entropy": [None, None]}}
    busiest, entropy = (part_of(run(1, router=router), [], "Router load", n) for n in (0, 1))
    assert points(busiest) == {"clean rows": [(1, 2.5)], "noisy rows": [(1, 4.0)]}
    assert points(entropy) == {"clean rows": [(1, 0.75)]}


def test_numbers_are_those_of_records() -> None:
    records = [EvaluationRecord("a.json", True, record()), EvaluationRecord("a.json", False, record())]
    position, heat = (part_of(run(), records, "Tokens per forward", n) for n in (1, 2))
    # of 16 tokens 4 + 4 end a forward in the first answer, all in the second; then 8 of 16 in the first alone
    assert list(points(position)) == ["1: a.json", "2: a.json"]
    assert points(position)["1: a.json"] == [(8, 32 / (8 + 16)), (24, 2)]
    expected = [(0.5, 1.625)]
    assert points(heat) == {"ar-trust, d.jsonl": expected, "other, ar-trust, d.jsonl": expected}
    faster = EvaluationRecord("b.json", True, record(result={"mode": "ar-trust", "tokens_per_forward": 2.5}))
    table = part_of(run(), [records[0], faster], "Tokens per forward", 2).table
    assert table is not None
    assert [(row[0], row[-1]) for row in table.rows] == [("1: a.json", "1.625"), ("2: b.json", "2.5")]
    accuracy = part_of(run(), records[:1], "Accuracy against forwards")
    assert points(accuracy) == {"ar-trust, d.jsonl": [(10, 0.5)]}
    assert accuracy.table is not None and "25.0% to 87.5%" in accuracy.table.rows[0]
    denoised = [EvaluationRecord("a.json", True, record("diffusion-trust"))]
    assert "in a mode of causal" in part_of(run(), denoised, "Tokens per forward", 1).note


@pytest.mark.parametrize("value", [None, True, "1", ["1"], float("nan"), {"a": 1}, 10**400, -(10**30), 1e308])
def test_what_is_no_number_is_not_recorded(value: Any) -> None:
    broken = Recorded("mine", MANIFEST, [{"step": 1, "ar_loss": value, "diffusion_loss": value, "router": value}],
                      [{"step": 1, "evaluation": value}, {"step": 2, "evaluation": {"all_masked_accuracy": value}}])
    table = record(answers=value, result={"mode": value, "accuracy": value}, options={"temperature": value})
    found = [part for chapter in chapters(broken, [EvaluationRecord("a", True, table)]) for part in chapter.parts]
    assert all(part.figure is None and "Not recorded" in part.note for part in found[1:])


def test_an_empty_run_is_said_in_every_chapter() -> None:
    empty = Recorded("mine", MANIFEST, [], [])
    page = to_html("mine", chapters(empty, []), [])
    assert page.count("Not recorded") == len([part for chapter in chapters(empty, []) for part in chapter.parts]) - 1
    assert "<svg" not in page and NO_RECORD in page and "No samples were asked for" in page
    assert "Not recorded" in to_markdown("mine", chapters(empty, []), [])


def sample(text: str = EVIL) -> Sample:
    spans: tuple[tuple[Origin, str], ...] = (("clean", text), ("accepted", text))
    return Sample(EVIL, "ar-trust", 0.0, spans, {"clean": 2, "accepted": 1}, 3, 2, "eos")


def test_nothing_that_is_said_is_markup() -> None:
    manifest = replace(MANIFEST, source=Source(EVIL), recipe={"name": EVIL}, versions={EVIL: EVIL},
                       data={"sources": {EVIL: {"documents": EVIL}}})
    evil = replace(run(), manifest=manifest, name=EVIL)
    table = record(model={"name": EVIL}, data={"name": EVIL})
    page = to_html(EVIL, chapters(evil, [EvaluationRecord(EVIL, False, table)]), [sample()])
    found = Markup(page)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "link", "iframe", "object"} and "svg" in tags
    names = {name for _, attributes in found.tags for name in attributes}
    assert not any(name.startswith("on") for name in names)
    addresses = [value for _, attributes in found.tags for name, value in attributes.items() if "href" in name]
    assert addresses and all(str(value).startswith("#") for value in addresses), "a page needs nothing else"
    assert "default-src 'none'" in page and "url(http" not in page
    answer = [(origin, text) for origin, text in found.spans if text == EVIL]
    assert answer == [("clean", EVIL), ("accepted", EVIL)]


def test_markdown_shows_what_is_said_as_it_is() -> None:
    text = to_markdown("mine", [], [sample("a ```` b")])
    assert re.search(r"^`{5}text\na ```` ba ```` b\n`{5}$", text, re.MULTILINE)
    manifest = replace(MANIFEST, source=Source(EVIL))
    cells = next(line for line in to_markdown("m", chapters(replace(run(), manifest=manifest), []), []).splitlines()
                 if line.startswith("| source"))
    assert len(re.findall(r"(?<!\\)\|", cells)) == 3 and "<script" not in cells.replace("\\<", "")


def test_figures_of_a_page_share_no_ids() -> None:
    page = to_html("mine", chapters(run(), []), [])
    ids = [attributes["id"] for _, attributes in Markup(page).tags if attributes.get("id")]
    used = {str(value).lstrip("#") for _, attributes in Markup(page).tags for name, value in attributes.items()
            if name.endswith("href")}
    assert used <= set(ids)
    assert to_html("mine", chapters(run(), []), []) == page, "the same bytes again"
    assert not re.search(r"#0[14]02?03|#040506|#0708", page), "every colour is the page's"


@pytest.mark.parametrize("count", [1, MOST_POINTS, MOST_POINTS + 1, 3 * MOST_POINTS + 7])
def test_curves_keep_their_ends(count: int) -> None:
    whole = [(float(n), 0.0) for n in range(count)]
    drawn = thinned(whole)
    assert drawn[0] == whole[0] and drawn[-1] == whole[-1] and len(drawn) <= MOST_POINTS
    assert set(drawn) <= set(whole)


def test_records_of_this_checkpoint_are_known(tmp_path: Path) -> None:
    import hashlib

    own = hashlib.sha256(MANIFEST.to_json().encode()).hexdigest()
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, manifest in zip(files, (own, "0" * 64), strict=True):
        path.write_text(json.dumps(record(model={"name": "other", "manifest": manifest})))
    assert [(found.own, found.model) for found in read_evaluations(files, MANIFEST)] == [
        (True, "this checkpoint"), (False, "other"),
    ]
    files[0].write_text("{}")
    with pytest.raises(UsageError, match=r"--eval .*a.json is no record of an evaluation"):
        read_evaluations(files, MANIFEST)
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UsageError, match=r"--eval .* cannot be read \(.*\); give"):
            read_evaluations([path], MANIFEST)


def test_halves_of_characters_are_written(tmp_path: Path) -> None:
    """JSON may hold them, and UTF-8 does not."""
    (tmp_path / "a.json").write_text(json.dumps(record(model={"name": "a\ud800b"})))
    parts = chapters(replace(run(), name="\udcff"), read_evaluations([tmp_path / "a.json"], MANIFEST))
    for render in (to_html, to_markdown):
        text = render("\udcff", parts, [sample("\ud800")])
        assert "a?b" in text.encode().decode()


def test_a_source_has_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was not converted"):
        read_recorded(tmp_path)
