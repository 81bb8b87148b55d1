"""Evaluation: the loss against transformers, answers by pattern, and the counts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from transformers import AutoModelForCausalLM

from flarec.api import Model, load
from flarec.errors import DataError, FlarecWarning, UsageError
from flarec.evaluate import evaluate, read_examples, response_loss, to_examples
from flarec.evaluation import scoring
from flarec.evaluation.grading import found_answer
from tests.checkpoints import MASK_ROW, converted

CHATS = [
    {"messages": [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "Answer: 7"}]},
    {"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, what can I do?"},
        {"role": "user", "content": "Nothing"}, {"role": "assistant", "content": "Fine"},
    ]},
]
PAIRS = [{"prompt": "one, two,", "response": " three"}, {"prompt": "", "response": "a response alone"}]
TEXTS = [{"text": "The sky is blue."}, {"text": "Short"}, {"text": "A longer text than the others, by some tokens."}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("evaluate"), "qwen3_5_text")[1]


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load(path)


def expected_loss(path: Path, documents: list[tuple[list[int], list[tuple[int, int]]]]) -> tuple[float, int]:
    """One document at a time through transformers, in float64 from the logits on."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for ids, spans in documents:
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0].double()
        logits[:, MASK_ROW] = float("-inf")
        probability = logits.log_softmax(dim=-1)
        for start, end in spans:
            for position in range(max(start, 1), end):
                total -= float(probability[position - 1, ids[position]])
                count += 1
    return total, count


def spans_by_text(model: Model, ids: list[int], replies: list[str]) -> list[tuple[int, int]]:
    """Where the replies and their end tokens are, found by decoding prefixes."""
    spans, at = [], 0
    for reply in replies:
        wanted = reply + "<|im_end|>"
        start = next(i for i in range(at, len(ids)) if model.tokenizer.decode(ids[i:]).startswith(wanted))
        end = next(i for i in range(start, len(ids) + 1) if model.tokenizer.decode(ids[start:i]) == wanted)
        spans.append((start, end))
        at = end
    return spans


@pytest.mark.parametrize("rows", [1024, 7])
def test_loss_of_chats_is_that_of_transformers(
    rows: int, model: Model, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SCORE_ROWS", rows)  # 7: several chunks, the cache carries the state
    documents = []
    for chat in CHATS:
        ids = model.tokenizer.apply_chat_template(chat["messages"], tokenize=True, return_dict=True)["input_ids"]
        replies = [m["content"] for m in chat["messages"] if m["role"] == "assistant"]
        documents.append((ids, spans_by_text(model, ids, replies)))
    total, count = response_loss(model, to_examples(CHATS, model))
    expected, targets = expected_loss(path, documents)
    assert count == targets
    assert total == pytest.approx(expected, rel=1e-5)


def test_loss_of_pairs_and_texts(model: Model, path: Path) -> None:
    eos = model.tokenizer.eos_token_id
    documents = []
    for pair in PAIRS:
        ids = [*model.tokenizer(pair["prompt"] + pair["response"])["input_ids"], eos]
        documents.append((ids, [(len(model.tokenizer(pair["prompt"])["input_ids"]), len(ids))]))
    assert response_loss(model, to_examples(PAIRS, model)) == pytest.approx(expected_loss(path, documents), rel=1e-5)
    tokens = [[*model.tokenizer(text["text"])["input_ids"], eos] for text in TEXTS]
    whole = [(ids, [(0, len(ids))]) for ids in tokens]
    for batch in (1, 2, 8):
        result = response_loss(model, to_examples(TEXTS, model), batch)
        assert result == pytest.approx(expected_loss(path, whole), rel=1e-5)


def test_documents_are_cut_at_the_context(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.engine, "max_positions", 8)
    examples = to_examples(TEXTS, model)
    _, count = response_loss(model, examples)
    assert count == sum(min(len(example.ids), 8) - 1 for example in examples)
    result = evaluate(model, to_examples(CHATS, model), max_new_tokens=2)
    assert (result["too_long"], result["generated"], result["tokens_per_forward"]) == (2, 0, None)


def test_generation_starts_where_the_last_response_does(model: Model) -> None:
    for example, chat in zip(to_examples(CHATS, model), CHATS, strict=True):
        assert example.prompt == model.encode(chat["messages"][:-1])
    pair, alone = to_examples(PAIRS, model)
    assert pair.prompt == model.encode("one, two,")
    assert len(alone.prompt) == 1  # the first token cannot be predicted
    assert [example.prompt for example in to_examples(TEXTS, model)] == [[], [], []]


@pytest.mark.parametrize("mode", ["causal", "ar-trust", "diffusion-trust"])
def test_counts_are_those_of_the_outputs(mode: str, model: Model) -> None:
    outputs: dict[int, Any] = {}
    examples = [*to_examples(CHATS, model), *to_examples(PAIRS, model), *to_examples(TEXTS, model)]
    result = evaluate(model, examples, mode=mode, max_new_tokens=9, batch=3, on_output=outputs.__setitem__)
    assert sorted(outputs) == [0, 1, 2, 3]
    alone = model.generate(CHATS[0]["messages"][:-1], mode=mode, max_new_tokens=9)
    assert outputs[0].token_ids == alone.token_ids
    assert result["new_tokens"] == sum(o.new_tokens for o in outputs.values())
    assert result["forwards"] == sum(o.forwards for o in outputs.values())
    assert result["tokens_per_forward"] == result["new_tokens"] / result["forwards"]
    assert sum(result["stop_reasons"].values()) == result["generated"] == 4
    assert (result["mode"], result["records"], result["accuracy"]) == (mode, 7, None)
    total, tokens = response_loss(model, examples)
    assert result["loss"] == pytest.approx(total / tokens)


@pytest.mark.parametrize("batch", [0, True, 2.5, None])
def test_batches_hold_prompts(batch: Any, model: Model) -> None:
    with pytest.raises(UsageError, match=f"batch is {batch}; give a whole number, at least 1"):
        evaluate(model, [], batch=batch)


def test_accuracy_counts_answers_that_match(model: Model) -> None:
    text = model.generate(CHATS[0]["messages"][:-1], mode="causal", max_new_tokens=9).text
    assert len(text) > 3
    pattern = "(?s)(.*)"  # its last match is the empty one at the end
    whole = "(?s)^(.+)$"
    records = [
        {**CHATS[0], "answer": text.strip(), "pattern": whole},
        {**CHATS[0], "answer": text.strip() + "x", "pattern": whole},
        {**CHATS[0], "answer": "", "pattern": pattern},
        {**CHATS[0], "answer": text, "pattern": "(never there)"},
        CHATS[0],
    ]
    result = evaluate(model, to_examples(records, model), mode="causal", max_new_tokens=9)
    assert (result["answers"], result["correct"], result["accuracy"]) == (4, 2, 0.5)


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        ("Answer: (.+)", "Answer: 3\nAnswer:  42 \n", "42"),
        ("Answer: (.+)", "no", None),
        ("a(b)?", "ab a", None),
        (r"(\d+)", "1 22 333", "333"),
    ],
)
def test_found_answer(pattern: str, text: str, answer: str | None) -> None:
    assert found_answer(regex.compile(pattern), text) == answer


