"""A Hub of data sets on this machine, as far as `datasets.load_dataset` asks one, and small data sets for it.

``HF_ENDPOINT`` names it. A folder OWNER/NAME below its root is a data set's repository.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets

COMMIT = "a" * 40
WORDS = ["alpha", "beta", "gamma", "delta", "water", "iron", "light", "cell", "stone", "river"]


@contextmanager
def local_hub(root: Path) -> Iterator[str]:
    """The address of a Hub that serves ``root``."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.removeprefix("/api").partition("?")
            _, _, owner, name, *asked = path.split("/")
            folder, (verb, place) = root / owner / name, (asked[0] if asked else "", "/".join(asked[2:]))
            if verb == "resolve" and (folder / place).is_file():
                body = (folder / place).read_bytes()
                self.reply(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
            elif folder.is_dir() and verb == "tree":
                below = (folder / place).glob("**/*" if "recursive=True" in query else "*")
                self.reply(200, json.dumps([self.entry(path, folder) for path in sorted(below)]).encode())
            elif folder.is_dir() and verb in ("", "revision"):
                files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
                self.reply(200, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": files}).encode())
            else:
                self.reply(404, b"", **{"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def entry(self, path: Path, folder: Path) -> dict[str, Any]:
            kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
            return {"path": str(path.relative_to(folder)), "oid": "0" * 40, **kind}

        def reply(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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
