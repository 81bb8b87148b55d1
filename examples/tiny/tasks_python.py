"""Small Python tasks: say what a program prints, or write a function from a parametrised family.

The program of a "what does this print" task and the function of a "write" task stand in a fenced block or on the
answer line, so `tasks.verify` can run them and compare with the answer.
"""

from __future__ import annotations

import random

from problem import WORDS, Generator, Problem, numbered

ASK = ("What does this Python program print?", "What is printed by this Python code?", "Give the output of this code.")


def printed(rng: random.Random, kind: str, lines: list[str], steps: list[str], answer: object) -> Problem:
    """A "what does this print" problem; the program itself is the key."""
    prompt = f"{rng.choice(ASK)}\n```python\n" + "\n".join(lines) + "\n```"
    return Problem(kind, tuple(lines), prompt, (*numbered(steps), f"The program prints {answer}."), str(answer))


def for_loop(rng: random.Random) -> Problem:
    """A running total over a range."""
    name = rng.choice(("total", "x", "count", "n", "value"))
    start, rounds, add = rng.randint(0, 40), rng.randint(2, 5), rng.randint(2, 12)
    use_index = rng.random() < 0.4
    body = f"{name} = {name} + i" if use_index else f"{name} = {name} + {add}"
    lines = [f"{name} = {start}", f"for i in range({rounds}):", f"    {body}", f"print({name})"]
    value, steps = start, [f"{name} starts at {start} and the loop runs {rounds} times."]
    for index in range(rounds):
        delta = index if use_index else add
        steps.append(f"With i = {index}, {name} becomes {value} + {delta} = {value + delta}.")
        value += delta
    return printed(rng, "for_loop", lines, steps, value)


def while_loop(rng: random.Random) -> Problem:
    """Repeat until a bound is reached."""
    start, bound = rng.randint(2, 12), rng.randint(20, 60)
    double = rng.random() < 0.5
    add = rng.randint(6, 15)
    lines = [f"x = {start}", f"while x < {bound}:", "    x = x * 2" if double else f"    x = x + {add}", "print(x)"]
    value, steps = start, [f"x starts at {start}."]
    while value < bound:
        after = value * 2 if double else value + add
        steps.append(f"{value} is less than {bound}, so x becomes {value} {'* 2' if double else f'+ {add}'} = {after}.")
        value = after
    steps.append(f"{value} is not less than {bound}, so the loop ends.")
    return printed(rng, "while_loop", lines, steps, value)


def slicing(rng: random.Random) -> Problem:
    """A slice of a list of numbers."""
    items = [rng.randint(1, 60) for _ in range(rng.randint(4, 6))]
    low = rng.randint(0, len(items) - 2)
    high = rng.randint(low + 1, len(items))
    lines = [f"items = {items}", f"print(items[{low}:{high}])"]
    places = [f"{index} is {item}" for index, item in enumerate(items)]
    steps = [f"By index, {', '.join(places)}.", f"The slice takes the indexes {low} to {high - 1}."]
    return printed(rng, "slicing", lines, steps, items[low:high])


def comprehension(rng: random.Random) -> Problem:
    """A list comprehension with an operation on each number."""
    items = [rng.randint(1, 20) for _ in range(rng.randint(3, 4))]
    operator, number = rng.choice(("+", "*")), rng.randint(2, 6)
    result = [item + number if operator == "+" else item * number for item in items]
    lines = [f"items = {items}", f"print([x {operator} {number} for x in items])"]
    each = [f"{item} {operator} {number} = {value}" for item, value in zip(items, result, strict=True)]
    steps = [f"Every x in the list becomes x {operator} {number}.", f"That gives {', '.join(each)}."]
    return printed(rng, "comprehension", lines, steps, result)


def condition(rng: random.Random) -> Problem:
    """Two branches on a comparison or on parity."""
    value, bound, left, right = rng.randint(1, 90), rng.randint(10, 80), rng.randint(2, 9), rng.randint(2, 9)
    parity = rng.random() < 0.5
    test = "n % 2 == 0" if parity else f"n > {bound}"
    holds = value % 2 == 0 if parity else value > bound
    lines = [f"n = {value}", f"if {test}:", f"    n = n + {left}", "else:", f"    n = n * {right}", "print(n)"]
    if parity:
        steps = [f"n is {value}, which is {'even' if holds else 'odd'}."]
    else:
        steps = [f"n is {value}, which is {'' if holds else 'not '}greater than {bound}."]
    steps.append(f"The test n % 2 == 0 is {holds}." if parity else f"The test n > {bound} is {holds}.")
    result = value + left if holds else value * right
    branch = f"{value} + {left}" if holds else f"{value} * {right}"
    steps.append(f"The {'first' if holds else 'second'} branch runs, so n becomes {branch} = {result}.")
    return printed(rng, "condition", lines, steps, result)


def call_twice(rng: random.Random) -> Problem:
    """A linear function applied to its own result."""
    name, arg = rng.choice(("f", "g", "step", "change")), rng.choice(("x", "n", "a"))
    factor, add, value = rng.randint(2, 4), rng.randint(1, 12), rng.randint(1, 12)
    first = value * factor + add
    lines = [f"def {name}({arg}):", f"    return {arg} * {factor} + {add}", f"print({name}({name}({value})))"]
    second = first * factor + add
    steps = [
        f"{name}({value}) is {value} * {factor} + {add} = {value * factor} + {add} = {first}.",
        f"{name}({first}) is {first} * {factor} + {add} = {first * factor} + {add} = {second}.",
    ]
    return printed(rng, "call_twice", lines, steps, second)


