"""Word problems with small whole numbers and a worked solution of two to five steps."""

from __future__ import annotations

import random

from problem import CONTAINERS, OBJECTS, PEOPLE, Generator, Problem, capital, numbered

TIMES = {2: "twice", 3: "three times", 4: "four times"}


def story(rng: random.Random) -> Problem:
    """A person's count of things changes one to four times."""
    (name, who), thing = rng.choice(PEOPLE), rng.choice(OBJECTS)
    have = rng.randint(5, 60)
    key: list[object] = [have]
    told, steps = [f"{name} has {have} {thing}."], [f"{name} starts with {have} {thing}."]
    for _ in range(rng.randint(1, 4)):
        event = rng.choice(("gain", "lose", "packs", "times"))
        if (event == "lose" and have < 4) or (event == "times" and have > 60):
            event = "gain"
        before = have
        if event == "gain":
            count = rng.randint(2, 49)
            have += count
            verb = rng.choice(("buys", "finds", "gets"))
            told.append(f"{capital(who)} {verb} {count} more {thing}.")
            steps.append(f"{capital(who)} {verb} {count} more, so now {who} has {before} + {count} = {have} {thing}.")
        elif event == "lose":
            count = rng.randint(2, min(have - 1, 49))
            have -= count
            verb = rng.choice(("gives away", "loses", "sells"))
            told.append(f"{capital(who)} {verb} {count} {thing}.")
            steps.append(f"{capital(who)} {verb} {count}, so now {who} has {before} - {count} = {have} {thing}.")
        elif event == "packs":
            count, each, box = rng.randint(2, 6), rng.randint(2, 9), rng.choice(CONTAINERS)
            have += count * each
            key.append(each)
            told.append(f"{capital(who)} buys {count} {box} with {each} {thing} in each.")
            steps.append(
                f"{count} {box} with {each} {thing} each make {count} * {each} = {count * each}, "
                f"so now {who} has {before} + {count * each} = {have} {thing}."
            )
        else:
            count = rng.randint(2, 3)
            have *= count
            told.append(f"Then the number of {thing} becomes {TIMES[count]} as large.")
            steps.append(f"The number becomes {TIMES[count]} as large: {before} * {count} = {have} {thing}.")
        key += [event, count]
    question = rng.choice((f"How many {thing} does {name} have now?", f"How many {thing} does {who} have at the end?"))
    closing = f"In the end {name} has {have} {thing}."
    return Problem("story", tuple(key), " ".join([*told, question]), (*numbered(steps), closing), str(have))


def shop(rng: random.Random) -> Problem:
    """Two kinds of things are bought; how much change comes back."""
    (name, who), (first, second) = rng.choice(PEOPLE), rng.sample(OBJECTS, 2)
    n1, p1, n2, p2 = rng.randint(2, 6), rng.randint(2, 9), rng.randint(2, 6), rng.randint(2, 9)
    total = n1 * p1 + n2 * p2
    paid = rng.choice([bill for bill in (50, 80, 100, 120) if bill > total])
    prompt = (
        f"{name} buys {n1} {first} for {p1} dollars each and {n2} {second} for {p2} dollars each. "
        f"{capital(who)} pays with {paid} dollars. How many dollars does {who} get back?"
    )
    steps = (
        f"The {first} cost {n1} * {p1} = {n1 * p1} dollars.",
        f"The {second} cost {n2} * {p2} = {n2 * p2} dollars.",
        f"Together that is {n1 * p1} + {n2 * p2} = {total} dollars.",
        f"{name} pays {paid} dollars, so {who} gets back {paid} - {total} = {paid - total} dollars.",
    )
    return Problem("shop", (n1, p1, n2, p2, paid), prompt, numbered(steps), str(paid - total))


