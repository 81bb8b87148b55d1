"""The drafts along answers: one forward over an answer, with a noisy block at every place.

Blocks read only what stands before their anchor, so that a block behind a clean row of a decode step drafts what the
block at the same place drafts here. Noise of sampling included: it belongs to request and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.api import Model
from flarec.decode.cache import Cache
from flarec.decode.pieces import PieceLayouts, PiecePlan, PieceShape
from flarec.kernels.sampling.arithmetic import gumbel
from flarec.kernels.sampling.choose import mask_of
from flarec.passes.adapt_noisy_stream import NoisyRows

from .walk import MASKED, MIXED, SEEN, Key, Slot, Table

CANDIDATES = 3
NOISE_ROWS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Scores at a time: the noise of one takes some 30 bytes."""


@dataclass
class Answer:
    """What the model says after a prompt, drawn with a seed, and its drafts. said: places at which the clean stream of
    the one forward chooses the answer's token."""

    prompt: list[int]
    table: Table
    temperature: float
    seed: int
    said: int = 0

    @property
    def known(self) -> list[int]:
        """The tokens that somebody reads: all but the last."""
        return [*self.prompt, *list(self.table.answer)[:-1]]


class Measurement:
    """Fills tables. size: noisy rows per block; one more than is drafted, for blocks that show a token. rows: clean and
    noisy ones of a forward, at most, but for a single answer."""

    def __init__(self, model: Model, size: int, rows: int) -> None:
        manifest = model.manifest
        assert manifest is not None and not manifest.mask.ids and manifest.decode.readouts["ar-trust"] == "causal"
        self.program, self.size, self.mask = model.decode_program, size, manifest.mask.token_id
        self.never = mask_of(sorted(model.engine.suppress), self.program.vocab_size, self.program.device)
        self.rows = rows

    def begin(self, answers: Sequence[Answer]) -> None:
        """A masked block at every place of every answer, and one that shows the answer's token there."""
        wanted = []
        for answer in answers:
            places = list(enumerate(answer.table.answer))[:-1]
            wanted.append([key for place, token in places for key in (Key(MASKED, place), Key(SEEN, place, token))])
        self.fill(answers, wanted, choices=True)

    def fill(
        self, answers: Sequence[Answer], wanted: Sequence[Sequence[Key]], *, choices: bool = False
    ) -> None:
        """Add the blocks that are wanted of each answer, as many answers at a time as fit. choices: count what the
        clean stream chooses, too."""
        order = [number for number, keys in enumerate(wanted) if keys]
        order.sort(key=lambda number: (len(wanted[number]), len(answers[number].known)))
        while order:
            clean = noisy = 0
            part: list[int] = []
            while order:
                clean, noisy = max(clean, len(answers[order[0]].known)), max(noisy, len(wanted[order[0]]) * self.size)
                if part and (len(part) + 1) * (clean + noisy) > self.rows:
                    break
                part.append(order.pop(0))
            self._fill([answers[number] for number in part], [wanted[number] for number in part], choices)

    @torch.no_grad()
    def _fill(self, answers: Sequence[Answer], wanted: Sequence[Sequence[Key]], choices: bool) -> None:
        program, device = self.program, self.program.device
        shape = PieceShape(
            counts=tuple(len(answer.known) for answer in answers),
            anchors=tuple(
                tuple(len(answer.prompt) + key.place for key in keys)
                for answer, keys in zip(answers, wanted, strict=True)
            ),
            heads=tuple(len(answer.table.answer) if choices else 0 for answer in answers),
            block_size=self.size, block_heads=self.size, readout="causal",
        )
        plan = PiecePlan(shape, device)
        ids, clean = self._ids(plan, answers, wanted)
        cache = Cache.allocate(program.cache_slots, len(answers), plan.clean_length + 1, device)
        layout = PieceLayouts(device).of(shape, cache.length)
        derived = program.derive(layout, program.capacity(cache))
        if NoisyRows.name in derived:
            rows = torch.arange(ids.shape[1]) >= plan.clean_length
            derived[NoisyRows.name] = (rows & ~clean).unsqueeze(-1).to(device)
        logits = program(ids.to(device), layout=layout, head_rows=plan.head_rows, cache=cache, derived=derived)
        slots = iter(self._slots(logits, *self._sampling(answers, wanted, choices)))
        if choices:
            for answer in answers:
                found = [next(slots).tokens[0] for _ in answer.table.answer]
                answer.said = sum(one == token for one, token in zip(found, answer.table.answer, strict=True))
        for answer, keys in zip(answers, wanted, strict=True):
            for key in keys:
                block = [next(slots) for _ in range(self.size)]
                answer.table.blocks[key] = block[: self.size - 1] if key.kind == MASKED else block

    def _ids(
        self, plan: PiecePlan, answers: Sequence[Answer], wanted: Sequence[Sequence[Key]]
    ) -> tuple[Tensor, Tensor]:
        """Input ids [answers, T], and which noisy rows are of the clean stream's weights [answers, T] bool."""
        ids = torch.full((len(answers), plan.clean_length + plan.noisy_length), self.mask, dtype=torch.int64)
        clean = torch.zeros_like(ids, dtype=torch.bool)
        ids[:, : plan.clean_length] = 0
        for row, (answer, keys) in enumerate(zip(answers, wanted, strict=True)):
            ids[row, : len(answer.known)] = torch.tensor(answer.known)
            for block, key in enumerate(keys):
                if key.kind != MASKED:
                    first = plan.clean_length + block * self.size
                    ids[row, first], clean[row, first] = key.token, key.kind == MIXED
        return ids, clean

    def _sampling(
        self, answers: Sequence[Answer], wanted: Sequence[Sequence[Key]], choices: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Temperature float32, seed and document position int64 of what every row of logits chooses."""
        found: list[tuple[float, int, int]] = []
        if choices:
            for answer in answers:
                first = len(answer.prompt)
                found += [(answer.temperature, answer.seed, first + at) for at in range(len(answer.table.answer))]
        for answer, keys in zip(answers, wanted, strict=True):
            for key in keys:
                first = len(answer.prompt) + key.place + 1
                found += [(answer.temperature, answer.seed, first + at) for at in range(self.size)]
        heat, seed, position = zip(*found, strict=True)
        device = self.program.device
        return (
            torch.tensor(heat, dtype=torch.float32, device=device), torch.tensor(seed, device=device),
            torch.tensor(position, device=device),
        )

    def _slots(self, logits: Tensor, heat: Tensor, seed: Tensor, position: Tensor) -> list[Slot]:
        """The best candidates of every row: by `flarec.decode.sampling.choose`, then without those before."""
        vocabulary = torch.arange(logits.shape[1], device=logits.device)
        tokens, scores = [], []
        size = max(1, NOISE_ROWS[logits.device.type] // logits.shape[1])
        for rows in torch.arange(len(logits), device=logits.device).split(size):
            score = logits[rows].float()
            if self.never is not None:
                score = score.masked_fill(self.never, -torch.inf)
            if bool(heat[rows].any()):
                score = gumbel(seed[rows], position[rows], vocabulary).mul_(heat[rows, None]).add_(score)
            for _ in range(CANDIDATES):
                best, token = score.max(dim=1, keepdim=True)
                tokens.append(token)
                scores.append(best)
                score = score.scatter(1, token, -torch.inf)
        parts = range(0, len(tokens), CANDIDATES)
        ids, leads = (
            torch.cat([torch.cat(found[at : at + CANDIDATES], 1) for at in parts]) for found in (tokens, scores)
        )
        gaps = leads[:, :-1] - leads[:, 1:]
        return [Slot(tuple(row), tuple(gap)) for row, gap in zip(ids.tolist(), gaps.tolist(), strict=True)]
