"""Data files: formats and loss spans, what is counted, and messages for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarec.errors import DataError
from flarec.train.data.document import Document
from flarec.train.data.files import SourceSpec
from flarec.train.data.sources import TokenSource, load_sources, parse_source
from tests.train.small_tokenizer import CHATML, small_tokenizer

TOKENIZER = small_tokenizer()
END = "<|im_end|>"
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]
CHAT: dict[str, Any] = {"messages": TURNS, "extra": 1}
PAIR = {"prompt": "What is 17 + 25? ", "response": "The answer is 42."}


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def load(path: Path, tokenizer: Any = TOKENIZER, max_length: int = 200, **options: Any) -> TokenSource:
    return load_sources([SourceSpec(path)], tokenizer, max_length=max_length, **options)[0]


def texts(document: Document) -> tuple[str, list[str]]:
    ids = document.ids.tolist()
    return TOKENIZER.decode(ids), [TOKENIZER.decode(ids[start:end]) for start, end in document.responses]


CHARACTERS = st.characters(codec="utf-8")


@given(st.text(CHARACTERS, max_size=20), st.text(CHARACTERS, min_size=1, max_size=20))
def test_prompt_and_response(tmp_path_factory: Any, prompt: str, response: str) -> None:
    path = write(tmp_path_factory.mktemp("data") / "a.jsonl", {"prompt": prompt, "response": response})
    source = load(path)
    whole, found = texts(source.document(0))
    assert whole == prompt + response + END and source.stats.format == "prompt/response"
    ids, ((start, end),) = source.document(0).ids.tolist(), source.document(0).responses
    assert end == len(ids) and ids[-1] == TOKENIZER.eos_token_id
    if prompt:  # the prompt's tokens are those that decoding would see
        assert ids[:start] == TOKENIZER(prompt)["input_ids"] and found == [response + END]
    else:  # nothing predicts the first token of a document
        assert start == 1


def test_text_is_one_response_after_its_first_token(tmp_path: Path) -> None:
    source = load(write(tmp_path / "a.jsonl", {"text": "Hello world, how are you today?"}))
    document = source.document(0)
    assert texts(document)[0] == "Hello world, how are you today?" + END
    assert document.responses == ((1, len(document)),)
    assert (source.stats.tokens, source.stats.targets) == (len(document), len(document) - 1)


def test_messages(tmp_path: Path) -> None:
    source = load(write(tmp_path / "a.jsonl", CHAT, "", CHAT))
    assert len(source) == 2 and source.stats.format == "messages"
    assert texts(source.document(1))[1] == ["world" + END]


def test_opening_tokens_are_kept_and_eos_is_not_doubled(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = small_tokenizer(bos_token="<|bos|>")
    ids = [("<|bos|>", tokenizer.bos_token_id), (END, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"<|bos|> $0 {END}", special_tokens=ids)
    source = load(write(tmp_path / "a.jsonl", PAIR), tokenizer)
    whole, found = texts(source.document(0))
    assert whole == "<|bos|>" + PAIR["prompt"] + PAIR["response"] + END and found == [PAIR["response"] + END]
    whole, _ = texts(load(write(tmp_path / "b.jsonl", {"text": "Hello"}), tokenizer).document(0))
    assert whole == "<|bos|>Hello" + END


def test_parquet_and_dataset_directories_equal_jsonl(tmp_path: Path) -> None:
    records = [{"messages": CHAT["messages"]}, {"messages": [*CHAT["messages"], {"role": "user", "content": "x"}]}]
    table = datasets.Dataset.from_list(records)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "split"))
    expected = load(write(tmp_path / "a.jsonl", *records))
    for name in ("a.parquet", "plain", "split"):
        source = load(tmp_path / name)
        assert source.fingerprint() == expected.fingerprint(), name
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "no_train"))
    with pytest.raises(DataError, match=r"no_train: has the splits test but no train split"):
        load(tmp_path / "no_train")


def test_truncation_and_dropping_are_counted(tmp_path: Path) -> None:
    long_response = {"prompt": "Hello", "response": "world, how are you today? " * 9}
    long_prompt = {"prompt": "Hello world, how are you today? " * 9, "response": "Fine"}
    path = write(tmp_path / "a.jsonl", PAIR, long_response, long_prompt)
    full, source = load(path, max_length=1000), load(path, max_length=20)
    assert (full.stats.documents, full.stats.truncated, full.stats.dropped) == (3, 0, 0)
    stats = source.stats
    assert (stats.records, stats.documents, stats.truncated, stats.dropped) == (3, 2, 1, 1)
    assert stats.tokens == sum(source.length(i) for i in range(2))
    assert stats.targets == sum(source.document(i).targets for i in range(2))
    assert stats.truncated_tokens == full.length(1) - 20 and source.length(1) == 20
    assert source.document(1).ids.tolist() == full.document(1).ids.tolist()[:20]
    assert source.document(1).responses[-1][1] == 20
    line = str(stats)
    assert str(path) in line and "1 truncated" in line and "1 dropped" in line and f"{stats.targets:,} targets" in line


def test_multi_turn_truncation_keeps_the_turns_that_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": CHAT["messages"] * 3})
    full = load(path).document(0)
    assert len(full.responses) == 3
    second = full.responses[1]
    for limit, kept in [(second[0], 1), (second[0] + 1, 2), (second[1], 2), (full.responses[2][0] + 1, 3)]:
        document = load(path, max_length=limit).document(0)
        assert len(document) == limit and len(document.responses) == kept
        assert document.responses[-1][1] <= limit


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ('{"text": "a"', "not JSON (Expecting ',' delimiter at column 13)"),
        ('{"text":', "not JSON (Expecting value at column 9)"),
        ("[1]", "a JSON list"),
        ("3", "a JSON int"),
        ('{"prompt": "a"}', "has a prompt without response or completion"),
        ('{"prompt": "a", "completion": null}', "completion is missing"),
        ('{"prompt": "a", "response": 3}', "response is int"),
        ('{"prompt": "a", "response": ""}', "response is empty"),
        ('{"prompt": null, "response": "a"}', "prompt is missing"),
        ('{"prompt": "a", "response": "\\ud83d"}', "response holds half a surrogate pair"),
        ('{"text": null}', "text is missing"),
        ('{"instruction": "a"}', "output is missing"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b"}', "is a pair of a chosen and a rejected answer; give the"),
        ('{"prompt": "q", "completion": "b", "label": false}', "has the label false: its completion is one that is"),
    ],
)
def test_bad_lines_are_named_or_counted(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", PAIR, line, PAIR)
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}, line 2: {reason}") and "--skip-bad-lines" in str(error.value)
    source = load(path, skip_bad_lines=True)
    assert (len(source), source.stats.bad_lines) == (2, 1)
    assert f"{path}, line 2: {reason}" in str(source.stats)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is not a list with at least one message"),
        ("hello", "messages is not a list"),
        (["hello"], "message 1 is not an object with a role"),
        ([{"content": "a"}], "message 1 has neither a role nor a from; give role and content, or from and value"),
        ([{"value": "a"}], "message 1 has neither a role nor a from"),
        ([{"role": 3, "content": "a"}], "message 1 has the role 3; give text"),
        ([{"role": "", "content": "a"}], "message 1 has the role ''; give text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "message 2 (assistant) has no text content"),
        ([{"role": "user", "content": [1]}], "message 1 (user) has no text content"),
        ([{"role": "user", "content": "\ud83d"}], "message 1 (user) holds half a surrogate pair"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}, line 1: {reason}")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8 text"):
        load(path)


def test_the_first_bad_line_may_be_the_first_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "a"}, PAIR)
    with pytest.raises(DataError, match=r"line 1: has none of the keys messages, .* \(it has question\)"):
        load(path)
    assert len(load(path, skip_bad_lines=True)) == 1


def test_nothing_to_learn(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no records"):
        load(tmp_path / "empty.jsonl")
    path = write(tmp_path / "user.jsonl", {"messages": CHAT["messages"][:1]})
    with pytest.raises(DataError, match=r"user\.jsonl: none of 1 records .*1 without a response token"):
        load(path)
    path = write(tmp_path / "bad.jsonl", "{1", "{")
    with pytest.raises(DataError, match=r"none of 2 records .* 2 bad lines, first .*line 1: not JSON"):
        load(path, skip_bad_lines=True)
    with pytest.raises(DataError, match="no data"):
        load_sources([], TOKENIZER, max_length=10)


def test_tokenizers_that_cannot_serve_a_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template; give prompt and response"):
        load(write(tmp_path / "a.jsonl", CHAT), small_tokenizer(None))
    with pytest.raises(DataError, match="no EOS token"):
        load(write(tmp_path / "b.jsonl", PAIR), small_tokenizer(CHATML, eos_token=None))


def test_unreadable_files(tmp_path: Path) -> None:
    for name, words in [("a.csv", "unknown kind of data file"), ("a.parquet", "cannot be read as Parquet")]:
        (tmp_path / name).write_text("a,b\n")
        with pytest.raises(DataError, match=words):
            load(tmp_path / name)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"not a directory written by `datasets`, and no \.jsonl"):
        load(tmp_path / "nothing")


def test_source_arguments(tmp_path: Path) -> None:
    plain, colon = tmp_path / "a.jsonl", tmp_path / "b.jsonl:2"
    plain.touch()
    colon.touch()
    assert parse_source(str(plain)) == SourceSpec(plain, 1.0)
    assert parse_source(f"{plain}:0.25") == SourceSpec(plain, 0.25)
    assert parse_source(f"{plain}:1e2") == SourceSpec(plain, 100.0)
    assert parse_source(str(colon)) == SourceSpec(colon, 1.0)
    assert parse_source(f"{colon}:3") == SourceSpec(colon, 3.0)
    for bad in (f"{plain}:0", f"{plain}:-1", f"{plain}:nan", f"{plain}:inf"):
        with pytest.raises(DataError, match="not a number above 0"):
            parse_source(bad)
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        parse_source(f"{tmp_path}/missing.jsonl:2")
    with pytest.raises(DataError, match="does not exist"):
        parse_source(f"{plain}:heavy")
