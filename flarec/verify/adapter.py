"""What holds for a checkpoint with an adapter besides the invariants: its model is the source (docs/semantics.md 6)."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch

from flarec import ops
from flarec.base.generation import GenerationOptions
from flarec.base.hashes import sha256_of
from flarec.checkpoint.directory import Checkpoint, open_checkpoint
from flarec.checkpoint.weights import weight_files
from flarec.errors import CheckpointError
from flarec.frontend.export import capture
from flarec.passes import lower

from .decoding import ar_trust_is_causal, engine_of, near_tie
from .inputs import all_logits, random_ids, random_layout, random_tokens
from .subject import Comparison, Result, Subject

GREEDY_TOKENS = 12


def weights_are_the_sources(subject: Subject, source: str | Path | None = None) -> Result:
    """Check 8: the weight files are byte for byte those that the adapter was made for (the manifest has their hash),
    and those of `source`, if it is given."""
    assert subject.adapted is not None and subject.adapted.checkpoint.manifest is not None
    checkpoint = subject.adapted.checkpoint
    files = weight_files(checkpoint.path)
    expected = {subject.adapted.checkpoint.manifest.source.sha256}
    if source is not None:
        expected.add(sha256_of(*weight_files(open_source(subject, source).path)))
    same = bool(files) and expected == {sha256_of(*files)}
    text = f"hash of {len(files)} weight file{'s' * (len(files) != 1)}, {sum(f.stat().st_size for f in files):,} bytes"
    return Result(8, "weights = the source's", text, float(not same), 0.0, same)


def clean_rows_keep_their_bits(subject: Subject, cases: int = 4) -> Result:
    """Check 9: with and without the adapter, in one layout, the logits of clean rows are equal bit for bit, and those
    of noisy rows are not. Where clean and noisy rows meet in an expert's product the bound is that of rounding."""
    assert subject.adapted is not None
    rng = random.Random(subject.seed + 9)
    comparison, rows, moved = Comparison(), 0, False
    for _ in range(cases):
        layout = random_layout(rng, block_size=min(subject.block_size, 4), readouts=subject.readouts)
        ids = random_ids(rng, subject, layout)
        with torch.no_grad():
            without, beside = (all_logits(program, ids, layout) for program in (subject.adapted.train, subject.train))
        clean = layout.clean_length
        real = layout.clean_document >= 0
        comparison.add(without[:, :clean][real], beside[:, :clean][real])
        moved = moved or not torch.equal(without[:, clean:], beside[:, clean:])
        rows += int(real.sum())
    result = comparison.result(9, "the adapter leaves clean rows", f"logits of {rows} clean rows, with and without it")
    exact = not any(mixer is ops.MOE_EXPERTS for _, mixer in ops.sites(subject.train.graph))
    notes = () if moved else ("no noisy row reads the adapter, or it is zero",)
    bound = 0.0 if exact else result.bound
    return dataclasses.replace(result, bound=bound, passed=result.difference <= bound, notes=notes)


def open_source(subject: Subject, source: str | Path) -> Checkpoint:
    """The model that is said to be the checkpoint's source. Raises `CheckpointError` if it is none."""
    assert subject.adapted is not None
    other = open_checkpoint(source, dequantize=subject.adapted.checkpoint.dequantize)
    if other.manifest is not None:
        raise CheckpointError(f"{source} is converted itself; give the source of {subject.adapted.checkpoint.path}")
    return other


def is_the_source_in_transformers(subject: Subject, source: str | Path, cases: int = 3) -> Result:
    """Check 10: opened with plain transformers, in the dtype that is stored, checkpoint and source give the same logits
    bit for bit. Raises `CheckpointError` if `source` is no model."""
    assert subject.adapted is not None
    other = open_source(subject, source)
    rng = random.Random(subject.seed + 10)
    models = [checkpoint.load_model() for checkpoint in (other, subject.adapted.checkpoint)]
    largest, rows, equal = 0.0, 0, True
    for _ in range(cases):
        ids = torch.tensor([random_tokens(rng, subject, rng.randint(8, 24))])
        with torch.no_grad():
            theirs, ours = (model(ids).logits for model in models)
        equal = equal and torch.equal(theirs, ours)
        largest = max(largest, float((theirs - ours).abs().max()))
        rows += ids.shape[1]
    return Result(10, "source in transformers", f"logits of {rows} tokens, {models[0].dtype}", largest, 0.0, equal)


def ar_trust_is_the_source(
    subject: Subject, cases: int = 8, source: str | Path | None = None, *, new_tokens: int = 24
) -> Result:
    """Check 11: AR-Trust with the adapter gives the text of the source itself, greedy and sampled, in float32: of its
    program without the adapter, and greedily of transformers.

    source: its directory; without it the checkpoint's own model stands for it.
    """
    assert subject.adapted is not None
    witness, reference = subject.source, subject.adapted.decode
    if source is not None:
        witness = open_source(subject, source).load_model(torch.float32)
        witness.set_attn_implementation("eager")
        reference = lower(capture(witness, cache=True), "decode")
    result = ar_trust_is_causal(subject, cases, new_tokens=new_tokens, reference=reference)
    rng = random.Random(subject.seed + 11)
    tokens = random_tokens(rng, subject, 6)
    for _ in range(GREEDY_TOKENS):
        with torch.no_grad():
            tokens.append(int(witness(torch.tensor([tokens])).logits[0, -1].argmax()))
    drafted = trusted_text(subject, tokens[:6], GREEDY_TOKENS)
    same = drafted == tokens[6:] or near_tie(subject, tokens[:6], GenerationOptions(), tokens[6:], drafted)
    notes = result.notes if same else (*result.notes, f"transformers {tokens[6:]}, AR-Trust {drafted}")
    return dataclasses.replace(
        result, invariant=11, title="AR-Trust = the source's text", passed=result.passed and same, notes=notes,
        difference=result.difference + (not same),
    )


def trusted_text(subject: Subject, prompt: list[int], new_tokens: int) -> list[int]:
    """AR-Trust's greedy continuation."""
    (made,) = engine_of(subject, subject.readouts[0]).generate([prompt], mode="ar-trust", max_new_tokens=new_tokens)
    return made.token_ids
