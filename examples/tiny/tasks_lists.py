"""Small tasks on lists and strings, each solved in written steps."""

from __future__ import annotations

import random

from problem import ORDINALS, WORDS, Generator, Problem, numbered

CONSONANTS, VOWELS = "bcdfghklmnprstvw", "aeiou"


def shown(items: list[str] | list[int]) -> str:
    """A list as it is written in the prompts: comma separated."""
    return ", ".join(map(str, items))


def syllables(rng: random.Random) -> str:
    """A made-up word of four to seven letters."""
    word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))
    return word + rng.choice(CONSONANTS) if rng.random() < 0.5 else word


def reverse_list(rng: random.Random) -> Problem:
    """Write a list of words backwards."""
    items = rng.sample(WORDS, rng.randint(3, 6))
    steps = [f"The list has {len(items)} words and the last one is {items[-1]}."]
    steps.append(f"Going from the end to the start gives {shown(items[::-1])}.")
    prompt = rng.choice(("Reverse this list: {}", "Write the list in reverse order: {}")).format(shown(items))
    return Problem("reverse_list", tuple(items), prompt, numbered(steps), shown(items[::-1]))


def sort_numbers(rng: random.Random) -> Problem:
    """Sort numbers by taking the smallest (or largest) again and again."""
    items = rng.sample(range(1, 100), rng.randint(3, 5))
    down = rng.random() < 0.4
    rest, done, steps = list(items), [], []
    while len(rest) > 1:
        pick = max(rest) if down else min(rest)
        rest.remove(pick)
        done.append(pick)
        steps.append(f"The {'largest' if down else 'smallest'} number is {pick}. What remains is {shown(rest)}.")
    steps.append(f"The last number is {rest[0]}.")
    order = "from largest to smallest" if down else "from smallest to largest"
    prompt = rng.choice(("Sort these numbers {}: {}", "Put these numbers in order {}: {}")).format(order, shown(items))
    return Problem("sort_numbers", (down, *items), prompt, numbered(steps), shown(done + rest))


def sort_words(rng: random.Random) -> Problem:
    """Sort words of different first letters."""
    items: list[str] = []
    for word in rng.sample(WORDS, len(WORDS)):
        if all(word[0] != other[0] for other in items):
            items.append(word)
        if len(items) == 4:
            break
    result = sorted(items)
    steps = (
        "The first letters are " + ", ".join(f"{word[0]} for {word}" for word in items) + ".",
        f"In the alphabet the letters come in the order {', '.join(word[0] for word in result)}.",
        f"So the words in order are {shown(result)}.",
    )
    return Problem("sort_words", tuple(items), f"Sort these words alphabetically: {shown(items)}", numbered(steps),
                   shown(result))


def count_item(rng: random.Random) -> Problem:
    """How often a word occurs in a list."""
    kinds = rng.sample(WORDS, 3)
    items = [rng.choice(kinds) for _ in range(rng.randint(5, 8))]
    word = rng.choice(items)
    places = [str(index) for index, item in enumerate(items, start=1) if item == word]
    count = len(places)
    steps = [f"Numbered, the list is {', '.join(f'{i} {item}' for i, item in enumerate(items, start=1))}."]
    steps.append(f"The word {word} is found at {'place' if count == 1 else 'places'} {', '.join(places)}.")
    steps.append(f"That is {count} {'time' if count == 1 else 'times'}.")
    prompt = f"How many times does the word {word} occur in this list? {shown(items)}"
    return Problem("count_item", (word, *items), prompt, numbered(steps), str(count))


def extremes(rng: random.Random) -> Problem:
    """The largest minus the smallest number of a list."""
    items = rng.sample(range(1, 100), rng.randint(3, 6))
    high, low = max(items), min(items)
    steps = (
        f"The largest number in {shown(items)} is {high}.",
        f"The smallest number is {low}.",
        f"The difference is {high} - {low} = {high - low}.",
    )
    prompt = f"What is the difference between the largest and the smallest of these numbers? {shown(items)}"
    return Problem("extremes", tuple(items), prompt, numbered(steps), str(high - low))