def trip(rng: random.Random) -> Problem:
    """Two or three legs at constant speed."""
    vehicle = rng.choice(("car", "train", "bus", "boat", "truck"))
    legs = [(rng.randint(2, 9) * 10, rng.randint(2, 6)) for _ in range(rng.randint(2, 3))]
    parts = [f"{hours} hours at {speed} km per hour" for speed, hours in legs]
    prompt = f"A {vehicle} travels {', then '.join(parts)}. How many km does the {vehicle} travel in total?"
    steps, total = [], 0
    for speed, hours in legs:
        steps.append(f"In {hours} hours at {speed} km per hour the {vehicle} travels {hours} * {speed} = "
                     f"{hours * speed} km.")
    distances = [speed * hours for speed, hours in legs]
    total = sum(distances)
    steps.append(f"The total is {' + '.join(map(str, distances))} = {total} km.")
    return Problem("trip", tuple(legs), prompt, numbered(steps), str(total))


def seats(rng: random.Random) -> Problem:
    """Rows of seats, some of them taken."""
    place = rng.choice(("theater", "bus", "hall", "cinema", "church"))
    rows, each = rng.randint(3, 9), rng.randint(4, 12)
    total = rows * each
    taken = rng.randint(3, total - 4)
    left = total - taken
    more = rng.randint(2, left - 2)
    prompt = (
        f"A {place} has {rows} rows with {each} seats in each row. {taken} people sit down. "
        f"Then {more} more people come. How many seats are still free?"
    )
    steps = (
        f"The {place} has {rows} * {each} = {total} seats.",
        f"After {taken} people sit down, {total} - {taken} = {left} seats are free.",
        f"After {more} more people come, {left} - {more} = {left - more} seats are free.",
    )
    return Problem("seats", (rows, each, taken, more), prompt, numbered(steps), str(left - more))


def savings(rng: random.Random) -> Problem:
    """Money saved every week, then something is bought."""
    (name, who), item = rng.choice(PEOPLE), rng.choice(("bike", "game", "coat", "lamp", "phone", "tent"))
    start, weekly, weeks = rng.randint(5, 60), rng.randint(2, 12), rng.randint(2, 9)
    saved = weekly * weeks
    total = start + saved
    price = rng.randint(4, total - 1)
    prompt = (
        f"{name} has {start} dollars and saves {weekly} dollars every week. After {weeks} weeks {who} buys a {item} "
        f"for {price} dollars. How many dollars does {name} have left?"
    )
    steps = (
        f"In {weeks} weeks {name} saves {weeks} * {weekly} = {saved} dollars.",
        f"With the {start} dollars from the start {who} has {start} + {saved} = {total} dollars.",
        f"The {item} costs {price} dollars, so {who} has {total} - {price} = {total - price} dollars left.",
    )
    return Problem("savings", (start, weekly, weeks, price), prompt, numbered(steps), str(total - price))


def ages(rng: random.Random) -> Problem:
    """Three people's ages, each told from another's."""
    (one, _), (two, _), (three, _) = rng.sample(PEOPLE, 3)
    age, gap, factor = rng.randint(3, 40), rng.randint(2, 25), rng.randint(2, 3)
    older = rng.random() < 0.6 or gap >= age
    second = age + gap if older else age - gap
    third = second * factor
    sign, word = ("+", "older") if older else ("-", "younger")
    prompt = (
        f"{one} is {age} years old. {two} is {gap} years {word} than {one}. {three} is {TIMES[factor]} as old as "
        f"{two}. How old are the three of them together?"
    )
    steps = (
        f"{two} is {gap} years {word} than {one}, so {two} is {age} {sign} {gap} = {second} years old.",
        f"{three} is {TIMES[factor]} as old as {two}, so {three} is {second} * {factor} = {third} years old.",
        f"Together they are {age} + {second} + {third} = {age + second + third} years old.",
    )
    return Problem("ages", (age, gap, older, factor), prompt, numbered(steps), str(age + second + third))


