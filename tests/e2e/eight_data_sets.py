"""Small data sets in the layout of the eight of the suite `paper`, as the Hub has them."""

import random
from pathlib import Path
from typing import Any

import datasets

WORDS = ["alpha", "beta", "gamma", "delta", "water", "iron", "light", "cell", "stone", "river"]


def write_eight(root: Path, questions: int) -> None:
    """The data sets of the suite `paper`, with the columns and splits of the true ones and words drawn at random."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.sample(WORDS, count))

    def arc() -> dict[str, Any]:
        texts, answer = draw.sample(WORDS, 4), draw.randrange(4)
        return {
            "question": f"{words(3)}?",
            "choices": {"text": texts, "label": list("ABCD")},
            "answerKey": "ABCD"[answer],
        }

    def sciq() -> dict[str, Any]:
        names = ("distractor3", "distractor1", "distractor2", "correct_answer")
        return {"question": f"{words(2)}?", **dict(zip(names, draw.sample(WORDS, 4), strict=True)), "support": words(4)}

    def hellaswag() -> dict[str, Any]:
        parts = {"activity_label": words(1), "ctx_a": f"{words(3)}.", "ctx_b": words(1)}
        return {**parts, "endings": [f"{words(2)}." for _ in range(4)], "label": str(draw.randrange(4))}

    def race() -> dict[str, Any]:
        problems = [
            {"question": f"{words(2)}{end}", "answer": draw.choice("ABCD"), "options": draw.sample(WORDS, 4)}
            for end in ("?", "  _  .", "?")
        ]
        return {"article": f"{words(5)}. {words(4)}.", "problems": repr(problems)}

    def piqa() -> dict[str, Any]:
        return {"goal": f"{words(2)}?", "sol1": words(2), "sol2": words(3), "label": draw.randrange(2)}

    def winogrande() -> dict[str, Any]:
        one, two = draw.sample(WORDS, 2)
        return {"sentence": f"{one} {two} _ {words(2)}.", "option1": one, "option2": two, "answer": draw.choice("12")}

    every = ("train", "validation", "test")
    for repository, config, make, splits in (
        ("EleutherAI/lambada_openai", "default", lambda: {"text": words(6)}, ("test",)),
        ("baber/piqa", "default", piqa, every),
        ("allenai/winogrande", "winogrande_xl", winogrande, every),
        ("allenai/sciq", "default", sciq, every),
        ("Rowan/hellaswag", "default", hellaswag, every),
        ("allenai/ai2_arc", "ARC-Easy", arc, every),
        ("allenai/ai2_arc", "ARC-Challenge", arc, every),
        ("EleutherAI/race", "high", race, ("test",)),
    ):
        folder = root / repository
        for split in splits:
            rows = [make() for _ in range(questions)]
            (folder / config).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        card = [
            f"- config_name: {each.name}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {each.name}/{split}-*\n" for split in splits)
            for each in sorted(folder.iterdir())
            if each.is_dir()
        ]
        (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(card)}---\n")
