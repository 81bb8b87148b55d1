"""All invariants of docs/semantics.md section 5, on every family, in float64 where no other program is the witness.

The float64 programs are float64 throughout, so their bounds are about 1e-12. The last tests break programs on purpose:
an invariant that cannot fail shows nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import pytest
import torch

from flarec.decode import Engine
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.layout import Layout
from flarec.ops.linear_attention import Chunks
from flarec.ops.short_conv import ConvWindows
from flarec.ops.softmax_attention import SoftmaxMask
from flarec.passes import lower
from flarec.verify import (
    Subject,
    ar_trust_is_causal,
    clean_logits,
    no_leak,
    opens_in_transformers,
    rejected_draft_leaves_no_trace,
    split_is_whole,
    views_share_a_row,
)
from flarec.verify.decoding import near_tie, random_sampling
from flarec.verify.inputs import random_ids, random_layout, reads
from flarec.verify.streams import influence
from tests.models import FAMILIES, VOCABULARY, captured, captured_float64, shared_model
from tests.oracles import visibility

MASK = 400


@functools.cache
def subject(family: str, *, float64: bool = False, mask_vector: bool = False) -> Subject:
    program = (captured_float64 if float64 else captured)(family)
    train, decode = (lower(program, t, mask_vector=mask_vector, debug=True) for t in ("train", "decode"))
    mask = VOCABULARY if mask_vector else MASK
    return Subject(
        train, decode, shared_model(family), mask_token_id=mask, block_size=3, suppress=() if mask_vector else (mask,)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_logits_are_those_of_the_source(family: str) -> None:
    result = clean_logits(subject(family), cases=8)
    assert result.passed, result
    assert result.bound < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_logits_with_a_mask_vector(family: str) -> None:
    assert clean_logits(subject(family, mask_vector=True)).passed


@pytest.mark.parametrize("family", FAMILIES)
def test_no_leak(family: str) -> None:
    result = no_leak(subject(family, float64=True), cases=4)
    assert result.passed, result
    assert result.difference == 0.0


def test_no_leak_with_a_mask_vector() -> None:
    assert no_leak(subject("qwen3_5_text", float64=True, mask_vector=True)).passed


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_agrees_with_the_independent_oracle(family: str) -> None:
    """As `test_no_leak`, with who-reads-whom by the oracle of the kernel tests, for two readouts."""
    rng = random.Random(7)
    its_subject = subject(family, float64=True)
    for readout in ("block_end", "causal"):
        layout = random_layout(rng, rows=1, readouts=[readout])
        tokens = visibility.tokens(layout, 0)
        gradients = influence(its_subject.train, random_ids(rng, its_subject, layout), layout)
        for reader in tokens:
            for other in tokens:
                influences = bool(gradients[reader.slot, other.slot] > 0)
                assert influences == visibility.reads(reader, other), (readout, reader, other)


def test_reads_agrees_with_the_independent_oracle() -> None:
    rng = random.Random(3)
    for _ in range(30):
        layout = random_layout(rng, rows=2, readouts=("block_end", "causal"))
        for row in range(layout.rows):
            expected = torch.eye(layout.length, dtype=torch.bool)
            for reader in visibility.tokens(layout, row):
                for other in visibility.tokens(layout, row):
                    expected[reader.slot, other.slot] = visibility.reads(reader, other)
            assert torch.equal(reads(layout, row), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_is_whole(family: str) -> None:
    result = split_is_whole(subject(family, float64=True), cases=6)
    assert result.passed, result
    assert result.bound < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_split_is_whole_in_float32(family: str) -> None:
    assert split_is_whole(subject(family), cases=2).passed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafts", ["branches", "single"])
def test_ar_trust_is_causal(family: str, drafts: str) -> None:
    """240 cases: prompts, seeds and sampling settings, both readouts, as one batch each (float32, as it is deployed).

    Only few ids may be generated, so that the drafts of a model that was never trained are accepted now and then.
    """
    few = dataclasses.replace(subject(family), suppress=tuple(range(4, VOCABULARY)), seed=11)
    result = ar_trust_is_causal(few, cases=20, drafts=[drafts], new_tokens=16)
    assert result.passed, result
    per_forward = float(result.compared.split(", ")[1].split()[0])
    assert 1.2 < per_forward < 4, "drafts must be accepted and rejected"


@pytest.mark.parametrize("family", FAMILIES)
def test_ar_trust_is_causal_with_the_whole_vocabulary(family: str) -> None:
    assert ar_trust_is_causal(subject(family), cases=6, new_tokens=12).passed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("readout", ["causal", "block_end"])
def test_diffusion_trust_with_a_recheck_of_one_is_causal(family: str, readout: str) -> None:
    """Greedy and sampled, with and without truncation; elastic: tests/passes/test_predict_horizon.py."""
    its_subject = dataclasses.replace(subject(family), suppress=tuple(range(4, VOCABULARY)))
    engine = Engine(
        its_subject.decode, mask_token_id=MASK, block_size=3, readouts={"diffusion-trust": readout}, eos_ids=(),
        max_positions=256, suppress=its_subject.suppress,
    )
    rng = random.Random(3)
    prompts = [[rng.randrange(MASK) for _ in range(rng.randint(1, 12))] for _ in range(16)]
    each = [dataclasses.replace(random_sampling(rng), max_new_tokens=12) for _ in prompts]
    causal = [row.token_ids for row in engine.generate(prompts, each, mode="causal")]
    kept = taken_back = 0
    for threshold in (0.0, 0.5):
        found = engine.generate(prompts, each, mode="diffusion-trust", threshold=threshold, recheck=1.0)
        for prompt, setting, row, whole in zip(prompts, each, found, causal, strict=True):
            assert row.token_ids == whole or near_tie(its_subject, prompt, setting, whole, row.token_ids)
        kept += sum(row.origins.count("accepted") for row in found)
        taken_back += sum(row.taken_back for row in found)
    assert kept and taken_back, "tokens must be kept and taken back"


def test_a_request_does_not_depend_on_its_batch() -> None:
    its_subject = subject("qwen3_5_text")
    engine = Engine(
        its_subject.decode,
        mask_token_id=MASK,
        block_size=3,
        readouts={"ar-trust": "causal", "diffusion-trust": "block_end"},
        eos_ids=(),
        max_positions=512,
        suppress=[MASK],
    )
    rng = random.Random(5)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (1, 9, 4)]
    settings = [random_sampling(rng) for _ in prompts]
    for mode in ("causal", "ar-trust", "diffusion-trust"):
        options: Any = {"mode": mode, "max_new_tokens": 10}
        together = engine.generate(prompts, settings, **options)
        alone = [engine.generate([p], s, **options)[0] for p, s in zip(prompts, settings, strict=True)]
        assert [g.token_ids for g in together] == [g.token_ids for g in alone], mode


@pytest.mark.parametrize("family", FAMILIES)
def test_rejected_drafts_leave_no_trace(family: str) -> None:
    result = rejected_draft_leaves_no_trace(subject(family, float64=True), cases=6)
    assert result.passed, result
    assert result.bound < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_steps_are_those_of_transformers(family: str) -> None:
    assert opens_in_transformers(subject(family)).passed


@pytest.mark.parametrize("family", FAMILIES)
def test_views_and_grids_share_a_row(family: str) -> None:
    result = views_share_a_row(subject(family, float64=True), cases=4)
    assert result.passed, result
    assert result.bound < 1e-9


# Broken programs: each error is one that somebody made once (see docs/semantics.md).


class EverythingVisible(SoftmaxMask):
    """A mask that forgets streams and documents."""

    def build(self, layout: Layout, capacity: int | None) -> torch.Tensor:
        return torch.ones_like(super().build(layout, capacity))


class OneDocument(Chunks):
    """A state schedule that does not know documents: states flow from one into the next."""

    def build(self, layout: Layout, capacity: int | None) -> StateSchedule:
        positions = torch.arange(layout.clean_length).expand(layout.rows, -1)
        merged = dataclasses.replace(
            layout, clean_document=layout.clean_document.clamp_max(0), clean_position=positions,
            block_document=layout.block_document.clamp_max(0),
        )
        return super().build(merged, capacity)


class LateAnchor(ConvWindows):
    """Conv windows in which a block reads its own clean tokens: the anchor is off by one."""

    def build(self, layout: Layout, capacity: int | None) -> torch.Tensor:
        return super().build(dataclasses.replace(layout, block_anchor=layout.block_anchor + 1), capacity)


def broken(family: str, name: str, derivation: object) -> Subject:
    its_subject = subject(family, float64=True)
    train = its_subject.train.clone()
    assert name in train.derivations
    train.derivations[name] = derivation  # type: ignore[assignment]
    return dataclasses.replace(its_subject, train=train)


@pytest.mark.parametrize(
    ("name", "derivation"),
    [
        ("softmax_mask", EverythingVisible()),
        ("state_schedule", OneDocument()),
        ("conv_windows_4", LateAnchor(4)),
    ],
)
def test_a_leak_is_found(name: str, derivation: object) -> None:
    result = no_leak(broken("qwen3_5_text", name, derivation), cases=4)
    assert not result.passed
    assert result.difference > 0
    assert "leak" in result.notes[0]


def test_a_changed_clean_stream_is_found() -> None:
    changed = dataclasses.replace(
        broken("qwen3_5_text", "softmax_mask", EverythingVisible()), source=subject("qwen3_5_text").source
    )
    assert not clean_logits(changed).passed


class Careless:
    """A decode program that commits one row more or less than was accepted."""

    def __init__(self, its_subject: Subject, error: int) -> None:
        self.program, self.error = its_subject.decode, error
        self.pending: dict[int, int] = {}  # by cache

    def __getattr__(self, name: str) -> object:
        return getattr(self.program, name)

    def step(self, ids: torch.Tensor, layout: Layout, rows: torch.Tensor, cache: object) -> torch.Tensor:
        kept = cache.accepted  # type: ignore[attr-defined]
        cache.accepted = (kept + self.error).clamp(0, self.pending.get(id(cache), 0))  # type: ignore[attr-defined]
        self.pending[id(cache)] = layout.clean_length
        return self.program.step(ids, layout, rows, cache)  # type: ignore[arg-type]


def careless(error: int) -> Subject:
    its_subject = subject("bamba", float64=True)
    return dataclasses.replace(its_subject, decode=Careless(its_subject, error))  # type: ignore[arg-type]


def test_a_row_that_is_not_committed_is_found() -> None:
    assert not split_is_whole(careless(-1)).passed


def test_a_committed_draft_is_found() -> None:
    assert split_is_whole(careless(0)).passed
    assert rejected_draft_leaves_no_trace(careless(0)).passed
    assert not rejected_draft_leaves_no_trace(careless(1)).passed


def test_a_drafter_that_decides_is_found() -> None:
    """If the clean rows of a verify step saw the noisy blocks, AR-Trust would differ from causal decoding."""
    its_subject = dataclasses.replace(subject("qwen3_5_text"), suppress=tuple(range(4, VOCABULARY)))
    decode = its_subject.decode.clone()
    decode.derivations["softmax_mask"] = EverythingVisible()
    assert not ar_trust_is_causal(dataclasses.replace(its_subject, decode=decode), cases=4).passed
