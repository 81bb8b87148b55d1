"""Own answers against given data: prompts of which the package itself holds an answer, and both answers to them.

    python examples/real/pairs.py --out out/pairs                              # prompts.jsonl, held.jsonl
    flarec answers SOURCE --prompts out/pairs/prompts.jsonl --chat --out out/pairs/answers.jsonl
    python examples/real/pairs.py --out out/pairs --answers out/pairs/answers.jsonl --source SOURCE  # own, given
    python examples/real/compare.py SOURCE --data-of own=out/pairs/own.jsonl --data-of given=out/pairs/given.jsonl \
        --only own --only given --prompts out/prompts/choose.jsonl --out pairs.json

Two kinds of prompts.py, of documented functions and classes: `write` (the docstring is shown, the package's code is the
answer) and `document` (the code is shown without its docstring, which is the answer). Packages of the split `train`
alone. The model's answers are fewer, since those without an end are dropped: `own.jsonl` and `given.jsonl` are of the
same prompts, none whose one or other answer is longer than --longest tokens, and of about the same number of tokens:
where one side has more, prompts that add most to the difference are left out until it is below 2 %.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from prompts import CODE, DOCS, LONGEST, SHORTEST, Prompt, number, packages, split

from flarec.base.files import write_file

EVEN = 0.02
"""Of the tokens of an answer file: how much the other one may have more."""


@dataclass(frozen=True)
class Pair(Prompt):
    """A prompt and what the package has in the answer's place."""

    answer: str


def pairs_of(package: str, files: Iterable[Path]) -> list[Pair]:
    """One for each documented function and class of a package, `write` or `document` as its docstring decides."""
    return [pair for path in files for pair in _of_file(package, path)]


def _of_file(package: str, path: Path) -> Iterator[Pair]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    lines = re.split(r"(?<=\n)", source)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc, bare = ast.get_docstring(node) or "", _without_docstring(node, lines)
        code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        if not (bare and SHORTEST <= len(doc) <= LONGEST and len(bare) >= SHORTEST and len(code) <= LONGEST):
            continue
        what = "class" if isinstance(node, ast.ClassDef) else "function"
        if number(doc) % 2:
            task = DOCS["write"].format(what=what, name=node.name, package=package)
            yield Pair(f"{task}\n\n{doc}", doc, package, "write", _fenced(code))
        else:
            task = CODE["document"].format(what=what, name=node.name, package=package)
            yield Pair(f"{task}\n\n{_fenced(bare)}", doc, package, "document", f'"""{doc}"""')


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: Sequence[str]) -> str:
    """The code without it; empty where there is none, nothing else, or it shares a line with something else."""
    first, *rest = node.body
    alone = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and bool(rest)
    if not alone or first.lineno == node.lineno or rest[0].lineno <= (first.end_lineno or 0):
        return ""
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
    return textwrap.dedent("".join(kept)).rstrip()


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def matched(
    own: Sequence[dict[str, Any]], held: dict[str, dict[str, Any]], longest: int, count: Callable[[str], int]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(own, given) records of the same prompts, of about as many tokens. held: by prompt; count: tokens of a text."""
    pairs = []
    for record in own:
        other = held.get(record["messages"][0]["content"])
        if other is not None:
            sizes = record["tokens"], count(other["messages"][1]["content"])
            if max(sizes) <= longest:
                pairs.append((sizes, record, other))
    totals = [sum(sizes[side] for sizes, _, _ in pairs) for side in (0, 1)]
    more = 0 if totals[0] > totals[1] else 1
    pairs.sort(key=lambda pair: pair[0][1 - more] - pair[0][more])  # what adds most to the difference comes first
    while pairs and totals[more] > (1 + EVEN) * totals[1 - more]:
        sizes = pairs.pop(0)[0]
        totals = [total - size for total, size in zip(totals, sizes, strict=True)]
    return [(record, other) for _, record, other in pairs]


def _records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def build(out: Path, per_package: int) -> None:
    """Prompts and what the packages have for them."""
    places = packages(metadata.distributions())
    found = split([pairs_of(name, files) for name, files, _ in places], per_package)["train"]
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    _write(out / "prompts.jsonl", ({"prompt": pair.prompt, "package": pair.package, "kind": pair.kind}
                                   for pair in pairs))
    _write(out / "held.jsonl", ({"messages": [{"role": "user", "content": pair.prompt},
                                              {"role": "assistant", "content": pair.answer}],
                                 "package": pair.package, "kind": pair.kind} for pair in pairs))
    print(f"{len(pairs):,} prompts of {len({pair.package for pair in pairs})} packages")


def match(out: Path, answers: Sequence[Path], source: Path, longest: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    own = {record["messages"][0]["content"]: record for path in answers for record in _records(path)}
    held = {record["messages"][0]["content"]: record for record in _records(out / "held.jsonl")}

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = matched(list(own.values()), held, longest, count)
    if not pairs:
        raise SystemExit(f"no answer of {', '.join(map(str, answers))} is to a prompt of {out / 'prompts.jsonl'}")
    _write(out / "own.jsonl", (record for record, _ in pairs))
    _write(out / "given.jsonl", (other for _, other in pairs))
    given = sum(count(other["messages"][1]["content"]) for _, other in pairs)
    print(f"{len(pairs):,} prompts: {sum(record['tokens'] for record, _ in pairs):,} tokens own, {given:,} given")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the files")
    parser.add_argument("--per-package", type=int, default=400, help="most prompts of one package")
    parser.add_argument("--answers", type=Path, action="append", default=[], help="of flarec answers (repeatable)")
    parser.add_argument("--source", type=Path, help="the model that answered: its tokenizer counts")
    parser.add_argument("--longest", type=int, default=384, help="tokens of an answer")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.answers:
        build(options.out, options.per_package)
    elif options.source is None:
        parser.error("--answers needs --source, whose tokenizer counts")
    else:
        match(options.out, options.answers, options.source, options.longest)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
