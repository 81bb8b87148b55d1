"""Generated bad input: manifests, training states, locks and requests with one value that is something else.

1,400 of them: each is refused with one sentence, or what comes of it makes sense; nothing else is ever raised.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from flarec.base.fields import LARGEST_BLOCK
from flarec.base.generation import GenerationOptions
from flarec.base.hashes import FileEntry
from flarec.base.lock import RECORD, OutputLock, Process, check_free, lock_path
from flarec.checkpoint.manifest import AdapterInfo, DecodeDefaults, Manifest, MaskToken, Source, _hash_of
from flarec.checkpoint.place import recover
from flarec.errors import CheckpointError, FlarecError, GenerationError, UsageError
from flarec.train.data.packing import RowStream
from flarec.train.saves import check_values
from flarec.train.state import StateDirectory
from tests.checkpoints import tree
from tests.train.small_run import source
from tests.train.test_saves import VALUES

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 10**400, -(10**400)]), st.floats(),
    st.text(max_size=8), st.sampled_from(["", "../x", "/", "row", "causal", "\0", "state-00000001", "9" * 400]),
)
VALUE = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
SEED = st.integers(0, 2**32)


def changed(table: Any, seed: int, value: Any) -> Any:
    """A copy with one place somewhere in it taken out, replaced by the value, or given it as a further entry."""
    result = copy.deepcopy(table)
    place = result
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        seed, choice = divmod(seed, len(keys) + 1)
        if choice == len(keys):
            if isinstance(place, dict):
                place["further"] = value
            else:
                place.append(value)
            return result
        key = keys[choice]
        seed, what = divmod(seed, 4)
        inner = place[key]
        if isinstance(inner, (dict, list)) and what < 3:
            place = inner
            continue
        if what == 3 and seed % 2:
            del place[key]
        else:
            place[key] = value
        return result


def one_sentence(error: FlarecError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 2000, text


MANIFEST = Manifest(
    Source("origin", "0" * 64, "mit"), MaskToken("row", 300),
    DecodeDefaults(4, {"ar-trust": "causal", "diffusion-trust": "block_end"}),
    recipe={"name": "dual"}, pipelines={"train": "canonicalize()", "decode": "canonicalize()"}, data={"tokens": 3},
    metrics={"ar_loss": 1.0}, versions={"torch": "2"}, files={"config.json": FileEntry(2, "0" * 64)},
    plugins={"mine": "mine.py"}, adapter=AdapterInfo(4, 8.0, "all"),
)


@settings(max_examples=400)
@given(SEED, VALUE)
def test_manifests(seed: int, value: Any) -> None:
    """With a right hash: what is refused is refused for its value."""
    table = changed(json.loads(MANIFEST.to_json()), seed, value)
    if isinstance(table, dict) and "sha256" in table:
        body = {key: item for key, item in table.items() if key != "sha256"}
        table["sha256"] = _hash_of(body)
    try:
        read = Manifest.from_json(json.dumps(table))
    except CheckpointError as error:
        one_sentence(error)
        return
    assert type(read.format_version) is int and read.mask.kind in ("row", "vector") and read.mask.token_id >= 0
    assert 1 <= read.decode.block_size <= LARGEST_BLOCK and 0 <= read.decode.confidence_threshold <= 1
    assert all(".." not in Path(name).parts and not Path(name).is_absolute() for name in read.files)
    assert Manifest.from_json(read.to_json()).mask == read.mask


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_manifests_that_are_none(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Manifest.from_json(data.decode(errors="replace"))


@settings(max_examples=250)
@given(SEED, VALUE)
def test_values_of_a_save(seed: int, value: Any) -> None:
    table = changed(VALUES, seed, value)
    try:
        check_values(table, 6)
    except CheckpointError as error:
        one_sentence(error)
        return
    assert type(table["step"]) is int and 0 <= table["step"] <= 6
    assert all(0 <= int(step) <= table["step"] for step in table["evaluations"])
    assert all(math.isfinite(total) and total >= 0 for total in table["totals"].values())


@settings(max_examples=200)
@given(SEED, VALUE)
def test_positions_in_the_data(seed: int, value: Any) -> None:
    """What is accepted can be continued from."""
    stream = RowStream([source()], max_length=32, seed=0, lookahead=4)
    stream.rows(2)
    state = changed(stream.state_dict(), seed, value)
    again = RowStream([source()], max_length=32, seed=0, lookahead=4)
    try:
        again.load_state_dict(state)
    except CheckpointError as error:
        one_sentence(error)
        return
    assert len(again.rows(3)) == 3


def set_values(table: Any) -> Any:
    """Without the keys whose value is null: absent and null both say "not set"."""
    if not isinstance(table, dict):
        return table
    return {key: set_values(item) for key, item in table.items() if item is not None}


IDENTITY = {"recipe": {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}, "seed": 0, "kernels": "torch", "data": {}}


@settings(max_examples=100)
@given(SEED, VALUE)
@example(1, None)
def test_records_of_a_run(seed: int, value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = StateDirectory(Path(folder) / "out.partial")
        directory.create(IDENTITY)
        record = json.loads((directory.path / "run.json").read_text())
        different = changed(record, seed, value)
        (directory.path / "run.json").write_text(json.dumps(different))
        before = tree(directory.path)
        try:
            directory.check_identity(IDENTITY)
        except UsageError as error:
            one_sentence(error)
        else:
            assert set_values(different["identity"]) == IDENTITY
        assert directory.latest() is None
        assert tree(directory.path) == before


@settings(max_examples=100)
@given(SEED, VALUE)
def test_locks(seed: int, value: Any) -> None:
    """Whatever a lock says, nothing but folders with names of ours is removed."""
    process = {**asdict(Process.current()), "started": 1}
    left = {"folder": ".out.writing-00000000", "old": ".out.replaced-00000000", "inside": False, "complete": True}
    table = changed({"record": RECORD, "token": "t", "process": process, "left": left}, seed, value)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        for name in ("mine", ".out.writing", ".out.writing-0000000g", "x"):
            (out.parent / name).mkdir()
        lock_path(out).write_text(json.dumps(table) + "\n")
        for attempt in (lambda: check_free(out), lambda: recover_alone(out)):
            try:
                attempt()
            except UsageError as error:
                one_sentence(error)
        assert {"mine", ".out.writing", ".out.writing-0000000g", "x"} <= {path.name for path in out.parent.iterdir()}
        assert not out.exists()


def recover_alone(out: Path) -> None:
    with OutputLock(out) as lock:
        recover(out, lock)


@settings(max_examples=250)
@given(st.sampled_from(list(GenerationOptions.__dataclass_fields__)), VALUE)
def test_requests(name: str, value: Any) -> None:
    make: Callable[..., GenerationOptions] = GenerationOptions
    try:
        options = make(**{name: value})
    except GenerationError as error:
        one_sentence(error)
        return
    assert make(**{name: getattr(options, name)}) == options
