"""Documents of the task python_brackets: an expression with open brackets and four ways to close it.

    total = f(row, [3, {key: x        })]    }])    ]})    }))

Made from a fixed seed, so nothing is downloaded and nobody's text is copied. The wrong ways are as long as the right
one and use brackets only, so that neither length nor plain frequency decides.
"""

import itertools
import random
from typing import Any

import datasets

NUM_DOCUMENTS = 200
SEED = 20261121
CLOSING = {"(": ")", "[": "]", "{": "}"}
TARGETS = ("x", "total", "result", "rows", "value", "config", "names", "out")
FUNCTIONS = ("f", "len", "list", "sorted", "print", "sum", "make", "parse")
ITEMS = ("a", "b", "i", "row", "key", "item", "0", "1", "3", "42", "None", "True")


def load(**metadata: Any) -> dict[str, datasets.Dataset]:
    """What lm_eval calls: the one split of the task."""
    return {"test": datasets.Dataset.from_list(documents())}


def documents() -> list[dict[str, Any]]:
    """``text`` to continue, four ``choices``, the index of the right one as ``answer``; no text occurs twice."""
    draw = random.Random(SEED)
    made: dict[str, dict[str, Any]] = {}
    while len(made) < NUM_DOCUMENTS:
        brackets = draw.choices("([{", k=draw.randint(2, 4))
        text = f"{draw.choice(TARGETS)} = " + "".join(_opened(bracket, draw) for bracket in brackets)
        text += draw.choice(ITEMS)
        right = "".join(CLOSING[bracket] for bracket in reversed(brackets))
        others = [way for way in map("".join, itertools.product(")]}", repeat=len(right))) if way != right]
        choices = [right, *draw.sample(others, 3)]
        draw.shuffle(choices)
        made[text] = {"text": text, "choices": choices, "answer": choices.index(right)}
    return list(made.values())


def _opened(bracket: str, draw: random.Random) -> str:
    """``bracket`` and, now and then, a first element that leaves it open."""
    name = draw.choice(FUNCTIONS) if bracket == "(" else ""
    key = f"{draw.choice(ITEMS)}: " if bracket == "{" else ""
    first = f"{draw.choice(ITEMS)}, " if draw.random() < 0.5 else ""
    if first and bracket == "{":
        first = f"{draw.choice(ITEMS)}: {first}"
    return name + bracket + first + key
