"""The invariants of docs/semantics.md section 5, each as a function that measures one and returns a `Result`.

`flarec verify` runs them on a real checkpoint, the tests on small models of every family. Each compares two ways to
compute the same numbers on small random layouts; the bound is a multiple of the rounding step of the run dtype at the
size of what is compared, so that float64 programs are held to float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .capture import capture, load_model
from .decode import Cache, Engine, SamplingParams
from .errors import CheckpointError
from .layout import BLOCK_END, Block, Layout, build_layout
from .manifest import Manifest
from .passes import lower
from .passes.embed_mask import PARAMETER
from .program import Program

ROUNDING_STEPS = 1000
"""Differences up to this many rounding steps of the largest compared number count as rounding."""
DEFAULT_BLOCK = 4


@dataclass(frozen=True)
class Subject:
    """What is verified: the lowered programs, how they decode, and the source model as an independent witness.

    train, decode   lowered programs that share their parameters
    source          the model in plain transformers, None if there is none to compare with
    mask_token_id   input id of masked positions; for a model that was not converted any id serves
    readouts        of AR-Trust's and other blocks; suppress: ids that are never generated
    """

    train: Program
    decode: Program
    source: Any
    mask_token_id: int
    block_size: int = DEFAULT_BLOCK
    readouts: tuple[str, ...] = ("block_end", "causal")
    suppress: tuple[int, ...] = ()
    converted: bool = True
    seed: int = 0

    def bound(self, *compared: Tensor) -> float:
        """`ROUNDING_STEPS` rounding steps of the largest compared number."""
        scale = max((float(x.detach().abs().max()) for x in compared if x.numel()), default=0.0)
        dtype = torch.float64 if all(x.dtype == torch.float64 for x in compared) else torch.float32
        return ROUNDING_STEPS * torch.finfo(dtype).eps * scale


@dataclass(frozen=True)
class Result:
    """One invariant: what was compared on how many cases, the largest difference and its bound."""

    invariant: int
    title: str
    compared: str
    difference: float
    bound: float
    passed: bool
    notes: tuple[str, ...] = field(default=())


def open_subject(path: str | Path, *, kernels: str = "torch", seed: int = 0) -> Subject:
    """Open a checkpoint or model in float32 on the CPU, capture it and lower both programs."""
    manifest = Manifest.read(Path(path)) if Path(path).is_dir() else None
    if manifest is not None:
        manifest.check_files(Path(path))
    source = load_model(path, torch.float32, "cpu")
    program = capture(source)
    vector = manifest is not None and manifest.mask.kind == "vector"
    if vector:
        program.extra[PARAMETER] = _mask_vector(Path(path))
    mask = manifest.mask.token_id if manifest is not None else 0
    return Subject(
        train=lower(program, "train", mask_vector=vector, kernels=kernels, debug=True),
        decode=lower(program, "decode", mask_vector=vector, kernels=kernels, debug=True),
        source=source,
        mask_token_id=mask,
        block_size=manifest.decode.block_size if manifest is not None else DEFAULT_BLOCK,
        readouts=tuple(dict.fromkeys(manifest.decode.readouts.values())) if manifest is not None else ("block_end", "causal"),
        suppress=(mask,) if manifest is not None and not vector else (),
        converted=manifest is not None,
        seed=seed,
    )


def _mask_vector(directory: Path) -> torch.nn.Parameter:
    from safetensors.torch import load_file

    tensors = load_file(directory / "flarec.safetensors")
    if PARAMETER not in tensors:
        raise CheckpointError(f"{directory / 'flarec.safetensors'} has no mask vector '{PARAMETER}'; copy the checkpoint again")
    return torch.nn.Parameter(tensors[PARAMETER].float())


# ---------------------------------------------------------------------------------------------------- random layouts


def random_layout(rng: random.Random, *, block_size: int = 3, rows: int = 2, readouts: Sequence[str] = ("block_end",)) -> Layout:
    """Packed rows as in training: one to three documents, a prompt without noisy copy, two views of every block."""
    documents, blocks = [], []
    for _ in range(rows):
        lengths, row = [], []
        for document in range(rng.randint(1, 3)):
            prompt, response = rng.randint(1, 5), rng.randint(2, 7)
            lengths.append(prompt + response)
            readout = rng.choice(list(readouts))
            anchors = range(prompt, prompt + response, block_size)
            row += [Block(document, a, block_size, view, readout) for view in (0, 1) for a in anchors]
        documents.append(lengths)
        blocks.append(row)
    return build_layout(documents, blocks).validate()


def random_ids(rng: random.Random, subject: Subject, layout: Layout) -> Tensor:
    """[rows, T] tokens; about half of the noisy ones are the mask token."""
    ids = torch.tensor([[rng.randrange(subject.train.vocab_size) for _ in range(layout.length)] for _ in range(layout.rows)])
    masked = torch.tensor([[rng.random() < 0.5 for _ in range(layout.length)] for _ in range(layout.rows)])
    masked[:, : layout.clean_length] = False
    return ids.masked_fill(masked, subject.mask_token_id)


def reads(layout: Layout, row: int) -> Tensor:
    """[T, T] bool: token t reads token s, written out from docs/semantics.md section 1. Padding neither reads nor is read."""
    clean, length = layout.clean_length, layout.length
    result = torch.zeros(length, length, dtype=torch.bool)
    document, position = layout.clean_document[row].tolist(), layout.clean_position[row].tolist()
    for t in range(clean):
        for s in range(clean):
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


def _all_rows(layout: Layout) -> Tensor:
    return torch.arange(layout.rows * layout.length)


def _logits(program: Program, ids: Tensor, layout: Layout) -> Tensor:
    """[rows, T, V] logits of a lowered training program."""
    return program(ids, layout=layout, head_rows=_all_rows(layout)).unflatten(0, (layout.rows, layout.length))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


def _documents(layout: Layout, ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(row, clean slots, token ids) of every document."""
    result = []
    for row in range(layout.rows):
        for document in sorted(set(layout.clean_document[row].tolist()) - {-1}):
            slots = (layout.clean_document[row] == document).nonzero().squeeze(1)
            result.append((row, slots, ids[row, slots]))
    return result


