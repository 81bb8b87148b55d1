"""Train the small byte-level BPE tokenizer: about 2000 tokens, every digit on its own, a ChatML-style chat template.

    python examples/tiny/tokenizer.py --out examples/tiny/model

The merges come from generated training tasks and standard-library text; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import tasks
import text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2000
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train(task_records: int = 20000, text_chars: int = 1_500_000) -> PreTrainedTokenizerFast:
    """Learn the merges from training tasks and standard-library text."""
    corpus = []
    for record in itertools.islice(tasks.stream("train", 0), task_records):
        corpus += [message["content"] for message in record["messages"]]
    size = 0
    for document in text.documents():
        if size < text_chars and not text.is_held_out(document):
            corpus.append(document)
            size += len(document)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Train the tokenizer, check a round trip, save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    args = parser.parse_args()
    trained = train()
    sample = 'def f(x):\n    return "äö" + x[12:345]\n\nAnswer: 1,234'
    ids = trained(sample)["input_ids"]
    assert trained.decode(ids) == sample, trained.decode(ids)
    trained.save_pretrained(args.out)
    print(f"{len(trained)} tokens in {args.out}, the sample took {len(ids)}")


if __name__ == "__main__":
    main()
