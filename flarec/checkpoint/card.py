"""The model card of a checkpoint, and the licence that a source's card states."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .curve import HEAD, KEY, curves
from .manifest import RUN_KEY, Manifest

_WHAT_CONVERTED = (
    "`{0}`, converted with flarec into a dual-mode language model: one set of weights decodes one token at a time "
    "(`causal`), drafts blocks and verifies them in the same forward pass (`ar-trust`: the text of `causal` in fewer "
    "passes), or fills blocks by parallel denoising (`diffusion-trust`)."
)
_WHAT_ADAPTED = (
    "An adapter of rank {1} that makes `{0}` a dual-mode language model, made with flarec. The model's weights are "
    "untouched: it decodes one token at a time (`causal`) as before, drafts blocks with the adapter and verifies them "
    "without it in the same forward pass (`ar-trust`: the text of `causal`, token for token, in fewer passes), or "
    "fills blocks by parallel denoising (`diffusion-trust`)."
)
_ELASTIC = (
    " A head on the frozen weights says how many drafts are safe (`elastic`: the next token and that many in a pass)."
)
_RECHECK = (
    "`recheck`, of {0}: a token of a noisy row is taken back where the clean stream finds it less likely than this "
    "share of its own choice. 1 gives the text of `causal`; 0 leaves every token as it is, and the text may differ."
)
_NOT_FOR_PEFT = (
    "`adapter/` has the layout of peft, and peft can open it, but **do not load or merge it with peft**: it was "
    "trained for the noisy rows of a block-diffusion program alone. peft applies an adapter to every row, which ruins "
    "the text that the model itself writes, and so what `ar-trust` verifies against. flarec applies it to noisy rows."
)

DECODING, CURVES = "## Decoding", "## Accuracy at tokens per forward"
"""Headings of the sections that `retold` makes anew."""


def licence_of(directory: Path) -> str | None:
    """The `license` of the front matter of a directory's README.md, None if there is none."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    line = re.search(r"^license:[ \t]*(\S.*?)[ \t]*$", front[1], re.MULTILINE) if front else None
    return line[1].strip("\"'") if line else None


def model_card(manifest: Manifest, name: str, carried: str | None = None, chat: bool = False) -> str:
    """README.md of a checkpoint: front matter, what it is, how to use it, how it was made.

    carried: for a multimodal checkpoint, what of it was converted and what was not. chat: it has a chat template.
    """
    data = {key: value for key, value in manifest.data.items() if key != RUN_KEY}
    source, info = manifest.source, manifest.adapter
    opener = "AutoModelForImageTextToText" if carried else "AutoModelForCausalLM"
    recipe = str(manifest.recipe.get("name", "custom"))
    elastic = "elastic" in manifest.pipelines
    model = source.name if info is not None and info.alone else name
    adapter = f" --adapter {name}" if info is not None and info.alone else ""
    keyword = f', adapter="{name}"' if adapter else ""
    prompt, option, argument = ("What is a token?", " --chat", ", chat=True") if chat else ("Once upon a time", "", "")
    sections = [
        _front_matter(manifest, multimodal=bool(carried)),
        f"# {name}",
        (_WHAT_ADAPTED.format(source.name, info.rank) if info is not None else _WHAT_CONVERTED.format(source.name))
        + (_ELASTIC if elastic else ""),
        "## Use",
        "```\n"
        f'flarec generate {model}{adapter} "{prompt}"{option} --mode ar-trust\n'
        "```",
        "```python\n"
        "import flarec\n\n"
        f'print(flarec.load("{model}"{keyword}).generate("{prompt}"{argument}).text)\n'
        "```",
        *([] if adapter else [f"It is a plain transformers checkpoint: `{opener}.from_pretrained` opens it without "
        "remote code and generates causally. With flarec installed the other modes are there as well; the argument "
        "lets transformers run `custom_generate/generate.py` of this directory, a few lines that call flarec:"]),
        "```python\n"
        f'model.generate(ids, custom_generate="{name}", trust_remote_code=True, mode="ar-trust"{keyword})\n'
        "```",
        *(["## The adapter", _NOT_FOR_PEFT] if info is not None else []),
        *(["## Multimodal", f"{carried}. The decode modes of flarec take text."] if carried else []),
        *_decoding(manifest),
        *_curves(manifest),
        "## Training",
        _table({"recipe": recipe, **data}),
    ]
    if metrics := {name: value for name, value in manifest.metrics.items() if name != KEY}:
        sections += ["## Measurements", _table(metrics)]
    licence = source.licence or "not stated by the source; ask its authors before you pass this model on"
    sections += ["## Licence", f"That of the source: {licence}.", "## Versions", _table(manifest.versions)]
    return "\n\n".join(sections) + "\n"


