"""Word problems in arithmetic, generated: a second domain for studies where no dataset can be downloaded.

They are templates filled with numbers, far easier than GSM8K, and say nothing about reasoning; what they have is that
an answer is right or wrong, and that the standard library's docstrings do not teach it.
"""

from __future__ import annotations

import random

from loram_hub.texts import Example

_NAMES = ("Ada", "Ben", "Chloe", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kim", "Leo", "Mia", "Noah")
_THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stickers", "tickets")
_HELD_OUT_THINGS = frozenset({"shells", "tickets"})


def arithmetic_examples(count: int = 4000, held_out: int = 400) -> tuple[list[Example], list[Example]]:
    """Build problems with worked answers; equal arguments give equal problems.

    Args:
        count: training problems.
        held_out: problems about things that no training problem is about.

    Returns:
        Training and held-out problems.
    """
    training = tuple(thing for thing in _THINGS if thing not in _HELD_OUT_THINGS)
    return _problems(count, training, seed=0), _problems(held_out, tuple(sorted(_HELD_OUT_THINGS)), seed=1)


def _problems(count: int, things: tuple[str, ...], *, seed: int) -> list[Example]:
    draw = random.Random(seed)
    found: dict[str, Example] = {}
    while len(found) < count:
        problem = _problem(draw, draw.choice(things))
        found.setdefault(problem.prompt, problem)
    return list(found.values())


def _problem(draw: random.Random, thing: str) -> Example:
    first, second = draw.sample(_NAMES, 2)
    start, each, days = draw.randint(3, 60), draw.randint(2, 9), draw.randint(2, 9)
    kind = draw.randrange(3)
    if kind == 0:
        told = f"{first} has {start} {thing} and gets {each} more every day for {days} days."
        working, result = f"{each} * {days} = {each * days}. {start} + {each * days}", start + each * days
    elif kind == 1:
        have = start + each * days
        told = f"{first} has {have} {thing} and gives {second} {each} of them on each of {days} days."
        working, result = f"{each} * {days} = {each * days}. {have} - {each * days}", start
    else:
        told = f"{first} packs {each * days} {thing} into boxes of {each} and keeps {start} more."
        working, result = f"{each * days} / {each} = {days} boxes. {days} + {start}", days + start
        return Example(
            prompt=f"Question: {told} How many boxes and loose {thing} are that together?\nAnswer:",
            completion=f" {working} = {result}. The answer is {result}.",
        )
    return Example(
        prompt=f"Question: {told} How many {thing} does {first} have then?\nAnswer:",
        completion=f" {working} = {result}. The answer is {result}.",
    )
