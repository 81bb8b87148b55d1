"""`flarec inspect` on every family, and its whole text for two of them.

After a change of the text that is meant: `FLAREC_WRITE_GOLDEN=1 pytest tests/conformance/test_inspect.py`, then read
the difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from torch import fx

from flarec import ops
from flarec.inspect.drawing import as_svg
from flarec.inspect.lines import Recorder
from flarec.inspect.summary import summarize
from flarec.inspect.text import as_text
from flarec.ir.program import Program, layer_of
from flarec.passes import lower
from tests.models import captured

from .shared import EVERY, subject

SVG = "{http://www.w3.org/2000/svg}"
GOLDEN = Path(__file__).parent / "golden"


def mixers(program: Program) -> list[fx.Node]:
    return [node for node, _ in ops.sites(program.graph)]


@pytest.mark.parametrize("family", EVERY)
def test_every_mixer_is_shown_in_its_layer(family: str) -> None:
    """The witness is the captured graph: as many mixers as it has ops, at every stage."""
    program, its_subject = captured(family), subject(family)
    for shown in (program, lower(program, "train", kernels="reference"), its_subject.train, its_subject.decode):
        summary = summarize(shown)
        layers = sorted(layer for group in summary.groups for layer in group.layers)
        assert layers == list(range(summary.layers)) == list(range(program.config.num_hidden_layers))
        for layer in layers:
            (group,) = (group for group in summary.groups if layer in group.layers)
            assert len(group.mixers) == sum(layer_of(node) == layer for node in mixers(program))
        assert sum(slot[3] for slot in summary.caches) == len(shown.cache_slots)
        text = as_text(summary, shown, diff=Recorder(), ops=True)
        for group in summary.groups:
            assert all(mixer.call in text for mixer in group.mixers)
            assert {mixer.module.split(".")[0] for mixer in group.mixers} <= {part.module for part in group.parts}
        assert "not recognised" not in text, "the head is found"
        titles = [title.text or "" for title in ElementTree.fromstring(as_svg(summary)).iter(f"{SVG}title")]
        assert sum(title.startswith("layer ") for title in titles) == len(layers)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        pytest.param("jamba", "decode", marks=pytest.mark.xdist_group("jamba")),
        pytest.param("falcon_h1", "train", marks=pytest.mark.xdist_group("falcon_h1")),
    ],
)
def test_the_whole_text(family: str, target: str) -> None:
    text = as_text(summarize(getattr(subject(family), target))) + "\n"
    text = text.replace("capture(cached=True)", "capture")
    text = re.sub(r"\b\d+ ops\b", "# ops", text)  # transformers releases write the same layer with other nodes
    path = GOLDEN / f"{family}-{target}.txt"
    if os.environ.get("FLAREC_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
