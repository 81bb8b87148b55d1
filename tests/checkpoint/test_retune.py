"""New settings of a checkpoint that is there: what is written, what stays, and what a card keeps of its editor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flarec.base.files import replace_file, unused
from flarec.base.lock import OutputLock
from flarec.checkpoint import retune
from flarec.checkpoint.card import CURVES, DECODING, model_card, retold
from flarec.checkpoint.curve import KEY, curves
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.horizon import manifest_with
from flarec.checkpoint.manifest import NAME, Manifest
from flarec.checkpoint.retune import check_retunable, retuned, rewrite
from flarec.errors import CheckpointError, UsageError
from flarec.passes import PredictHorizon, pipeline
from tests.checkpoints import tree

ROW = {"answers": 40, "accuracy": 0.9, "accuracy_interval": [0.75, 0.95], "tokens_per_forward": 1.0}
FOUND: dict[str, dict[str, Any]] = {
    "diffusion-trust": {
        "data": {"name": "tasks|1.jsonl", "sha256": "ab" * 32}, "temperature": 0.0, "max_new_tokens": 256, "keep": 0.97,
        "causal": {"choosing": ROW, "reporting": {**ROW, "answers": 38}},
        "curve": [{**ROW, "threshold": 0.25, "recheck": 0.0, "accuracy": 0.5, "tokens_per_forward": 2.5},
                  {**ROW, "threshold": 0.25, "recheck": 1.0, "tokens_per_forward": 2.125}],
        "chosen": {"threshold": 0.25, "recheck": 1.0}, "reported": {**ROW, "answers": 38, "tokens_per_forward": 2.0625},
    }
}


def read(place: Path) -> Manifest:
    manifest = Manifest.read(place)
    assert manifest is not None
    return manifest


def test_two_files_change_and_no_other(copy: Path) -> None:
    before, files = read(copy), tree(copy)
    after = retuned(before, FOUND)
    rewrite(copy, before, after)
    now = tree(copy)
    assert {name for name in now if now[name] != files.get(name)} == {NAME, "README.md"} and now.keys() == files.keys()
    found = open_checkpoint(copy, whole=True).manifest
    assert found is not None and found == replace(after, files=found.files)
    assert {name for name in found.files if found.files[name] != before.files[name]} == {"README.md"}
    assert found.files["README.md"].difference(copy / "README.md") == ""
    assert found.decode.settings("diffusion-trust") == {"threshold": 0.25, "recheck": 1.0}
    assert found.decode.settings("elastic") == {"threshold": 0.9, "recheck": 0.0}, "what was not measured stays"
    assert found.format_version == before.format_version and found.metrics["ar_loss"] == before.metrics["ar_loss"]
    card = (copy / "README.md").read_text(encoding="utf-8")
    assert "| choosing | 0.25 | 0 | 50.0% | 75.0% to 95.0% | 2.50 | 40 |" in card
    assert "| reporting | 0.25 | 1 | 90.0% | 75.0% to 95.0% | 2.06 | 38 |" in card
    assert "tasks\\|1.jsonl (sha256 abababababababab)" in card and "| diffusion-trust, recheck | 1 |" in card
    again = retuned(found, {"elastic": FOUND["diffusion-trust"]})
    rewrite(copy, found, again)
    assert read(copy).decode.chosen.keys() == read(copy).metrics[KEY].keys() == {"diffusion-trust", "elastic"}


def test_a_card_is_that_of_the_manifest_and_keeps_what_somebody_wrote(pair: tuple[Path, Path]) -> None:
    old = read(pair[1])
    new = retuned(old, FOUND)
    card = model_card(old, "mine")
    assert CURVES not in card and retold(card, old) == card
    assert retold(card, new) == model_card(new, "mine") and retold(model_card(new, "mine"), old) == card
    thanks = f"## Thanks\n\n```\n{DECODING}\n```\n\nto all\n\n{DECODING}"
    told = retold(card.replace(DECODING, thanks) + "\n## Last\n\nwords\n", new)
    assert f"{thanks}\n\n| | |" in told
    assert told.endswith("## Last\n\nwords\n") and told.count(CURVES) == 1 and retold(told, new) == told
    assert retold("Nothing but this.", new).startswith(f"Nothing but this.\n\n{DECODING}\n\n| | |")


def test_a_card_that_was_removed_stays_so(copy: Path) -> None:
    (copy / "README.md").unlink()
    notes: list[str] = []
    rewrite(copy, read(copy), retuned(read(copy), FOUND), notes.append)
    assert "the curve is in flarec.json alone" in notes[0] and not (copy / "README.md").exists()
    assert curves(read(copy))[0].points and open_checkpoint(copy, whole=True)


def test_another_head_is_not_measured(pair: tuple[Path, Path]) -> None:
    """A head that is trained anew takes the checkpoint's settings for elastic decoding with it, and no other ones."""
    before, steps = read(pair[1]), pipeline("decode")
    one = retuned(before, FOUND)
    both = retuned(one, {"elastic": FOUND["diffusion-trust"]})
    assert len(curves(both)) == 2 and len(curves(one)) == 1
    for kept, manifest in ((one, both), (before, retuned(before, {"elastic": FOUND["diffusion-trust"]}))):
        after = manifest_with(manifest, steps, PredictHorizon(3, 8), {}, {})
        assert after.decode == kept.decode and after.metrics == {**kept.metrics, "horizon": {}}


