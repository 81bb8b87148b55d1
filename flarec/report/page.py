"""The chapters and samples as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

from .chapters import Chapter
from .samples import Sample

ORIGINS = {
    "accepted": "drafted and accepted",
    "clean": "the clean stream's own",
    "corrected": "the clean stream's, in the place of a draft rejected or taken back",
    "unverified": "of a noisy row, and not what the clean stream is known to choose",
}
NO_SAMPLES = "No samples were asked for: give --prompts FILE."


def to_html(name: str, parts: Sequence[Chapter], samples: Sequence[Sample]) -> str:
    """The page. Everything that a model, a manifest or a record says is escaped."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_template("page.html"))
    return _writable(template.render(
        name=name, chapters=parts, samples=samples, origins=ORIGINS, no_samples=NO_SAMPLES,
        summary=summary_of,
    ))


def to_markdown(name: str, parts: Sequence[Chapter], samples: Sequence[Sample]) -> str:
    """The same without figures and colours: tables, texts and counts."""
    lines = [f"# {_inline(name)}"]
    for chapter in parts:
        lines += ["", f"## {chapter.title}"]
        for part in chapter.parts:
            lines += ["", f"### {part.title}"] if part.title else []
            lines += ["", part.note] if part.note else []
            if part.table is not None:
                lines += ["", _row(part.table.head), _row(["---"] * len(part.table.head))]
                lines += [_row(row) for row in part.table.rows]
    lines += ["", "## Samples"]
    if not samples:
        lines += ["", NO_SAMPLES]
    for number, sample in enumerate(samples, 1):
        lines += ["", f"### Sample {number}", "", summary_of(sample), "", *_fenced(sample.prompt)]
        lines += ["", *_fenced(sample.text)]
    return _writable("\n".join(lines) + "\n")


def _writable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON and names of files may hold and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode()


def summary_of(sample: Sample) -> str:
    """Mode, speed and origins of the tokens in a line."""
    counts = ", ".join(f"{sample.counts[origin]} {origin}" for origin in sample.counts)
    return (
        f"{sample.mode}, temperature {sample.temperature:g}: {sample.new_tokens} tokens in {sample.forwards} forwards "
        f"({counts}), stopped by {sample.stop_reason}"
    )


def _template(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_inline, cells))} |"


def _inline(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> list[str]:
    """A block of code, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}text", text, fence]