def test_a_pattern_that_would_take_years(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped and said, and counts as one that found nothing; others go on."""
    monkeypatch.setattr("flarec.evaluation.grading.PATTERN_SECONDS", 0.01)
    endless = regex.compile(r"(?:(a|b|ab)(c|bcd)?(d*)|a*|b*|(?:ab)*)*(?:x+x+)+y")
    with pytest.warns(FlarecWarning, match="counts as wrong; write it without nested repetitions"):
        assert found_answer(endless, "x" * 5000 + "abcd" * 200) is None
    assert found_answer(regex.compile("(x)y"), "xy") == "x"


@pytest.mark.parametrize(
    "pattern", ["(" * 5000, "a{99999999999999999999}(b)", "(?P<x>a)(?P<x", "[", "(a)\\9", "(?i)(", 3, ["a"]]
)
def test_patterns_that_are_none(pattern: Any, model: Model) -> None:
    with pytest.raises(DataError, match=r"records, line 1: pattern .*; fix the line"):
        to_examples([{**CHATS[0], "answer": "x", "pattern": pattern}], model)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{"], "line 2: not JSON"),
        (['{"messages": []}'], "line 1: messages is not a list with at least one"),
        (['{"messages": [{"role": "user", "content": "x"}]}'], "line 1: has no response"),
        (['{"text": "a"}', "", '{"other": 1}'], "line 3: has none of the keys"),
        ([json.dumps({**PAIRS[0], "answer": "1", "pattern": "("})], "line 1: pattern '\\(' is not a regular"),
        ([json.dumps({**PAIRS[0], "answer": "1", "pattern": "x"})], "line 1: pattern 'x' has no group"),
        ([], "no records"),
    ],
)
def test_bad_records_are_named(lines: list[str], message: str, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"data.jsonl.*{message}"):
        read_examples(path, model)


def test_limit_reads_no_further(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    assert len(read_examples(path, model, limit=2)) == 2


def test_thinking_is_switched_where_a_record_does_not_state_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = {**CHATS[0], "chat_template_kwargs": {"enable_thinking": True}}
    with pytest.raises(UsageError, match=r"does not read enable_thinking.* leave --no-thinking out"):
        to_examples(CHATS, model, thinking=False)
    template = model.tokenizer.chat_template
    opened = template + "{% if enable_thinking is defined and not enable_thinking %}silent{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", opened)
    told = [
        model.tokenizer.decode(to_examples([record], model, thinking=thinking)[0].ids).endswith("silent")
        for record in (CHATS[0], stated) for thinking in (None, True, False)
    ]
    assert told == [False, False, True, False, False, False]
    with pytest.warns(FlarecWarning, match="--no-thinking does nothing: none of these records of records is a chat"):
        assert to_examples(PAIRS, model, thinking=False) == to_examples(PAIRS, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_examples([*PAIRS, CHATS[0]], model, thinking=False)
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match=r"the tokenizer has no chat template.* leave --thinking out"):
        to_examples(PAIRS, model, thinking=True)