def test_a_failure_leaves_a_checkpoint_that_opens(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two files cannot be written; and what a kill left in writing goes with the next time."""
    before = read(copy)
    for name in ("README.md", NAME):
        def fails(path: Path, data: str, part: Path, name: str = name) -> None:
            if path.name == name:
                raise OSError(28, "No space left on device")
            replace_file(path, data, part)

        monkeypatch.setattr(retune, "replace_file", fails)
        with pytest.raises(CheckpointError, match="No space left"):
            rewrite(copy, before, retuned(before, FOUND))
        assert open_checkpoint(copy, whole=True).manifest == before
    monkeypatch.undo()
    left, mine = unused(copy / NAME, "writing"), copy / ".notes"
    left.write_text("{")
    mine.write_text("mine")
    rewrite(copy, before, retuned(before, FOUND))
    assert not left.exists() and mine.exists()


def test_what_is_refused(copy: Path, pair: tuple[Path, Path]) -> None:
    before = read(copy)
    after = retuned(before, FOUND)
    with pytest.raises(CheckpointError, match="was changed meanwhile"):
        rewrite(copy, after, after)
    with OutputLock(copy), pytest.raises(UsageError, match="is being written by"):
        rewrite(copy, before, after)
    assert read(copy) == before
    check_retunable(str(copy), open_checkpoint(copy))
    with pytest.raises(UsageError, match=r"not a checkpoint of flarec: there is no flarec\.json to --write"):
        check_retunable("source", open_checkpoint(pair[0]))
    with pytest.raises(UsageError, match="is of the hub"):
        check_retunable("owner/name", open_checkpoint(copy))


@pytest.mark.parametrize("chosen", [
    {"causal": {"threshold": 0.5, "recheck": 1.0}}, {"elastic": {"threshold": 0.5}},
    {"elastic": {"threshold": 1.5, "recheck": 1.0}}, {"elastic": {"threshold": 0.5, "recheck": 1.0, "more": 0.0}}, [],
])
def test_settings_that_make_no_sense(copy: Path, chosen: Any) -> None:
    table = json.loads((copy / NAME).read_text())
    table["decode"]["chosen"] = chosen
    (copy / NAME).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"decode\.chosen"):
        open_checkpoint(copy)


@pytest.mark.parametrize("tables", [
    3, {"elastic": 3}, {"elastic": {}}, {"elastic": {"curve": {}, "causal": [], "data": 1, "chosen": 2, "reported": 3}},
    {"elastic": {"curve": [3, {}, {"threshold": "x", "accuracy": float("nan"), "accuracy_interval": [None]}]}},
])
def test_a_curve_that_is_none_is_shown_as_unknown(pair: tuple[Path, Path], tables: Any) -> None:
    """Nothing is decided by it, so nothing is refused for it."""
    manifest = replace(read(pair[1]), metrics={KEY: tables})
    assert all(set(point.cells()[1:]) <= {"-"} for curve in curves(manifest) for point in curve.points)
    assert model_card(manifest, "mine")
