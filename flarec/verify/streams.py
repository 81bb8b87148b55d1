"""Invariants of one forward over a layout: 1 (clean logits), 2 (no leak), 7 (views share a row)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from flarec.ir.program import Program
from flarec.layout import Block, Layout, build_layout

from .inputs import all_logits, random_ids, random_layout, random_tokens, reads, texts_of
from .places import compare_with_source
from .subject import Comparison, Result, Subject

ATEN = torch.ops.aten


def clean_logits(subject: Subject, cases: int = 4) -> Result:
    """Invariant 1: clean logits of the two-stream graph are those of the model in transformers, text by text: as far
    from its float64 logits as its own float32 can be."""
    rng = random.Random(subject.seed + 1)
    comparison, tokens = Comparison(), 0
    for _ in range(cases):
        layout = random_layout(rng, block_size=min(subject.block_size, 4), readouts=subject.readouts)
        ids = random_ids(rng, subject, layout)
        with torch.no_grad():
            ours = all_logits(subject.train, ids, layout)
        for row, slots in texts_of(layout):
            compare_with_source(comparison, subject, ids[row, slots].tolist(), ours[row, slots])
            tokens += len(slots)
    return comparison.result(1, "clean logits = source model", f"logits of {tokens} clean tokens beside noise")


def no_leak(subject: Subject, cases: int = 2) -> Result:
    """Invariant 2: the gradient of every row of logits with respect to every input embedding is zero exactly where the
    row may not read the input. The difference is the largest gradient where there should be none."""
    rng = random.Random(subject.seed + 2)
    leaks, blind, pairs, largest = 0, 0, 0, 0.0
    for _ in range(cases):
        layout = random_layout(rng, block_size=min(subject.block_size, 3), rows=1, readouts=subject.readouts)
        gradients = influence(subject.train, random_ids(rng, subject, layout), layout)
        allowed = reads(layout, 0)
        forbidden = gradients[~allowed]
        leaks += int((forbidden != 0).sum())
        blind += int((gradients[allowed] == 0).sum())
        pairs += gradients.numel()
        largest = max(largest, float(forbidden.max()) if forbidden.numel() else 0.0)
    notes = []
    if leaks:
        notes.append(f"{leaks} pairs of tokens leak")
    if blind:
        notes.append(f"{blind} pairs of tokens that should be read have no influence")
    return Result(2, "no leak", f"gradients of {pairs} token pairs", largest, 0.0, not notes, tuple(notes))


def influence(program: Program, ids: Tensor, layout: Layout) -> Tensor:
    """[T, T] for a layout with one row: largest absolute gradient of logits row t with respect to input embedding s."""
    rows = torch.arange(layout.length)
    given = program.given(ids, layout=layout, head_rows=rows)
    run = _FromEmbeddings(program.module)
    with torch.enable_grad():
        logits = run.run(*[given[name] for name in program.inputs])[0]
        assert run.embeddings is not None
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
        outputs = (logits * weights).sum(1)
        gradients = [torch.autograd.grad(output, run.embeddings, retain_graph=True)[0][0] for output in outputs]
    return torch.stack([gradient.abs().amax(1) for gradient in gradients])


class _FromEmbeddings(fx.Interpreter):
    """Runs a graph with the input embeddings [rows, T, D] cut off as a leaf that collects gradients."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.embeddings: Tensor | None = None
        tables = [node for node in module.graph.nodes if node.target is ATEN.embedding.default]
        assert len(tables) == 1, "expected one embedding table"
        # a mask vector is put in after the table: there the embeddings are complete
        mixed = [user for user in tables[0].users if user.target is ATEN.where.self]
        self.node = mixed[0] if mixed else tables[0]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n is self.node:
            self.embeddings = result = result.detach().requires_grad_()
        return result


def views_share_a_row(subject: Subject, cases: int = 2) -> Result:
    """Invariant 7: two views and a shifted grid in one row give the losses and gradients of three rows with one each.
    """
    rng = random.Random(subject.seed + 7)
    comparison = Comparison()
    for _ in range(cases):
        size, readout = min(subject.block_size, 3), rng.choice(list(subject.readouts))
        prompt, response = rng.randint(1, 4), rng.randint(3, 7)
        length = prompt + response
        anchors = range(prompt, length, size)
        views = [
            [Block(0, anchor + shift, size, view, readout) for anchor in anchors]
            for view, shift in enumerate((0, 0, 1))
        ]
        clean = random_tokens(rng, subject, length)
        noisy = [[rng.choice([subject.mask_token_id, *clean]) for _ in range(len(anchors) * size)] for _ in views]
        targets = torch.tensor([random_tokens(rng, subject, len(anchors) * size) for _ in views])
        together = build_layout([[length]], [[block for view in views for block in view]])
        apart = build_layout([[length]] * len(views), views)
        one = _losses_and_gradients(subject.train, torch.tensor([sum(noisy, clean)]), together, targets)
        each = _losses_and_gradients(subject.train, torch.tensor([clean + ids for ids in noisy]), apart, targets)
        for a, b in zip(one, each, strict=True):
            comparison.add(a, b, slack=subject.slack(clean))
    return comparison.result(7, "views and grids share a row", f"losses and all gradients, {cases} documents")


def _losses_and_gradients(program: Program, ids: Tensor, layout: Layout, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of every noisy token and the gradient of their sum, all parameters as one vector."""
    with torch.enable_grad():
        logits = all_logits(program, ids, layout)[:, layout.clean_length :]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        parameters = [p for p in program.module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    return losses, torch.cat([g.flatten() for g in gradients if g is not None])
