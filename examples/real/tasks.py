"""Tasks with exact checks that a model of 135 M parameters can do: grammar, arithmetic, short Python, records.

    python examples/real/tasks.py --out out/tasks      # choose.jsonl, report.jsonl: 624 tasks each, no question in both
    python examples/real/tasks.py --out out/plain --no-chat  # the same questions as texts that a base model continues

Records are those of `flarec eval --data FILE --execute`. Most show two to four examples of the same kind first, as
turns of a chat or as lines: SmolLM2-135M-Instruct (dequantised, greedy) gives 45 to 100 % right answers of each kind
then (24 of each). What it was tried on and can do less often is left out: subtraction below 20 (2 of 16 right),
additions of three digits without carries (3 of 20), the larger of two numbers (6 of 20), values of expressions with
strings (3 of 16), a list of two records (0 of 20).

Without a chat the examples and the question are one text, which goes on with the answer, and each task holds what an
answer ends before (`stop`): a base model goes on with a question of its own. gemma-3-270m, a base model, gives 50 to
100 % right answers of each kind then (12 of each, greedy, bfloat16 on a CPU).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from words import CITIES, JOBS, NAMES, NOUNS, PAST

from flarec.base.files import write_file

SPLITS = ("choose", "report")
COUNT = 48
"""Tasks per kind and split."""

WORD, NUMBER, LINE, OBJECT = r"\A\W*(\w+)", r"\A\s*(-?\d+)", r"\A\s*([^\n]*)", r"(\{[^}]*\})"

IRREGULAR = {"leaf": "leaves", "wolf": "wolves", "knife": "knives", "hero": "heroes", "potato": "potatoes",
             "half": "halves", "loaf": "loaves", "shelf": "shelves", "thief": "thieves", "tomato": "tomatoes",
             "wife": "wives"}
TWICE = {"stop", "run", "plan", "begin", "drop", "forget", "hug", "shop", "sit", "swim", "win"}
"""Verbs that double their last letter."""
FUNCTIONS = {  # what x is: what is returned, the expression
    "(0, 1, 7, 40)": [("x plus {k}", "x + {k}"), ("x times {k}", "x * {k}"), ("{k} minus x", "{k} - x"),
                      ("the square of x plus {k}", "x ** 2 + {k}"), ("the remainder of x divided by {k}", "x % {k}"),
                      ("True if x is larger than {k}", "x > {k}"), ("the larger of x and {k}", "max(x, {k})")],
    "([3, 1, 4, 1, 5], [2, 2], [9, 2, 6, 5, 3, 5, 8])": [
        ("the first {k} elements of the list x", "x[:{k}]"), ("the sum of the list x plus {k}", "sum(x) + {k}"),
        ("how often {k} occurs in the list x", "x.count({k})")],
}


@dataclass(frozen=True)
class Item:
    """A question, the answer that a model is shown as an example, and what `flarec eval` checks (`check`)."""

    question: str
    answer: str
    check: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Kind:
    """items: all that there is, or enough, each question once. shots: examples before a question. tokens: new ones that
    an answer needs at most. chat: as turns of a chat, else as lines of a text that goes on with the answer."""

    group: str
    items: Callable[[random.Random], list[Item]]
    shots: int
    tokens: int
    chat: bool = True


def matched(question: str, answer: str, pattern: str) -> Item:
    return Item(question, answer, (("answer", answer), ("pattern", pattern)))


def plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    return noun + "s" if not _hisses(noun) and not _ends_in_ies(noun) else _long(noun)


def third_person(verb: str) -> str:
    return _long(verb) if verb == "go" or _hisses(verb) or _ends_in_ies(verb) else verb + "s"


def present_participle(verb: str) -> str:
    if verb in TWICE:
        return verb + verb[-1] + "ing"
    return (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"


def _hisses(word: str) -> bool:
    return word.endswith(("s", "x", "ch", "sh"))


def _ends_in_ies(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


def _long(word: str) -> str:
    return word[:-1] + "ies" if _ends_in_ies(word) else word + "es"


def plurals(_: random.Random) -> list[Item]:
    return [matched(f'What is the plural of "{noun}"?', plural(noun), WORD) for noun in NOUNS]


def past_tenses(_: random.Random) -> list[Item]:
    return [matched(f'What is the past tense of "{verb}"?', past, WORD) for verb, past in PAST.items()]


def third_persons(_: random.Random) -> list[Item]:
    text = 'Fill the gap with the right form of "{}": Every day she ___.'
    return [matched(text.format(verb), third_person(verb), WORD) for verb in PAST]


def participles(_: random.Random) -> list[Item]:
    return [matched(f'What is the -ing form of "{verb}"?', present_participle(verb), WORD) for verb in PAST]


def agreements(draw: random.Random) -> list[Item]:
    found = []
    for noun in NOUNS:
        many = draw.random() < 0.5
        text = f"Fill the gap with is or are: The {plural(noun) if many else noun} ___ here."
        found.append(matched(text, "are" if many else "is", WORD))
    return found


def sums(_: random.Random) -> list[Item]:
    numbers = range(1, 13)
    return [matched(f"{one} + {two} =", str(one + two), NUMBER) for one in numbers for two in numbers]


def products(_: random.Random) -> list[Item]:
    numbers = range(1, 11)
    return [matched(f"{one} * {two} =", str(one * two), NUMBER) for one in numbers for two in numbers]


def sequences(_: random.Random) -> list[Item]:
    found = []
    for start in range(1, 31):
        for step in (1, 2, 5, 10):
            shown = ", ".join(str(start + step * place) for place in range(5))
            found.append(matched(f"{shown},", str(start + 5 * step), NUMBER))
    return found


def functions(_: random.Random) -> list[Item]:
    found = []
    for inputs, forms in FUNCTIONS.items():
        for text, expression in forms:
            for k in range(2, 14):
                value = expression.format(k=k)
                question = f"Write a Python function f(x) that returns {text.format(k=k)}."
                tests = f"for x in {inputs}:\n    assert f(x) == ({value}), x"
                found.append(Item(question, f"def f(x):\n    return {value}", (("tests", tests),)))
    return found


def person(draw: random.Random) -> dict[str, Any]:
    name = draw.choice(NAMES)
    return {"name": name, "age": draw.randint(18, 80), "city": draw.choice(CITIES), "job": draw.choice(JOBS),
            "email": f"{name.lower()}{draw.randint(10, 99)}@example.com", "score": draw.randint(100, 999)}


def _of_people(draw: random.Random, make: Callable[[dict[str, Any]], Item]) -> list[Item]:
    found = {item.question: item for item in (make(person(draw)) for _ in range(4 * COUNT))}
    return list(found.values())


def copies(draw: random.Random) -> list[Item]:
    def make(one: dict[str, Any]) -> Item:
        text = json.dumps({**one, "tags": draw.sample(NOUNS, 3)})
        return matched(f"Copy this JSON record exactly, and write nothing else:\n{text}", text, OBJECT)

    return _of_people(draw, make)


def to_json(draw: random.Random) -> list[Item]:
    def make(one: dict[str, Any]) -> Item:
        line = ",".join(map(str, one.values()))
        return matched(f"Write this CSV line ({','.join(one)}) as a JSON record:\n{line}", json.dumps(one), LINE)

    return _of_people(draw, make)


def to_csv(draw: random.Random) -> list[Item]:
    def make(one: dict[str, Any]) -> Item:
        line = ",".join(map(str, one.values()))
        return matched(f"Write this JSON record as a CSV line:\n{json.dumps(one)}", line, LINE)

    return _of_people(draw, make)


def fields(draw: random.Random) -> list[Item]:
    def make(one: dict[str, Any]) -> Item:
        short = {key: one[key] for key in ("name", "age", "city", "job")}
        key = draw.choice(list(short))
        return matched(f"{json.dumps(short)}\nWhat is the {key}?", str(short[key]), LINE)

    return _of_people(draw, make)


KINDS = {
    "plural": Kind("grammar", plurals, 3, 8), "past tense": Kind("grammar", past_tenses, 3, 8),
    "third person": Kind("grammar", third_persons, 3, 8), "-ing form": Kind("grammar", participles, 3, 8),
    "agreement": Kind("grammar", agreements, 4, 8),
    "sum": Kind("arithmetic", sums, 4, 8, chat=False), "product": Kind("arithmetic", products, 4, 8, chat=False),
    "sequence": Kind("arithmetic", sequences, 3, 8, chat=False),
    "function": Kind("python", functions, 2, 32),
    "copy": Kind("records", copies, 0, 96), "to JSON": Kind("records", to_json, 2, 80),
    "to CSV": Kind("records", to_csv, 2, 48), "field": Kind("records", fields, 3, 16),
}


PLAIN_SHOTS = 2
"""At least so many examples of a kind are shown where there is no chat: nothing else says what an answer looks like."""


def continued(item: Item, shots: Sequence[Item], kind: Kind) -> dict[str, Any]:
    """A text that goes on with the answer, for a model without a chat template."""
    if not kind.chat:
        return {**record_of(item, shots, kind), "stop": ["\n"]}
    # code begins in a line of its own: Python does not run what is indented by a space
    before = "\n" if "\n" in item.answer else " "
    texts = [f"Question: {each.question}\nAnswer:" for each in (*shots, item)]
    shown = "".join(f"{text}{before}{shot.answer}\n\n" for text, shot in zip(texts, shots, strict=False))
    return {"prompt": shown + texts[-1] + before.strip(" "), "response": before.strip("\n") + item.answer,
            "stop": ["\n\n"], **dict(item.check)}


def record_of(item: Item, shots: Sequence[Item], kind: Kind) -> dict[str, Any]:
    """As `flarec eval` reads it."""
    if not kind.chat:
        before = "".join(f"{shot.question} {shot.answer}\n" for shot in shots)
        return {"prompt": before + item.question, "response": f" {item.answer}", **dict(item.check)}
    turns = []
    for turn in (*shots, item):
        turns += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return {"messages": turns, **dict(item.check)}


def tasks(
    split: str, seed: int = 0, count: int = COUNT, only: Sequence[str] = (), *, chat: bool = True
) -> list[dict[str, Any]]:
    """`count` tasks of every kind, in turn. A question is in one split only, as task or as example of another one."""
    record, least = (record_of, 0) if chat else (continued, PLAIN_SHOTS)
    drawn: list[list[dict[str, Any]]] = []
    for name in only or KINDS:
        kind, draw = KINDS[name], random.Random(f"{seed} {name}")
        items = kind.items(draw)
        draw.shuffle(items)
        mine = items[SPLITS.index(split) :: len(SPLITS)]
        if not 0 < count <= len(mine):
            raise ValueError(f"{count} tasks of {name} cannot be made; give 1 to {len(mine)}, the number of questions")
        draw = random.Random(f"{seed} {name} {split}")
        made = []
        for item in mine[:count]:
            shots = draw.sample([other for other in mine if other is not item], max(kind.shots, least))
            made.append({**record(item, shots, kind), "kind": name, "group": kind.group, "tokens": kind.tokens})
        drawn.append(made)
    return [task for together in zip(*drawn, strict=True) for task in together]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the two files")
    parser.add_argument("--count", type=int, default=COUNT, help="tasks per kind and split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=KINDS, default=[], help="kinds (repeatable; default: all)")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True,
                        help="questions as turns of a chat; --no-chat: as texts that a base model continues")
    options = parser.parse_args(arguments)
    try:
        made = {split: tasks(split, options.seed, options.count, options.only, chat=options.chat)
                for split in SPLITS}
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    for split, found in made.items():
        write_file(options.out / f"{split}.jsonl", "".join(json.dumps(task) + "\n" for task in found))
        print(f"{split}: {len(found)} tasks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