# ------------------------------------------------------------------------------------------------------- invariants


def clean_logits(subject: Subject, cases: int = 4) -> Result:
    """Invariant 1: clean logits of the two-stream graph are the source model's, document by document."""
    rng = random.Random(subject.seed + 1)
    worst, bound, rows = 0.0, 0.0, 0
    keep = _columns(subject)
    for _ in range(cases):
        layout = random_layout(rng, block_size=min(subject.block_size, 4), readouts=subject.readouts)
        ids = random_ids(rng, subject, layout)
        with torch.no_grad():
            ours = _logits(subject.train, ids, layout)
            for row, slots, tokens in _documents(layout, ids):
                theirs = subject.source(tokens[None]).logits[0]
                worst = max(worst, _difference(ours[row, slots][:, keep], theirs[:, keep]))
                bound = max(bound, subject.bound(theirs[:, keep]))
                rows += len(slots)
    return _result(1, "clean logits = source model", f"{rows} clean rows with noise, transformers", worst, bound)


def no_leak(subject: Subject, cases: int = 2) -> Result:
    """Invariant 2: the gradient of every logits row with respect to every input embedding vanishes exactly where the
    token is not read, and only there."""
    rng = random.Random(subject.seed + 2)
    leaks, blind, pairs = 0, 0, 0
    largest = 0.0
    for _ in range(cases):
        layout = random_layout(rng, block_size=min(subject.block_size, 3), rows=1, readouts=subject.readouts)
        ids = random_ids(rng, subject, layout)
        gradients = influence(subject.train, ids, layout)
        allowed = reads(layout, 0)
        leaks += int((gradients[~allowed] != 0).sum())
        blind += int((gradients[allowed] == 0).sum())
        pairs += gradients.numel()
        if bool((~allowed).any()):
            largest = max(largest, float(gradients[~allowed].max()))
    notes = (f"{leaks} pairs leak", f"{blind} pairs that should be read are not") if leaks or blind else ()
    return Result(2, "no leak between streams", f"gradients of {pairs} token pairs", largest, 0.0, not leaks and not blind, notes)


