"""Between text and token ids, with a tokenizer of transformers: prompts in, generated text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.fields import shown
from ..base.messages import BadRecord, messages_of, tools_of
from ..base.rendering import rendered, template_of
from ..errors import GenerationError

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Messages


def encode_prompt(
    tokenizer: Any, prompt: Prompt, *, chat: bool = False, tools: Any = None, options: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a text, or of a conversation up to the turn that the model writes. Raises `GenerationError`.

    chat: put a text into the chat template as the user's message. tools: JSON schemas, or JSON text of them. options:
    variables of the template. Messages are taken in the forms of training data (`flarec.base.messages`).
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise GenerationError("the prompt holds bytes that are not UTF-8 text; give UTF-8") from None
        if not chat:
            return _encode_text(tokenizer, prompt)
        prompt = [{"role": "user", "content": prompt}]
    if not (is_list(prompt) and all(isinstance(message, Mapping) for message in prompt)):
        raise GenerationError(
            f"a prompt is {shown(prompt)}; give text or a list of messages (token ids are for generate_ids)"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise GenerationError("the tokenizer has no chat template; give plain text instead (without --chat)")
    try:
        schemas = tools_of(tools)
        template_of(tokenizer, schemas)
        messages = messages_of([dict(message) for message in prompt], "the prompt")
        _, text = rendered(tokenizer, messages, schemas, prompt=True, options=options)
    except BadRecord as error:
        raise GenerationError(str(error)) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """With the tokenizer's own opening tokens; a closing EOS would end the text before it goes on."""
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    if not ids and tokenizer.bos_token_id is not None:
        ids = [int(tokenizer.bos_token_id)]
    return ids


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def decode_tokens(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of new tokens, without special ones."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class ByteFallback:
    """Whether the text of tokens stays as it is when more follow (`flarec.decode.text.DecodedTokens`).

    Some vocabularies have a token for every byte, for characters that they lack. Such bytes in a row are decoded
    together, all of them wrong if one is: the text of a row of bytes is not settled before another token ends it.
    """

    def __init__(self, tokenizer: Any) -> None:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = zip(names, tokenizer.convert_tokens_to_ids(names), strict=True)
        self.bytes = frozenset(i for name, i in ids if i is not None and tokenizer.convert_ids_to_tokens(i) == name)
        self.special = frozenset(tokenizer.all_special_ids)

    def settled(self, tokens: Sequence[int]) -> bool:
        """No byte at the end, but for special tokens, which the text leaves out."""
        return next((token for token in reversed(tokens) if token not in self.special), None) not in self.bytes