def lookup(rng: random.Random) -> Problem:
    """Two values of a dictionary, added."""
    names = rng.sample(WORDS, 3)
    values = [rng.randint(2, 60) for _ in names]
    one, two = rng.sample(range(3), 2)
    pairs = ", ".join(f'"{name}": {value}' for name, value in zip(names, values, strict=True))
    lines = [f"prices = {{{pairs}}}", f'print(prices["{names[one]}"] + prices["{names[two]}"])']
    total = values[one] + values[two]
    steps = [
        f"The value of {names[one]} is {values[one]}.",
        f"The value of {names[two]} is {values[two]}.",
        f"The sum is {values[one]} + {values[two]} = {total}.",
    ]
    return printed(rng, "lookup", lines, steps, total)


def text_lines(rng: random.Random) -> Problem:
    """Joining and repeating strings, and taking a length."""
    one, two, count = rng.choice(WORDS), rng.choice(WORDS), rng.randint(2, 4)
    lines = [f'a = "{one}"', f'b = "{two}"']
    if rng.random() < 0.5:
        lines.append(f"print(a + b * {count})")
        result = one + two * count
        steps = [f"b * {count} repeats {two} {count} times, which is {two * count}.",
                 f"Putting {one} in front gives {result}."]
        return printed(rng, "text_lines", lines, steps, result)
    lines.append(f"print(len(a) * {count} + len(b))")
    total = len(one) * count
    steps = [
        f"The letters of {one} are {', '.join(one)}, so len(a) is {len(one)}.",
        f"The letters of {two} are {', '.join(two)}, so len(b) is {len(two)}.",
        f"{len(one)} * {count} = {total} and {total} + {len(two)} = {total + len(two)}.",
    ]
    return printed(rng, "text_lines", lines, steps, total + len(two))


def write_and_call(rng: random.Random) -> Problem:
    """Write a function of a family, then say what one call returns."""
    name, factor, add, value = rng.choice(WORDS), rng.randint(2, 9), rng.randint(2, 30), rng.randint(2, 12)
    family = rng.choice(("scale", "area", "bill"))
    if family == "scale":
        told, args, call = f"multiplies a number x by {factor} and adds {add}", "x", f"{value}"
        body, first = f"x * {factor} + {add}", value * factor
        trace = [f"With x = {value}, x * {factor} is {value} * {factor} = {first}."]
    elif family == "area":
        told, args, call = f"multiplies two numbers a and b and adds {add}", "a, b", f"{value}, {factor}"
        body, first = f"a * b + {add}", value * factor
        trace = [f"With a = {value} and b = {factor}, a * b is {value} * {factor} = {first}."]
    else:
        told, args, call = f"adds {add} to a number x and multiplies the sum by {factor}", "x", f"{value}"
        body, first = f"(x + {add}) * {factor}", value + add
        trace = [f"With x = {value}, x + {add} is {value} + {add} = {first}."]
    if family == "bill":
        result = first * factor
        trace.append(f"Then {first} * {factor} = {result}.")
    else:
        result = first + add
        trace.append(f"Then {first} + {add} = {result}.")
    prompt = f"Write a Python function {name} that {told}. What does {name}({call}) return?"
    code = f"```python\ndef {name}({args}):\n    return {body}\n```"
    steps = (f"The function {told}:", code, *numbered(trace), f"So {name}({call}) returns {result}.")
    return Problem("write_and_call", (family, factor, add, value), prompt, steps, str(result))


def write_line(rng: random.Random) -> Problem:
    """Write a one-line function; the line itself is the answer."""
    name, n, m = rng.choice(WORDS), rng.randint(2, 30), rng.randint(2, 30)
    told, args, body, why = rng.choice((
        (f"returns the sum of all numbers in a list that are greater than {n}", "items",
         f"sum(x for x in items if x > {n})", f"x > {n} keeps the right numbers and sum adds them"),
        (f"returns the list items with {n} added to every number", "items", f"[x + {n} for x in items]",
         f"x + {n} is computed for every x in items"),
        (f"returns the list items with every number multiplied by {n}", "items", f"[x * {n} for x in items]",
         f"x * {n} is computed for every x in items"),
        (f"returns how many numbers in a list are less than {n}", "items", f"len([x for x in items if x < {n}])",
         f"x < {n} keeps the right numbers and len counts them"),
        (f"returns True if a number is between {n} and {n + m}", "x", f"{n} <= x <= {n + m}",
         f"the comparison is True from {n} up to {n + m}"),
        (f"returns a number modulo {n}, plus {m}", "x", f"x % {n} + {m}",
         f"x % {n} is the remainder and + {m} comes last"),
        (f"returns the larger of a number times {n} and the number plus {m}", "x", f"max(x * {n}, x + {m})",
         f"x * {n} and x + {m} are the two numbers and max picks the larger"),
        (f"returns the text repeated {n} times, followed by {m} stars", "text", f'text * {n} + "*" * {m}',
         f"text * {n} repeats the text and the stars are repeated {m} times"),
    ))
    prompt = f"Write a one-line Python function {name} that {told}."
    steps = numbered((f"The function takes {args}.", f"The result is {body}, since {why}."))
    return Problem("write_line", (name, body), prompt, steps, f"def {name}({args}): return {body}")


GENERATORS: dict[str, tuple[Generator, int]] = {
    "for_loop": (for_loop, 2), "while_loop": (while_loop, 2), "slicing": (slicing, 1),
    "comprehension": (comprehension, 1), "condition": (condition, 1), "call_twice": (call_twice, 2),
    "lookup": (lookup, 1), "text_lines": (text_lines, 1), "write_and_call": (write_and_call, 2),
    "write_line": (write_line, 2),
}