def influence(program: Program, ids: Tensor, layout: Layout) -> Tensor:
    """[T, T] of a layout with one row: largest absolute gradient of logits row t with respect to input embedding s."""
    run = _FromEmbeddings(program.module)
    derived: dict[str, Any] = {"input_ids": ids, "layout": layout, "head_rows": _all_rows(layout), **program.derive(layout)}
    with torch.enable_grad():
        logits = run.run(*[derived[node.name] for node in program.placeholders()])[0]
        assert run.embeddings is not None
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
        outputs = (logits * weights).sum(1)
        rows = [torch.autograd.grad(output, run.embeddings, retain_graph=True)[0][0].abs().amax(1) for output in outputs]
    return torch.stack(rows)


class _FromEmbeddings(fx.Interpreter):
    """Runs a graph with the input embeddings as a leaf that collects gradients."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.embeddings: Tensor | None = None
        calls = [n for n in module.graph.nodes if n.target is torch.ops.aten.embedding.default]
        assert len(calls) == 1, "expected one embedding table"
        # with a mask vector the embeddings are complete only after the `where` that puts it in
        mixed = [user for user in calls[0].users if user.target is torch.ops.aten.where.self]
        self.node = mixed[0] if mixed else calls[0]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n is self.node:
            self.embeddings = result = result.detach().requires_grad_()
        return result


def split_is_whole(subject: Subject, cases: int = 4) -> Result:
    """Invariant 3: prefill in pieces and step by step gives the logits and states of one pass."""
    rng = random.Random(subject.seed + 3)
    worst, bound, rows = 0.0, 0.0, 0
    for _ in range(cases):
        lengths = [rng.randint(6, 20) for _ in range(2)]
        tokens = [[rng.randrange(subject.train.vocab_size) for _ in range(n)] for n in lengths]
        whole = _Session(subject, tokens)
        complete = whole.feed(lengths)
        whole.flush()
        split = _Session(subject, tokens)
        pieces: list[list[Tensor]] = [[], []]
        while any(split.left()):
            counts = [min(left, rng.randint(0, 5)) for left in split.left()]
            if not any(counts):
                continue
            for request, logits in enumerate(split.feed(counts)):
                pieces[request].append(logits)
        split.flush()
        with torch.no_grad():
            for request, length in enumerate(lengths):
                layout = build_layout([[length]], [[]])
                trained = _logits(subject.train, torch.tensor([tokens[request]]), layout)[0]
                for logits in (torch.cat(pieces[request]), complete[request]):
                    worst = max(worst, _difference(logits, trained))
                bound = max(bound, subject.bound(trained))
                rows += length
        state, scale = _compare_caches(subject, whole.cache, split.cache, lengths)
        worst, bound = max(worst, state), max(bound, scale)
    return _result(3, "prefill + steps = one pass", f"{rows} rows and all caches", worst, bound)


def ar_trust_is_causal(
    subject: Subject, cases: int = 8, *, drafts: Sequence[str] = ("branches", "single"), new_tokens: int = 24
) -> Result:
    """Invariant 4: AR-Trust gives the tokens of causal decoding with the same seed, greedy and sampled.

    Rounding differs between forwards with different row counts: a first difference is excused if there the two best
    candidates (noise included) are closer than the logit error, which is measured in causal decoding itself.
    """
    rng = random.Random(subject.seed + 4)
    prompts = [[rng.randrange(subject.train.vocab_size) for _ in range(rng.randint(1, 12))] for _ in range(cases)]
    settings = [random_sampling(rng) for _ in range(cases)]
    different, excused, compared = 0, 0, 0
    notes = []
    for readout in subject.readouts:
        engine = Engine(
            subject.decode, mask_token_id=subject.mask_token_id, block_size=subject.block_size, eos_ids=(),
            readouts={"ar-trust": readout}, max_positions=4096, suppress=subject.suppress,
        )  # fmt: skip
        causal = engine.generate(prompts, "causal", settings, new_tokens)
        for scheme in drafts:
            trusted = engine.generate(prompts, "ar-trust", settings, new_tokens, drafts=scheme)
            for prompt, setting, a, b in zip(prompts, settings, causal, trusted, strict=True):
                compared += 1
                if a.token_ids == b.token_ids:
                    continue
                if _near_tie(subject, prompt, setting, a.token_ids, b.token_ids):
                    excused += 1
                else:
                    different += 1
                    notes.append(f"readout {readout}, drafts {scheme}, {setting}: {a.token_ids} != {b.token_ids}")
    passed = different == 0 and excused <= max(1, compared // 100)
    text = f"{compared} generations of {new_tokens} tokens" + (f", {excused} near ties" if excused else "")
    return Result(4, "AR-Trust = causal", text, float(different), 0.0, passed, tuple(notes[:3]))


def random_sampling(rng: random.Random) -> SamplingParams:
    """Greedy or sampled, with and without truncation."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 3, 40]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
        seed=rng.randrange(1 << 62),
    )


