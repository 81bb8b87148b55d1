"""A small byte-level tokenizer and chat templates of the kinds that models have."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
# Hopeless: the opening depends on the whole conversation, and contents are changed.
COUNTING = "{{ messages | length }} messages{% for m in messages %}\n{{ m.role }}: {{ m.content | upper }}{% endfor %}"

TEXT = [
    "What is 17 + 25? The answer is 42. def f(x): return x * 2\n",
    "user assistant system think <|im_start|> Hello world, how are you today? Fine, thanks!",
    "äöü 你好 emoji 🙂",
] * 4


def small_tokenizer(template: str | None = CHATML, **options: Any) -> PreTrainedTokenizerFast:
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
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|im_end|>", **options})
    fast.chat_template = template
    return fast
