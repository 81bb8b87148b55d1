"""Prompts from what the installed packages ship: docstrings, code and documentation, split by package.

    python examples/real/prompts.py --out out/prompts      # train.jsonl, choose.jsonl, report.jsonl
    flarec answers SOURCE --prompts out/prompts/train.jsonl --chat --out out/answers.jsonl

A package is in one split only, which its name alone decides: train on `train`, choose recipes on `choose`, report on
`report`. Texts that two packages ship (vendored code) are left out. Files are parsed, never imported.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sysconfig
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import track

from flarec.base.files import write_file

SHARES = {"train": 80, "choose": 10, "report": 10}
"""Per cent of the packages, about."""
SHORTEST, LONGEST = 80, 1500
"""Characters of the text that a prompt is about."""
LEFT_OUT = re.compile(r"(^|/)(tests?|testing|_?vendor(ed)?|third_party|site-packages|idlelib|turtledemo|\..*)(/|$)")
STANDARD_LIBRARY = "python"

CODE = {
    "explain code": "Explain what this Python {what} does, step by step.",
    "document": "Write a docstring for this Python {what}.",
    "review": "Review this Python {what}: name what could go wrong in it, and how you would change it.",
    "test": "Write unit tests for this Python {what}.",
    "translate": "Rewrite this Python {what} in JavaScript.",
}
DOCS = {
    "write": "Write the Python {what} `{name}` that this docstring describes.",
    "explain": "Explain to a beginner what this {what} of the Python package {package} is for.",
    "example": "Give a short example that uses the {what} `{name}` of the Python package {package}.",
    "questions": "Write two questions that a reader of this text may have, and answer them.",
}
PAGES = {
    "summarise": "Summarise this part of the documentation of {package} in three sentences.",
    "rewrite": "Rewrite this part of the documentation of {package} so that it is easier to read.",
    "list": "List the main points of this text.",
    "quiz": "Ask a question that this text answers, and give the answer.",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt, what of it comes from the package, and which package that is."""

    prompt: str
    text: str
    package: str
    kind: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the three files")
    parser.add_argument("--per-package", type=int, default=400, help="most prompts of one package")
    options = parser.parse_args()
    console = Console()
    places = list(packages(metadata.distributions()))
    found = [read_package(*place) for place in track(places, "reading packages", console=console)]
    splits = split(found, options.per_package)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, prompts in splits.items():
        records = ({"prompt": item.prompt, "package": item.package, "kind": item.kind} for item in prompts)
        write_file(options.out / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        owners, kinds = {item.package for item in prompts}, Counter(item.kind for item in prompts)
        text = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        console.print(f"{name}: {len(prompts):,} prompts of {len(owners)} packages ({text})")


def packages(distributions: Iterable[metadata.Distribution]) -> Iterator[tuple[str, list[Path], str]]:
    """(name, Python files, documentation) of every package, the standard library among them, in the order of names."""
    known: dict[str, tuple[list[Path], str]] = {}
    for distribution in distributions:
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        paths = sorted(str(path) for path in distribution.files or () if path.suffix == ".py")
        files = [Path(str(distribution.locate_file(path))) for path in paths if not LEFT_OUT.search(path)]
        payload = distribution.metadata.get_payload()
        page = distribution.metadata["Description"] or (payload if isinstance(payload, str) else "")
        known.setdefault(name, (files, page))
    root = Path(sysconfig.get_path("stdlib"))
    own = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT.search(path.relative_to(root).as_posix())]
    known[STANDARD_LIBRARY] = (own, "")
    for name in sorted(known):
        yield name, *known[name]


def read_package(name: str, files: Iterable[Path], page: str) -> list[Prompt]:
    """Everything that a package has to ask about."""
    found = [Prompt(*item) for path in files for item in _of_file(name, path)]
    for section in re.split(r"\n(?=#{1,4} )|\n(?=[^\n]+\n[=\-~]{4,}\n)", page):
        if SHORTEST <= len(section.strip()) <= LONGEST:
            found.append(Prompt(*_prompt(name, PAGES, section.strip(), "text", "")))
    return found


def _of_file(package: str, path: Path) -> Iterator[tuple[str, str, str, str]]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    lines = re.split(r"(?<=\n)", source)  # lines as the parser counts them
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        what = "class" if isinstance(node, ast.ClassDef) else "function"
        doc = ast.get_docstring(node) or ""
        code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        if SHORTEST <= len(doc) <= LONGEST:
            yield _prompt(package, DOCS, doc, what, node.name)
        elif not doc and SHORTEST <= len(code) <= LONGEST:
            yield _prompt(package, CODE, f"```python\n{code}\n```", what, node.name)


def _prompt(package: str, tasks: dict[str, str], text: str, what: str, name: str) -> tuple[str, str, str, str]:
    """One task about a text, chosen by the text."""
    kind = sorted(tasks)[number(text) % len(tasks)]
    task = tasks[kind].format(what=what, name=name, package=package)
    return f"{task}\n\n{text}", text, package, kind


def split(found: Iterable[Sequence[Prompt]], per_package: int) -> dict[str, list[Prompt]]:
    """The prompts of every split; of a package with too many those whose texts have the smallest hashes."""
    owners: defaultdict[str, set[str]] = defaultdict(set)
    groups = list(found)
    for group in groups:
        for item in group:
            owners[item.text].add(item.package)
    splits: dict[str, list[Prompt]] = {name: [] for name in SHARES}
    for group in groups:
        single = {item.text: item for item in group if len(owners[item.text]) == 1}
        chosen = sorted(single.values(), key=lambda item: number(item.text))[:per_package]
        if chosen:
            splits[split_of(chosen[0].package)] += chosen
    return {name: sorted(prompts, key=lambda item: number(item.prompt)) for name, prompts in splits.items()}


def split_of(package: str) -> str:
    """The split of a package: the same on every machine."""
    place = number(package) % 100
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("shares are of 100")


def number(text: str) -> int:
    """By which a text is known: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8])


if __name__ == "__main__":
    main()