def _near_tie(subject: Subject, prompt: list[int], setting: SamplingParams, a: list[int], b: list[int]) -> bool:
    """True if at the first difference the two choices swap within the logit error."""
    from .decode.sampling import gumbel

    first = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    tokens = [*prompt, *a[:first]]
    session = _Session(subject, [tokens])
    whole = session.feed([len(tokens)])[0][-1]
    stepwise = _Session(subject, [tokens])
    for _ in range(len(tokens)):
        last = stepwise.feed([1])[0][-1]
    error = 4 * max(_difference(last, whole), float(whole.abs().max()) * torch.finfo(torch.float32).eps)
    pair = torch.tensor([a[first], b[first]])
    noise = gumbel(torch.tensor([setting.seed]), torch.tensor([len(tokens)]), pair)[0]
    scores = last[pair].float() + setting.temperature * noise
    # a truncation edge moves with the logits too: then one of the two is the last token that is kept
    at_edge = setting.top_p < 1 and _at_top_p_edge(last, setting, pair, error)
    return bool((scores[0] - scores[1]).abs() <= error) or at_edge


def _at_top_p_edge(logits: Tensor, setting: SamplingParams, pair: Tensor, error: float) -> bool:
    """True if a token of `pair` is kept or cut depending on an error of the logits."""
    scaled = logits.double() / (setting.temperature or 1.0)
    probabilities = scaled.softmax(0)
    tolerance = error / (setting.temperature or 1.0)
    for token in pair.tolist():
        above = float(probabilities[probabilities > probabilities[token]].sum())
        if abs(above - setting.top_p) <= 4 * tolerance:
            return True
    return False


def rejected_draft_leaves_no_trace(subject: Subject, cases: int = 4) -> Result:
    """Invariant 5: after a draft was rejected, all caches equal those of a run that never saw it, and so do its logits."""
    rng = random.Random(subject.seed + 5)
    worst, bound, states = 0.0, 0.0, 0
    for _ in range(cases):
        known = [rng.randint(3, 10) for _ in range(2)]
        accepted = [rng.randint(1, 3) for _ in range(2)]
        total = [n + a + 4 for n, a in zip(known, accepted, strict=True)]
        tokens = [[rng.randrange(subject.train.vocab_size) for _ in range(n)] for n in total]
        plain, drafted = _Session(subject, tokens), _Session(subject, tokens)
        for session in (plain, drafted):
            session.feed(known)
        clean = plain.feed(accepted)
        wrong = [[rng.randrange(subject.train.vocab_size) for _ in range(4)] for _ in range(2)]
        after = drafted.feed(accepted, rejected=wrong, blocks=True)
        # the next step commits; its logits depend on everything that was kept
        following = [session.feed([2, 2]) for session in (plain, drafted)]
        for a, b in [*zip(clean, after, strict=True), *zip(*following, strict=True)]:
            worst, bound = max(worst, _difference(a, b)), max(bound, subject.bound(a))
        for session in (plain, drafted):
            session.flush()
        state, scale = _compare_caches(subject, plain.cache, drafted.cache, plain.fed)
        worst, bound, states = max(worst, state), max(bound, scale), states + len(plain.cache.tensors)
    return _result(5, "rejected drafts leave no trace", f"{states} cache tensors and the next logits", worst, bound)


