"""Character spans as whole tokens: no lost turn, no half character, whatever the tokenizer's offsets are like."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from flarec.base.messages import BadRecord
from flarec.errors import DataError
from flarec.train.data.characters import continued, decoded, token_spans
from flarec.train.data.chat import ChatEncoder
from flarec.train.data.sources import RecordEncoder
from tests.train import small_tokenizer as small

END = "<|im_end|>"
TOKENIZERS = {
    "byte-level": small.small_tokenizer(),
    "trimmed": small.small_tokenizer(trim_offsets=True),
    "spaced": small.spaced_tokenizer(),
}
CONTENTS = ["world", " world", "  two spaces", "你好 ü🙂", "🙂", "\nnew line", " é", "\n\n x", "a\n"]
PIECES = [" ", "\n", "a", "Hello", "你", "🙂", "ü", END, "<|im_start|>"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6)


def conversation(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def behind(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end: int) -> str:
    """The text of tokens behind all that come before them."""
    return decoded(tokenizer, ids[:end]).removeprefix(decoded(tokenizer, ids[:start]))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["CHATML", "MARKED", "MARKED_CONTENT", "MARKED_MACRO"])
def test_every_turn_reads_as_its_text(name: str, template: str) -> None:
    """Every content in every turn: what trains is all of it and its end, for 1 turn as for 9."""
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = getattr(small, template)
    encoder = ChatEncoder(tokenizer, [tokenizer.eos_token_id])
    messages = [message for content in CONTENTS for message in conversation("Hello", content)]
    ids, found = encoder.encode(messages)
    end = "" if template == "MARKED_CONTENT" else END
    assert [behind(tokenizer, ids, *span).rstrip("\n") for span in found] == [(c + end).rstrip("\n") for c in CONTENTS]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert decoded(tokenizer, ids) == whole
    for content in CONTENTS:
        ids, found = encoder.encode(conversation("Hello", content))
        assert len(found) == 1 and behind(tokenizer, ids, *found[0]).rstrip("\n") == (content + end).rstrip("\n")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.data())
def test_spans_read_as_their_characters(name: str, parts: list[list[str]], data: st.DataObject) -> None:
    """Any text in any pieces, every other one a span. A piece may begin within what the tokenizer would join."""
    tokenizer = TOKENIZERS[name]
    pieces = ["x", *("".join(part) for part in parts)]
    edges = [0]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    spans = [(start, end) for place, (start, end) in enumerate(pairwise(edges)) if place % 2]
    ids, found = token_spans(tokenizer, "".join(pieces), spans)
    assert decoded(tokenizer, ids) == "".join(pieces)
    assert [behind(tokenizer, ids, *span) for span in found] == pieces[1::2]


def test_a_space_that_the_tokenizer_adds_behind_special_tokens_is_not_a_turns_text() -> None:
    tokenizer = small.spaced_tokenizer(legacy=True)
    messages = conversation("Hello", "你 🙂", "Hello", "world")
    ids, found = ChatEncoder(tokenizer, [tokenizer.eos_token_id]).encode(messages)
    assert [behind(tokenizer, ids, *span) for span in found] == ["你 🙂" + END, "world" + END]
    assert ids == tokenizer(tokenizer.decode(ids).replace("> ", ">"), add_special_tokens=False)["input_ids"]


def test_tokens_are_those_of_the_whole_text_where_no_token_lies_on_both_sides() -> None:
    for tokenizer in TOKENIZERS.values():
        text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n world ü🙂<|im_end|>\n"
        start = text.index(" world")
        ids, _ = token_spans(tokenizer, text, [(start, text.rindex("\n"))])
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_spans_that_touch_are_one_and_empty_ones_none() -> None:
    ids, found = token_spans(TOKENIZERS["byte-level"], "Hello world", [(0, 5), (5, 11), (11, 11)])
    assert found == [(0, len(ids))]


def test_an_added_token_that_takes_the_space_beside_it() -> None:
    tokenizer = small.small_tokenizer(small.CHATML.replace("\n", "").replace("<|im_end|>", "<|stop|>\n"))
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True, rstrip=True, normalized=False)])
    end = tokenizer.convert_tokens_to_ids("<|stop|>")
    ids, found = ChatEncoder(tokenizer, [end]).encode(conversation("Hello", "world", "Hello", "Fine"))
    assert [tokenizer.decode(ids[start:stop]) for start, stop in found] == ["world<|stop|>", "Fine<|stop|>"]


def test_a_tokenizer_that_loses_what_a_turn_says() -> None:
    """Its unknown token stands for anything, also for what a turn says; its own text has it, too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}a {{ m.content }} </s> {% endfor %}"
    ids, ((start, end),) = ChatEncoder(tokenizer, [3]).encode(conversation("b", "what"))
    assert ids[start:end][-2:] == [0, 3]


class WithoutOffsets:
    """A tokenizer of Python: no offsets."""

    eos_token_id, all_special_ids, chat_template = 1, (1,), "{{ messages }}"

    def convert_ids_to_tokens(self, index: int) -> str:
        return f"<{index}>"

    def get_chat_template(self, *_: Any) -> str:
        return self.chat_template

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)


def test_a_tokenizer_without_offsets_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"no character offsets.*save it as tokenizer\.json"):
        ChatEncoder(WithoutOffsets(), [1]).encode(conversation("Hello", "world"))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "response"), [
    ("What is", " it"), ("What is ", "it"), ("a\n", "\nb"), ("Hello", "world"), ("", "Hello"), ("你", "好🙂"),
    ("Hel", "lo"),
])
def test_a_pair_reads_as_its_texts(name: str, prompt: str, response: str, tmp_path: Any) -> None:
    """The prompt's tokens are those that decoding sees, and no space comes between the two."""
    tokenizer = TOKENIZERS[name]
    ids, ((start, end),) = RecordEncoder(tokenizer, None, tmp_path)({"prompt": prompt, "response": response})
    assert ids[:start] == tokenizer(prompt)["input_ids"] and end == len(ids)
    assert decoded(tokenizer, ids) == prompt + response + END


def test_what_cannot_be_continued_is_a_reason() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    with pytest.raises(BadRecord, match="one token of the end of the prompt"):
        continued(tokenizer, tokenizer("a")["input_ids"], "b", tokenizer("other")["input_ids"])