def nth_element(rng: random.Random) -> Problem:
    """The n-th word of a list."""
    items = rng.sample(WORDS, rng.randint(4, 7))
    place = rng.randrange(len(items))
    steps = (
        f"Numbered, the list is {', '.join(f'{i} {item}' for i, item in enumerate(items, start=1))}.",
        f"Number {place + 1} is {items[place]}.",
    )
    prompt = f"What is the {ORDINALS[place]} word of this list? {shown(items)}"
    return Problem("nth_element", (place, *items), prompt, numbered(steps), items[place])


def join_words(rng: random.Random) -> Problem:
    """Join words with a separator."""
    items = rng.sample(WORDS, rng.randint(3, 5))
    name, mark = rng.choice((("a dash", "-"), ("a plus sign", "+"), ("a slash", "/"), ("an underscore", "_")))
    result = mark.join(items)
    steps = (
        f"The words are {shown(items)}.",
        f"Between two words goes {name}, that is {mark} each time.",
        f"Joined, this is {result}.",
    )
    prompt = f"Join these words with {name} between them: {shown(items)}"
    return Problem("join_words", (mark, *items), prompt, numbered(steps), result)


def reverse_string(rng: random.Random) -> Problem:
    """Write a made-up word backwards, letter by letter."""
    word = syllables(rng)
    steps = (
        f"The letters of {word} are {', '.join(word)}.",
        f"In reverse order they are {', '.join(word[::-1])}.",
        "Put together they make the reversed word.",
    )
    prompt = rng.choice(('Reverse the string "{}".', 'Write the string "{}" backwards.')).format(word)
    return Problem("reverse_string", (word,), prompt, numbered(steps), word[::-1])


def count_letter(rng: random.Random) -> Problem:
    """Count the vowels of a made-up word."""
    word = syllables(rng) + syllables(rng)
    found = [letter for letter in word if letter in VOWELS]
    steps = (
        f"The letters of {word} are {', '.join(word)}.",
        f"The vowels among them are {', '.join(found)}.",
        f"That makes {len(found)} vowels.",
    )
    return Problem("count_vowels", (word,), f'How many vowels are in the string "{word}"?', numbered(steps),
                   str(len(found)))


def sum_list(rng: random.Random) -> Problem:
    """Add up a list, one number at a time."""
    items = [rng.randint(2, 40) for _ in range(rng.randint(3, 5))]
    total, steps = items[0], [f"Start with {items[0]}."]
    for item in items[1:]:
        steps.append(f"Add {item}: {total} + {item} = {total + item}.")
        total += item
    prompt = rng.choice(("What is the sum of these numbers? {}", "Add up this list: {}")).format(shown(items))
    return Problem("sum_list", tuple(items), prompt, numbered(steps), str(total))


def filter_numbers(rng: random.Random) -> Problem:
    """Keep the numbers of a list that are even, odd, or above a bound."""
    items = rng.sample(range(1, 100), rng.randint(4, 6))
    rule = rng.choice(("even", "odd", "above"))
    bound = rng.randint(20, 80)
    name = f"greater than {bound}" if rule == "above" else rule

    def kept(item: int) -> bool:
        return item > bound if rule == "above" else item % 2 == (rule == "odd")

    result = [item for item in items if kept(item)]
    if not result:
        return filter_numbers(rng)
    checks = [f"{item} {'yes' if kept(item) else 'no'}" for item in items]
    steps = [f"Check every number: {', '.join(checks)}."]
    steps.append(f"The numbers with yes are {shown(result)}.")
    prompt = f"Which of these numbers are {name}? {shown(items)}"
    key = (rule, bound if rule == "above" else 0, *items)
    return Problem("filter_numbers", key, prompt, numbered(steps), shown(result))


GENERATORS: dict[str, tuple[Generator, int]] = {
    "reverse_list": (reverse_list, 2), "sort_numbers": (sort_numbers, 2), "sort_words": (sort_words, 1),
    "count_item": (count_item, 2), "extremes": (extremes, 2), "nth_element": (nth_element, 1),
    "join_words": (join_words, 1), "reverse_string": (reverse_string, 1), "count_vowels": (count_letter, 1),
    "sum_list": (sum_list, 2), "filter_numbers": (filter_numbers, 1),
}
