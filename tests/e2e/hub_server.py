"""A server that speaks the part of the Hub's protocol that streaming takes, and a program that prepares from it.

Arguments of the program: folder of the data set, tokenizer, folder for outputs. It prints what became of each step as
JSON. It is a process of its own, for the Hub's libraries read their endpoint once.
"""

import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "org/pile"


class Hub(ThreadingHTTPServer):
    """`NAME` at two commits that hold the same files; `main` is the first until `main` is set to the second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.commits = folder, ("a" * 40, "b" * 40)
        self.main = self.commits[0]
        self.drops = 0
        """Requests for data to be dropped without an answer."""
        self.answers: float = float("inf")
        """Requests for data to be answered before each is forbidden."""
        self.ranges: list[str] = []
        """Requests for data since the step began."""
        self.requests = 0
        """Requests of all kinds since then."""
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entry(self, path: Path) -> dict[str, object]:
        oid = hashlib.sha1(path.name.encode()).hexdigest()
        kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
        return kind | {"path": path.relative_to(self.server.folder).as_posix(), "oid": oid}

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        hub.requests += 1
        body = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        found = re.match(
            r"/(?:api/)?datasets/(org/\w+)(?:/(revision|tree|paths-info|resolve)/([^/]+)/?(.*))?$", url.path
        )
        if found is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        name, verb, revision, rest = found.groups()
        if name == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if name != NAME:
            return self.answer(401, X_Error_Code="RepoNotFound")
        commit = hub.main if revision in (None, "main") else revision
        if commit not in hub.commits:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        path = hub.folder / unquote(rest or "")
        if verb == "resolve":
            return self.data(path, commit)
        if verb == "tree":
            paths = sorted(path.rglob("*") if "recursive=True" in url.query else path.glob("*"))
            answer: object = [self.entry(path) for path in paths]
        elif verb == "paths-info":
            paths = [hub.folder / given for given in body["paths"]]
            answer = [self.entry(path) for path in paths if path.exists()]
        else:
            answer = {
                "id": NAME,
                "sha": commit,
                "siblings": [],
                "tags": [],
                "private": False,
                "downloads": 0,
                "likes": 0,
            }
        return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    do_HEAD = do_POST = do_GET

    def data(self, path: Path, commit: str) -> None:
        hub, wanted = self.server, self.headers.get("Range")
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content, headers = path.read_bytes(), {"X_Repo_Commit": commit, "ETag": f'"{path.name}"'}
        if wanted is None:
            return self.answer(200, content, **headers)
        hub.ranges.append(f"{path.name} {wanted}")
        if hub.drops > 0:
            hub.drops -= 1
            self.close_connection = True
            return None
        if len(hub.ranges) > hub.answers:
            return self.answer(403, X_Error_Message="the token was withdrawn")
        first, last = (int(number) for number in re.findall(r"\d+", wanted))
        part = content[first : last + 1]
        headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return self.answer(206, part, **headers)


def main() -> None:
    source, tokenizer, output = sys.argv[1:]
    hub = Hub(Path(source))
    os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": f"{output}/cache"}
    os.environ |= {"no_proxy": "127.0.0.1"}
    from megatron_depthattn.data import readers, shard_writer
    from megatron_depthattn.data.prepare import PrepareProgress, prepare_corpus
    from tests.prepared import make_settings

    readers.UNIT_BYTES, shard_writer.SHARD_BYTES = 2000, 20_000
    results: dict[str, object] = {}

    def step(key: str, folder: str, name: str = NAME, **changes: object) -> None:
        messages: list[str] = []

        def report(progress: PrepareProgress) -> None:
            messages.extend([progress.message] if progress.message else [])

        hub.ranges, hub.requests = [], 0
        try:
            done = prepare_corpus(make_settings(Path(f"hf:{name}"), tokenizer, Path(output, folder), **changes), report)
            outcome: object = {"already": done.already_prepared, "manifest": done.manifest}
        except (ValueError, OSError) as error:
            outcome = f"{type(error).__name__}: {error}"
        results[key] = {"outcome": outcome, "messages": messages, "ranges": hub.ranges, "requests": hub.requests}

    hub.drops = 2
    step("dropped twice", "whole")
    hub.answers = len(results["dropped twice"]["ranges"]) // 2  # type: ignore[index]
    step("forbidden half-way", "stopped")
    hub.answers, hub.main = float("inf"), hub.commits[1]
    step("moved on", "stopped")
    step("pinned", "stopped", revision=hub.commits[0])
    step("again", "whole", revision=hub.commits[0])
    step("gated", "x", "org/gated")
    step("unknown", "x", "org/nothing")
    step("no such revision", "x", revision="v9")
    step("a part", "part", max_tokens=1600)
    step("online, a folder", "folder", source)
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    step("offline, a folder", "folder2", source)
    step("offline", "x")
    hub.shutdown()
    hub.server_close()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
