"""Loss spans of chat records: they decode back to what the assistant writes, for every kind of template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarec.train.data.chat import ChatEncoder
from flarec.train.data.files import BadRecord
from tests.train import small_tokenizer as small

TOKENIZERS = {
    name: small.small_tokenizer(getattr(small, name))
    for name in ("CHATML", "MARKED", "THINKING", "STRICT", "COUNTING", "TWICE")
}
END = "<|im_end|>"


def spans(name: str, messages: list[dict[str, Any]]) -> list[str]:
    tokenizer = TOKENIZERS[name]
    ids, found = ChatEncoder(tokenizer, [tokenizer.eos_token_id]).encode(messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    return [tokenizer.decode(ids[start:end]) for start, end in found]


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Alternating user and assistant messages."""
    first = [{"role": "system", "content": system}] if system is not None else []
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [*first, *turns]


# Letters at the ends: a template may strip spaces, and a leading newline can fuse with the header's.
inner = st.text(st.characters(codec="utf-8"), max_size=9)
contents = st.builds("{}{}b".format, st.sampled_from("aZ1ü"), inner)


@pytest.mark.parametrize("name", ["CHATML", "MARKED"])
@given(st.lists(contents, min_size=1, max_size=6), st.none() | contents)
def test_every_assistant_turn_with_its_end(name: str, texts: list[str], system: str | None) -> None:
    assert spans(name, chat(*texts, system=system)) == [text + END for text in texts[1::2]]


@given(st.lists(contents, min_size=2, max_size=6))
def test_a_template_that_refuses_partial_conversations(texts: list[str]) -> None:
    assert spans("STRICT", chat(*texts)) == [" " + text + END for text in texts[1::2]]


def test_reasoning_templates_render_earlier_turns_differently() -> None:
    messages = chat("What is 17 + 25?", "The answer is 42.", "how are you?", " Fine, thanks! ")
    messages[-1]["reasoning"] = "think"
    # The generation prompt opens the reasoning, so that the last turn starts inside it; earlier turns have none.
    assert spans("THINKING", messages) == ["The answer is 42." + END, "think\n</think>\n\nFine, thanks!" + END]
    messages[1]["reasoning"] = "x" * 99  # dropped in the whole conversation: that rendering is far longer
    assert spans("THINKING", messages)[0] == "The answer is 42." + END
    assert spans("THINKING", messages[:3]) == ["The answer is 42." + END]


def test_content_that_repeats_in_the_conversation_is_not_confused() -> None:
    assert spans("THINKING", chat("Hello", "Hello", "Hello", "user", "Hello")) == ["Hello" + END, "user" + END]


def test_an_opening_that_depends_on_the_whole_conversation() -> None:
    """The turn is found with a marker in its place, and is what the template prints of it."""
    assert spans("COUNTING", chat("Hello", "world", "Hello")) == ["WORLD"]


def test_a_template_that_hides_the_turns_is_refused() -> None:
    with pytest.raises(BadRecord, match=r"assistant message 2 cannot be located.*generation"):
        spans("TWICE", chat("Hello", "world", "Hello"))


def test_template_errors_are_reasons() -> None:
    with pytest.raises(BadRecord, match=r"chat template rejects the messages .start with a user message"):
        spans("STRICT", chat("Hello", "world", system="You"))


def test_a_template_that_is_none_is_named_by_its_line() -> None:
    tokenizer = small.small_tokenizer("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(BadRecord, match=r"the chat template is none: .* in its line 2"):
        ChatEncoder(tokenizer, []).encode(chat("Hello", "world"))


def test_markers_that_enclose_nothing_are_refused() -> None:
    tokenizer = small.small_tokenizer(small.CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}")
    with pytest.raises(BadRecord, match="enclose no assistant token"):
        ChatEncoder(tokenizer, [tokenizer.eos_token_id]).encode(chat("Hello", "world"))


def test_a_turn_ends_with_its_special_token_whoever_calls_it_an_end() -> None:
    tokenizer = TOKENIZERS["CHATML"]
    ids, found = ChatEncoder(tokenizer, []).encode(chat("Hello", "world"))
    assert [tokenizer.decode(ids[start:end]) for start, end in found] == ["world" + END]


def test_tools_reach_the_template() -> None:
    tokenizer = small.small_tokenizer("{% if tools %}{{ tools | length }} tools\n{% endif %}" + small.CHATML)
    ids, found = ChatEncoder(tokenizer, [tokenizer.eos_token_id]).encode(chat("Hello", "world"), [{"name": "f"}])
    assert tokenizer.decode(ids).startswith("1 tools\n")
    assert [tokenizer.decode(ids[start:end]) for start, end in found] == ["world" + END]
