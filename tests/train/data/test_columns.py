"""Parquet files and directories of data: the records that were written, in the types that a program chose for them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flarec.base.json_records import MARK, json_records
from flarec.base.messages import BadRecord, messages_of
from flarec.base.prompts import read_prompts
from flarec.errors import DataError
from flarec.train.data.files import read_records
from flarec.train.data.sources import TokenSource, load_sources, parse_source
from tests.train.small_tokenizer import CALLS, small_tokenizer

TOKENIZER = small_tokenizer(CALLS)
USER = {"role": "user", "content": "Hello"}


def calling(**arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"required": sorted(arguments)}}}
    done = [{"role": "tool", "content": "2024-01-01"}, {"role": "assistant", "content": "2024-01-02"}]
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, *done], "tools": [tool]}


RECORDS = [calling(a=1), calling(b="x"), {"messages": [USER, {"role": "assistant", "content": "world"}]}]


def load(path: Path) -> TokenSource:
    return load_sources([parse_source(str(path))], TOKENIZER, max_length=500)[0]


def jsonl(path: Path, records: Any = RECORDS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_fields_that_a_record_does_not_have_are_not_trained(tmp_path: Path) -> None:
    """One struct for all calls: `a` and `b` are null in each other's call, at any depth."""
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert "null" not in str(TOKENIZER.decode(load(tmp_path / "a.parquet").tokens)).lower()
    assert load(tmp_path / "a.parquet").fingerprint() == load(jsonl(tmp_path / "a.jsonl")).fingerprint()
    datasets.Dataset(pa.Table.from_pylist(RECORDS)).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint() == load(tmp_path / "a.jsonl").fingerprint()


def test_messages_as_json_text_in_columns(tmp_path: Path) -> None:
    """As `datasets` writes what has no common type; and as people do."""
    expected = load(jsonl(tmp_path / "a.jsonl")).fingerprint()
    texts = [[json.dumps(m) for m in record["messages"]] for record in RECORDS]
    tools = [json.dumps(record.get("tools")) for record in RECORDS]
    kind = pa.list_(pa.json_())
    columns = {"messages": pa.array(texts, pa.list_(pa.string())).cast(kind), "tools": pa.array(tools).cast(pa.json_())}
    typed = pa.table(columns)
    pq.write_table(typed, tmp_path / "typed.parquet")
    assert pq.read_schema(tmp_path / "typed.parquet").field("messages").type == kind
    pq.write_table(pa.table({"messages": texts, "tools": tools}), tmp_path / "plain.parquet")
    whole = [f"[{', '.join(text)}]" for text in texts]
    pq.write_table(pa.table({"messages": whole, "tools": tools}), tmp_path / "one.parquet")
    for name in ("typed", "plain", "one"):
        assert load(tmp_path / f"{name}.parquet").fingerprint() == expected, name


def test_content_as_json_text_is_read_where_its_type_says_so(tmp_path: Path) -> None:
    """A content that is a text here and a list of parts there; a text column is text, whatever it looks like."""
    contents = ['"Hello"', '[{"type": "text", "text": "Hello"}]']
    fields = pa.struct([("role", pa.string()), ("content", pa.json_())])
    columns = [pa.array(["user"] * 2), pa.array(contents).cast(pa.json_())]
    users = pa.StructArray.from_arrays(columns, fields=list(fields))
    table = pa.table({"prompt": pa.ListArray.from_arrays(pa.array([0, 1, 2]), users), "completion": ['"world"', "[1]"]})
    pq.write_table(table, tmp_path / "a.parquet")
    records = [record for _, record in read_records(tmp_path / "a.parquet")]
    assert [record["prompt"][0]["content"] for record in records] == ["Hello", [{"type": "text", "text": "Hello"}]]  # type: ignore[index]
    assert [record["completion"] for record in records] == ['"world"', "[1]"]  # type: ignore[index]


def calling_on(day: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"day": day}}}]}


