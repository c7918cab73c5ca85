"""Documents of the tasks in this folder, made from a fixed seed: nothing is downloaded and nobody's text is copied.

    python_brackets    total = f(row, [3, {key: x        })]}    }])    ]})    }))
    last_word          row = 3 ; key = True ; row is 3
    which_name         row = 3 ; key = True ; row|key is 3

The wrong ways to close brackets are as long as the right one and use brackets only, so that neither length nor plain
frequency decides.
"""

import itertools
import random
from typing import Any

import datasets

NUM_DOCUMENTS = 200
NUM_EXAMPLES = 40  # documents of the split that few-shot examples are drawn from
SEED = 20261121
CLOSING = {"(": ")", "[": "]", "{": "}"}
TARGETS = ("x", "total", "result", "rows", "value", "config", "names", "out")
FUNCTIONS = ("f", "len", "list", "sorted", "print", "sum", "make", "parse")
ITEMS = ("a", "b", "i", "row", "key", "item", "0", "1", "3", "42", "None", "True")


Documents = list[dict[str, Any]]


def load(**metadata: Any) -> dict[str, datasets.Dataset]:
    """What lm_eval calls for python_brackets."""
    return _splits(documents())


def load_last_word(**metadata: Any) -> dict[str, datasets.Dataset]:
    """What lm_eval calls for last_word."""
    made = _assignments()
    return _splits([{"text": f"{known} {names[answer]} is {value}"} for known, names, answer, value in made])


def load_which_name(**metadata: Any) -> dict[str, datasets.Dataset]:
    """What lm_eval calls for which_name."""
    return _splits(
        [
            {"contexts": [f"{known} {name}" for name in names], "continuation": f"is {value}", "answer": answer}
            for known, names, answer, value in _assignments()
        ]
    )


def documents() -> Documents:
    """``text`` to continue, four ``choices``, the index of the right one as ``answer``; no text occurs twice."""
    draw = random.Random(SEED)
    made: dict[str, dict[str, Any]] = {}
    while len(made) < NUM_DOCUMENTS + NUM_EXAMPLES:
        brackets = draw.choices("([{", k=draw.randint(2, 4))
        text = f"{draw.choice(TARGETS)} = " + "".join(_opened(bracket, draw) for bracket in brackets)
        text += draw.choice(ITEMS)
        right = "".join(CLOSING[bracket] for bracket in reversed(brackets))
        others = [way for way in map("".join, itertools.product(")]}", repeat=len(right))) if way != right]
        choices = [right, *draw.sample(others, 3)]
        draw.shuffle(choices)
        made[text] = {"text": text, "choices": choices, "answer": choices.index(right)}
    return list(made.values())


def _splits(made: Documents) -> dict[str, datasets.Dataset]:
    parts = {"test": made[:NUM_DOCUMENTS], "train": made[NUM_DOCUMENTS:]}
    return {split: datasets.Dataset.from_list(part) for split, part in parts.items()}


def _assignments() -> list[tuple[str, list[str], int, str]]:
    """Two assignments as text, their names, and which one is asked for with its value; none occurs twice."""
    draw = random.Random(SEED)
    made: dict[tuple[str, int], tuple[str, list[str], int, str]] = {}
    while len(made) < NUM_DOCUMENTS + NUM_EXAMPLES:
        names, values, answer = draw.sample(TARGETS, 2), draw.sample(ITEMS, 2), draw.randrange(2)
        known = " ".join(f"{name} = {value} ;" for name, value in zip(names, values, strict=True))
        made[known, answer] = (known, names, answer, values[answer])
    return list(made.values())


def _opened(bracket: str, draw: random.Random) -> str:
    """``bracket`` and, now and then, a first element that leaves it open."""
    name = draw.choice(FUNCTIONS) if bracket == "(" else ""
    key = f"{draw.choice(ITEMS)}: " if bracket == "{" else ""
    first = f"{draw.choice(ITEMS)}, " if draw.random() < 0.5 else ""
    if first and bracket == "{":
        first = f"{draw.choice(ITEMS)}: {first}"
    return name + bracket + first + key
