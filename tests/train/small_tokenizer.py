"""A small byte-level tokenizer and chat templates of the kinds that models have."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Plain ChatML: what comes before a turn never changes.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning: an empty think block in the last turn only, and a generation prompt that opens it.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning }}\n</think>\n\n{% endif %}"
    "{{ m.content.strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Refuses a conversation that does not start with a user; no newline, EOS after the assistant only.
STRICT = (
    "{% if not messages or messages[0].role != 'user' %}{{ raise_exception('start with a user message') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
# The opening depends on the whole conversation, and contents are changed.
COUNTING = "{{ messages | length }} messages{% for m in messages %}\n{{ m.role }}: {{ m.content | upper }}{% endfor %}"
# Hopeless: every content is printed twice, and the opening depends on the whole conversation.
TWICE = (
    "{{ messages | length }}{% for m in messages %}\n{{ m.content }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\n{% endif %}"
)

# As reasoning models have it: reasoning stays in the turns after the last question only, a turn there always has its
# block, the generation prompt opens it (or gives an empty one), a conversation without a question is refused, and a
# call is printed argument by argument.
REASONING = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if ns.last < 0 %}{{ raise_exception('no question in the conversation') }}{% endif -%}
{%- for m in messages -%}
{%- set text = m.content if m.content is string else '' -%}
{%- if m.role in ('system', 'user', 'tool') -%}
<|im_start|>{{ m.role }}
{{ text }}<|im_end|>
{% elif m.role == 'assistant' -%}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
{%- if '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] -%}
{%- set text = text.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last -%}
<think>
{{ thought.strip() }}
</think>

{% endif -%}
{{ text }}
{%- for call in m.tool_calls or [] %}
<call={{ call.function.name }}>
{%- for name, value in call.function.arguments | items %} {{ name }}={{ value }}{% endfor %}</call>
{%- endfor -%}
<|im_end|>
{% else -%}
{{ raise_exception('no such role: ' + m.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<think>
{% if thinking is defined and not thinking %}{{ '\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""
# Calls as JSON, roles that nobody knows are left out in silence, tools at the top.
CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant', 'tool') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Contents and arguments are put together with +, as text.
JOINING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Arguments without a filter: an object would be printed as Python writes it.
BARE = JOINING.replace("' ' + c.function.arguments + '</call>'", "' ' ~ c.function.arguments ~ '</call>'")
# Markers around the content alone; and inside of a macro, over several lines, where blocks are trimmed.
MARKED_CONTENT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
MARKED_MACRO = """\
{%- macro turn(m) -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
    {% generation %}
{{ m.content }}<|im_end|>
    {% endgeneration %}
{% else %}
{{ m.content }}<|im_end|>
{% endif %}
{%- endmacro -%}
{# {% generation %} #}{% for m in messages %}{{ turn(m) }}{% endfor %}"""

TEXT = [
    "What is 17 + 25? The answer is 42. def f(x): return x * 2\n",
    "user assistant system think <|im_start|> Hello world, how are you today? Fine, thanks!",
    "äöü 你好 emoji 🙂",
] * 4


def small_tokenizer(
    template: Any = CHATML, *, trim_offsets: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|bos|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|im_end|>", **options})
    fast.chat_template = template
    return fast


def spaced_tokenizer(template: Any = CHATML, *, legacy: bool = False) -> PreTrainedTokenizerFast:
    """As of SentencePiece with byte fallback: a text begins with a space, and so does, in legacy ones, what follows a
    special token. Spaces are part of the token behind them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    tokenizer.train_from_iterator([text.replace("🙂", "").replace("\n", "") for text in TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    fast.chat_template = template
    return fast