def test_dates_that_were_text_are_named(tmp_path: Path) -> None:
    day = pa.scalar("2024-01-01").cast(pa.timestamp("s")).as_py()
    pq.write_table(pa.table({"prompt": ["When?"], "response": [day]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: response holds the date 2024-01-01 00:00:00, which was text before"):
        load(tmp_path / "a.parquet")
    turns = [{"role": "user", "content": day}, {"role": "assistant", "content": day}]
    records: list[Any] = [{"messages": turns}, {"messages": [USER, calling_on(day)]}]
    for number, record in enumerate(records):
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / f"{number}.parquet")
        with pytest.raises(DataError, match=r"row 1: message [12] \(\w+\) holds the date"):
            load(tmp_path / f"{number}.parquet")


def test_json_text_that_is_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["{", '"Hello"']).cast(pa.json_())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: holds JSON text that is none"):
        load(tmp_path / "a.parquet")


def test_compressed_lines_and_arrays(tmp_path: Path) -> None:
    plain = jsonl(tmp_path / "a.jsonl")
    expected = load(plain).fingerprint()
    (tmp_path / "marked.jsonl").write_bytes(MARK + plain.read_bytes())
    for suffix, opened in ((".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)):
        with opened(tmp_path / f"a.jsonl{suffix}", "wb") as file:
            file.write(plain.read_bytes())
    (tmp_path / "lines.json").write_bytes(plain.read_bytes())
    (tmp_path / "CAPITALS.JSONL.GZ").write_bytes((tmp_path / "a.jsonl.gz").read_bytes())
    (tmp_path / "array.json").write_text(json.dumps(RECORDS, indent=2))
    (tmp_path / "short.json").write_text(json.dumps(RECORDS))
    with gzip.open(tmp_path / "array.json.gz", "wt") as packed:
        json.dump(RECORDS, packed)
    for path in sorted(tmp_path.iterdir()):
        assert load(path).fingerprint() == expected, path.name
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[2], indent=2))
    assert len(load(tmp_path / "one.json")) == 1


def test_arrays_and_archives_that_cannot_be_read(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(tmp_path / "a.jsonl").read_bytes())
    for name, data, words in [
        ("cut.json", b'[{"text": "a"},\n{"text":', r"cut\.json: begins as a JSON array and is none"),
        ("bad.json", b'[{"text": "a"}, 3]', r"bad\.json, record 2: a JSON int"),
        ("cut.jsonl.gz", whole[:-20], r"cut\.jsonl\.gz: cannot be read"),
        ("not.jsonl.gz", b"no archive", r"not\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", b"x", r"\.zst files are not read; decompress it"),
        ("array.jsonl", b'[{"text": "a"},\n3]', r"array\.jsonl: begins as a JSON array; call the file \.json"),
        ("lines.json", b'{"text": "a"}\n{\n', r"lines\.json, line 2: not JSON"),
        ("first.json", b'{\n{"text": "a"}\n', r"first\.json, line 1: not JSON \(\D+ at column 2\)"),
        ("later.json", b'\n\n{\n{"text": "a"}\n', r"later\.json, line 3: not JSON \(\D+ at column 2\)"),
        ("below.json", b'\n\n[{"text": "a"},\n{"text":}]', r"is none: not JSON \(\D+ at line 4, column 9\)"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=words):
            load(tmp_path / name)


def test_prompts_take_the_same_files(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("Hello\n\nworld\n")
    found = [(place.number, prompt) for place, prompt in read_prompts(tmp_path / "a.txt.gz")]
    assert found == [(1, "Hello"), (3, "world")]
    shapes = [{"prompt": "a"}, {"prompt": [USER]}, {"conversations": [{"from": "human", "value": "Hello"}]},
              {"messages": json.dumps([USER, {"role": "assistant", "content": "x"}])}]
    (tmp_path / "a.json").write_text(json.dumps(shapes))
    assert [prompt for _, prompt in read_prompts(tmp_path / "a.json")] == ["a", [USER], [USER], [USER]]
    for bad, words in [
        ({"messages": [USER], "tools": [{"name": "f"}]}, "has tools"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing but a turn of the assistant's"),
        ({"messages": [{"role": "user", "content": 3}]}, "has no text content"),
    ]:
        jsonl(tmp_path / "bad.jsonl", [bad])
        with pytest.raises(DataError, match=rf"--prompts .*bad\.jsonl, line 1: .*{words}"):
            list(read_prompts(tmp_path / "bad.jsonl"))


# --- directories


TWO = "00002.parquet"


def tree(path: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": [f"text {number}"]}), path / name)
        else:
            (path / name).write_text(json.dumps({"text": f"text {number}"}) + "\n")
    return path


@pytest.mark.parametrize(("names", "read"), [
    ((f"data/train-00000-of-{TWO}", f"data/train-00001-of-{TWO}", "data/test-00000-of-00001.parquet"), (0, 1)),
    (("train.jsonl", "test.jsonl", "dataset_infos.json", ".cache/train.jsonl"), (0,)),
    (("my-train-v2.jsonl", "my-eval-v2.jsonl"), (0,)),
    (("train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"), (0, 1)),
    (("a.jsonl", "b.parquet"), (0, 1)),
    (("contest.jsonl", "retrain.jsonl"), (0, 1)),
], ids=["shards", "files", "words", "folders", "no split", "parts of words"])
def test_directories_of_the_hub(tmp_path: Path, names: tuple[str, ...], read: tuple[int, ...]) -> None:
    found = list(read_records(tree(tmp_path, *names)))
    assert [record["text"] for _, record in found] == [f"text {number}" for number in read]  # type: ignore[index]
    assert [Path(place.file).relative_to(tmp_path).as_posix() for place, _ in found] == [names[n] for n in read]


@pytest.mark.parametrize(("names", "words"), [
    (("data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"),
     "has the splits test_sft, train_sft but no train split; give one split's files"),
    (("test.jsonl",), "has the splits test but no train split"),
    (("en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet"), "has the subsets de, en; give one of"),
    (("README.md", "a.csv"), "no .jsonl, .json or .parquet file is in it"),
])
def test_directories_without_one_train_split(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(read_records(tree(tmp_path, *names)))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        # a time in it would be in the test's name, which every process has to know
        (gzip.compress(b'{"text": "a b"}\n', mtime=0), r"compressed with gz, and its name does not say so; add \.gz"),
        (b"(\xb5/\xfd\x04\x00", r"is compressed with zst"),
        ('{"text": "a b"}\n{"text": "c"}\n'.encode("utf-16"), r"is UTF-16, not UTF-8 text; convert it"),
        (b'{\n "text": "a b"\n}\n', r"its first record takes several lines; write each on a line of its own"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=words):
        list(json_records(tmp_path / "data.jsonl"))


def test_messages_as_a_table_of_columns() -> None:
    """As `datasets` keeps a sequence of objects."""
    columns = {"role": ["user", "assistant"], "content": ["hi", "hello"], "name": ["bob", None]}
    assert messages_of(columns) == [
        {"role": "user", "content": "hi", "name": "bob"}, {"role": "assistant", "content": "hello"}
    ]
    for other in ({"role": ["user"], "content": ["a", "b"]}, {"role": "user", "content": "a"}, {}):
        with pytest.raises(BadRecord, match="is not a list with at least one message"):
            messages_of(other)