def reading(rng: random.Random) -> Problem:
    """Pages read over two spans of days; how many are left."""
    name, who = rng.choice(PEOPLE)
    a, days_a, b, days_b = rng.randint(3, 20), rng.randint(2, 6), rng.randint(3, 20), rng.randint(2, 6)
    read = a * days_a + b * days_b
    pages = read + rng.randint(5, 90)
    prompt = (
        f"A book has {pages} pages. {name} reads {a} pages a day for {days_a} days and then {b} pages a day for "
        f"{days_b} days. How many pages are left?"
    )
    steps = (
        f"In the first {days_a} days {name} reads {days_a} * {a} = {days_a * a} pages.",
        f"In the next {days_b} days {who} reads {days_b} * {b} = {days_b * b} pages.",
        f"That is {days_a * a} + {days_b * b} = {read} pages.",
        f"The book has {pages} pages, so {pages} - {read} = {pages - read} pages are left.",
    )
    return Problem("reading", (pages, a, days_a, b, days_b), prompt, numbered(steps), str(pages - read))


def fence(rng: random.Random) -> Problem:
    """The cost of a fence around a rectangle."""
    place = rng.choice(("garden", "field", "yard", "park"))
    length, width, price = rng.randint(4, 40), rng.randint(3, 30), rng.randint(2, 6)
    half = length + width
    prompt = (
        f"A {place} is {length} meters long and {width} meters wide. A fence around the {place} costs {price} dollars "
        "per meter. How many dollars does the whole fence cost?"
    )
    steps = (
        f"One long side and one short side are {length} + {width} = {half} meters.",
        f"The whole way around the {place} is 2 * {half} = {2 * half} meters.",
        f"The fence costs {2 * half} * {price} = {2 * half * price} dollars.",
    )
    return Problem("fence", (length, width, price), prompt, numbered(steps), str(2 * half * price))


def share(rng: random.Random) -> Problem:
    """Things are put together and shared equally."""
    (one, _), (two, _) = rng.sample(PEOPLE, 2)
    thing, box = rng.choice(OBJECTS), rng.choice(CONTAINERS)
    groups, each = rng.randint(2, 9), rng.randint(4, 12)
    total = groups * each
    first = rng.randint(2, total - 2)
    eaten = rng.randint(2, each - 2)
    prompt = (
        f"{one} has {first} {thing} and {two} has {total - first} {thing}. They put all of them equally into {groups} "
        f"{box}. Then {eaten} {thing} are taken from one of the {box}. How many {thing} are left there?"
    )
    steps = (
        f"Together they have {first} + {total - first} = {total} {thing}.",
        f"Shared equally, each of the {groups} {box} holds {total} / {groups} = {each} {thing}.",
        f"After {eaten} are taken, {each} - {eaten} = {each - eaten} {thing} are left there.",
    )
    return Problem("share", (first, total, groups, eaten), prompt, numbered(steps), str(each - eaten))


def compare(rng: random.Random) -> Problem:
    """Three people's counts, told by comparison."""
    (one, _), (two, _), (three, _) = rng.sample(PEOPLE, 3)
    thing = rng.choice(OBJECTS)
    count, factor = rng.randint(4, 40), rng.randint(2, 4)
    second = count * factor
    gap = rng.randint(2, min(40, second - 1))
    fewer = rng.random() < 0.5
    third = second - gap if fewer else second + gap
    word, sign = ("fewer", "-") if fewer else ("more", "+")
    prompt = (
        f"{one} has {count} {thing}. {two} has {TIMES[factor]} as many {thing} as {one}. {three} has {gap} {word} "
        f"{thing} than {two}. How many {thing} does {three} have, and how many do {one} and {three} have together? "
        "Give the last number as the answer."
    )
    steps = (
        f"{two} has {TIMES[factor]} as many as {one}, which is {count} * {factor} = {second} {thing}.",
        f"{three} has {gap} {word} than {two}, which is {second} {sign} {gap} = {third} {thing}.",
        f"{one} and {three} together have {count} + {third} = {count + third} {thing}.",
    )
    return Problem("compare", (count, factor, gap, fewer), prompt, numbered(steps), str(count + third))


GENERATORS: dict[str, tuple[Generator, int]] = {
    "story": (story, 6), "shop": (shop, 3), "trip": (trip, 2), "seats": (seats, 2), "savings": (savings, 2),
    "ages": (ages, 2), "reading": (reading, 3), "fence": (fence, 2), "share": (share, 2), "compare": (compare, 2),
}