def opens_in_transformers(subject: Subject, model: Any, cases: int = 3) -> Result:
    """Invariant 6: `model`, opened by plain transformers, gives the causal logits that flarec decodes with."""
    rng = random.Random(subject.seed + 6)
    worst, bound, rows = 0.0, 0.0, 0
    keep = _columns(subject)
    for _ in range(cases):
        tokens = [rng.randrange(subject.train.vocab_size) for _ in range(rng.randint(8, 24))]
        session = _Session(subject, [tokens])
        ours = torch.cat([session.feed([1])[0] for _ in tokens])
        with torch.no_grad():
            theirs = model(torch.tensor([tokens])).logits[0]
        worst = max(worst, _difference(ours[:, keep], theirs[:, keep]))
        bound = max(bound, subject.bound(theirs[:, keep]))
        rows += len(tokens)
    return _result(6, "opens in transformers", f"{rows} decode steps, AutoModelForCausalLM", worst, bound)


def views_share_a_row(subject: Subject, cases: int = 2) -> Result:
    """Invariant 7: two views in one row give the losses and gradients of two rows with one view each."""
    rng = random.Random(subject.seed + 7)
    worst, bound, tensors = 0.0, 0.0, 0
    for _ in range(cases):
        size = min(subject.block_size, 3)
        prompt, response, readout = rng.randint(1, 4), rng.randint(3, 7), rng.choice(list(subject.readouts))
        length = prompt + response
        anchors = range(prompt, length, size)
        views = [[Block(0, a, size, view, readout) for a in anchors] for view in (0, 1)]
        together = build_layout([[length]], [[*views[0], *views[1]]])
        apart = build_layout([[length]] * 2, views)
        clean = [rng.randrange(subject.train.vocab_size) for _ in range(length)]
        noisy = [[rng.choice([subject.mask_token_id, *clean]) for _ in range(len(anchors) * size)] for _ in range(2)]
        targets = torch.tensor([[rng.randrange(subject.train.vocab_size) for _ in noisy[0]] for _ in range(2)])
        one = _noisy_loss(subject.train, torch.tensor([clean + noisy[0] + noisy[1]]), together, targets)
        two = _noisy_loss(subject.train, torch.tensor([clean + noisy[0], clean + noisy[1]]), apart, targets)
        for a, b in zip(one, two, strict=True):
            worst, bound = max(worst, _difference(a, b)), max(bound, subject.bound(a))
        tensors += len(one)
    return _result(7, "two views share a row", f"{tensors} losses and gradients", worst, bound)


INVARIANTS: tuple[Callable[[Subject], Result], ...] = (
    clean_logits,
    no_leak,
    split_is_whole,
    ar_trust_is_causal,
    rejected_draft_leaves_no_trace,
    views_share_a_row,
)
"""Invariants that need the subject alone; 6 needs the directory opened a second time."""


def verify(path: str | Path, *, kernels: str = "torch", seed: int = 0) -> list[Result]:
    """All invariants on a checkpoint or model directory, in their order (float32 on the CPU)."""
    from transformers import AutoModelForCausalLM

    subject = open_subject(path, kernels=kernels, seed=seed)
    results = [check(subject) for check in INVARIANTS]
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    results.append(opens_in_transformers(subject, model))
    return sorted(results, key=lambda result: result.invariant)