def retold(text: str, manifest: Manifest) -> str:
    """A card, as it was written or as somebody edited it, with what it says of decoding as the manifest has it now. The
    rest stays; sections that are missing are added, behind the one on decoding or at the end."""
    parts = _sections(text)
    for heading, made in ((DECODING, _decoding(manifest)), (CURVES, _curves(manifest))):
        headings = [part.partition("\n")[0].rstrip() for part in parts]
        if heading not in headings:
            place = headings.index(DECODING) + 1 if DECODING in headings else len(parts)
            parts.insert(place, "")
        else:
            place = headings.index(heading)
        parts[place] = "\n\n".join(made)
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _sections(text: str) -> list[str]:
    """What stands before the first heading of the second level, then every section from its heading on. Lines in blocks
    of code are no headings."""
    parts: list[list[str]] = [[]]
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            parts.append([])
        parts[-1].append(line)
    return ["\n".join(part) for part in parts]


def _decoding(manifest: Manifest) -> list[str]:
    """The section on how the checkpoint decodes unless told otherwise."""
    decode, mask, elastic = manifest.decode, manifest.mask, "elastic" in manifest.pipelines
    if mask.kind == "row":
        token = f"the spare vocabulary row {mask.token_id}; it is never generated"
    elif mask.kind == "random":
        token = f"none: masked positions show one of {sum(end - first for first, end in mask.ids):,} ids at random"
    else:
        token = f"a learned vector in `{'adapter/' if manifest.adapter else ''}flarec.safetensors`"
    rechecked = ["diffusion-trust"] * ("diffusion-trust" in decode.readouts) + ["elastic"] * elastic
    own = [mode for mode in rechecked if mode in decode.chosen]
    shared = _settings(decode.settings("")) if len(own) < max(1, len(rechecked)) else {}
    for mode in own:
        shared |= {f"{mode}, {name}": value for name, value in _settings(decode.chosen[mode]).items()}
    names = " and ".join(f"`{mode}`" for mode in rechecked)
    table = {
        "block size": decode.block_size,
        "readouts": ", ".join(f"{mode}: {readout}" for mode, readout in decode.readouts.items()),
        **shared,
        "denoising steps": decode.denoising_steps or "block size",
        "mask token": token,
        **({"elastic": "`horizon.safetensors` says how many drafts are taken"} if elastic else {}),
    }
    return [DECODING, _table(table), *([_RECHECK.format(names)] if rechecked else [])]


def _settings(values: dict[str, float]) -> dict[str, Any]:
    return {"confidence threshold": values["threshold"], "recheck": values["recheck"] or "none"}


def _curves(manifest: Manifest) -> list[str]:
    """The section on what `flarec tune` measured; nothing where it did not."""
    parts = []
    for curve in curves(manifest):
        rows = [HEAD, tuple("---" for _ in HEAD), *(point.cells() for point in curve.points)]
        lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
        parts += [f"`{_cell(curve.mode)}`. {_cell(curve.about)}", "\n".join(lines)]
    return [CURVES, *parts] if parts else []


def _front_matter(manifest: Manifest, *, multimodal: bool) -> str:
    """What the Hub reads of a card."""
    source = manifest.source
    lines = [
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if multimodal else 'text-generation'}",
        "tags: [flarec, diffusion, speculative-decoding]",
    ]
    if source.licence:
        lines.append(f"license: {source.licence}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.name):
        lines.append(f"base_model: {source.name}")
    return "\n".join(["---", *lines, "---"])


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name} | {_cell(value)} |" for name, value in _flat(values)]
    return "\n".join(["| | |", "|---|---|", *rows])


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}, ")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
