"""Small random layouts and tokens, and who may read whom in them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flarec.ir.program import Program
from flarec.layout import BLOCK_END, Block, Layout, build_layout

from .subject import Subject


def random_layout(
    rng: random.Random, *, block_size: int = 3, rows: int = 2, readouts: Sequence[str] = ("block_end",)
) -> Layout:
    """Packed rows as in training: one to three documents, prompts without noisy copy, two views of every block."""
    documents, blocks = [], []
    for _ in range(rows):
        lengths: list[int] = []
        row: list[Block] = []
        for document in range(rng.randint(1, 3)):
            prompt, response = rng.randint(1, 5), rng.randint(2, 7)
            lengths.append(prompt + response)
            readout = rng.choice(list(readouts))
            anchors = range(prompt, prompt + response, block_size)
            row += [Block(document, a, block_size, view, readout) for view in (0, 1) for a in anchors]
        documents.append(lengths)
        blocks.append(row)
    return build_layout(documents, blocks).validate()


def random_tokens(rng: random.Random, subject: Subject, count: int) -> list[int]:
    """A piece of the subject's texts; without these any ids."""
    if subject.texts is not None:
        return subject.texts.piece(rng, count)
    return [rng.randrange(subject.vocab_size) for _ in range(count)]


def random_ids(rng: random.Random, subject: Subject, layout: Layout) -> Tensor:
    """[rows, T] int64: every document is a text, and about half of the noisy tokens are the mask token."""
    ids = torch.tensor([random_tokens(rng, subject, layout.length) for _ in range(layout.rows)])
    if subject.texts is not None:
        for row, slots in texts_of(layout):
            ids[row, slots] = torch.tensor(random_tokens(rng, subject, len(slots)))
    masked = torch.tensor([[rng.random() < 0.5 for _ in range(layout.length)] for _ in range(layout.rows)])
    masked[:, : layout.clean_length] = False
    return ids.masked_fill(masked, subject.mask_token_id)


def texts_of(layout: Layout) -> Iterator[tuple[int, Tensor]]:
    """(row, clean slots) of every document."""
    for row in range(layout.rows):
        documents = layout.clean_document[row]
        for document in documents[documents >= 0].unique():
            yield row, (documents == document).nonzero().squeeze(1)


def reads(layout: Layout, row: int) -> Tensor:
    """[T, T] bool: token t may read token s, written out from docs/semantics.md section 1.

    Padding is not read and reads nothing but itself (its own row of logits is never used).
    """
    clean, length = layout.clean_length, layout.length
    result = torch.eye(length, dtype=torch.bool)
    document, position = layout.clean_document[row].tolist(), layout.clean_position[row].tolist()
    for t in range(clean):
        for s in range(t):
            result[t, s] = document[t] >= 0 and document[t] == document[s] and position[s] <= position[t]
    noisy = layout.noisy_block[row].tolist()
    for i, block in enumerate(noisy):
        if block < 0:
            continue
        own, anchor = int(layout.block_document[row, block]), int(layout.block_anchor[row, block])
        whole_block = int(layout.block_readout[row, block]) == BLOCK_END
        for s in range(clean):
            result[clean + i, s] = document[s] == own and position[s] < anchor
        for j, other in enumerate(noisy):
            result[clean + i, clean + j] = other == block and (whole_block or j <= i)
    return result


def all_logits(program: Program, ids: Tensor, layout: Layout) -> Tensor:
    """Logits of every token, [rows, T, V], of a lowered training program."""
    rows = torch.arange(layout.rows * layout.length)
    return program(ids, layout=layout, head_rows=rows).reshape(layout.rows, layout.length, -1)
