"""A Hub of data sets on this machine: the part of its protocol that `datasets` asks for, streaming or not.

``HF_ENDPOINT`` names it. A folder ORG/NAME below its root is a data set's repository, at two commits of the same files.
"""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMITS = ("a" * 40, "b" * 40)
GATED = "org/gated"
ADDRESS = re.compile(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+)/?(.*))?$")


class Hub(ThreadingHTTPServer):
    """Serves ``root`` while it is a context; `main` is the commit that its branch is at."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.main, self.address = root, COMMITS[0], f"http://127.0.0.1:{self.server_port}"
        self.drops = 0
        """Requests for data to be dropped without an answer."""
        self.answers: float = float("inf")
        """Requests for data to be answered before each is forbidden."""
        self.ranges: list[str] = []
        """Requests for data since this was last emptied."""
        self.requests = 0
        """Requests of all kinds since this was last set."""
        self.thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for the acknowledgement of its headers
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        hub.requests += 1
        body = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        if (found := ADDRESS.match(url.path)) is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        name, verb, revision, rest = found.groups()
        folder = hub.root / name
        if name == GATED:
            return self.answer(403, X_Error_Code="GatedRepo")
        if not folder.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound")
        commit = hub.main if revision in (None, "main") else revision
        if commit not in COMMITS:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        path = folder / unquote(rest or "")
        if verb == "resolve":
            return self.data(path, commit)

        def entry(path: Path) -> dict[str, Any]:
            kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
            name = path.relative_to(folder).as_posix()
            return kind | {"path": name, "oid": hashlib.sha1(path.name.encode()).hexdigest()}

        if verb == "tree":
            answer: Any = [entry(each) for each in sorted(path.glob("**/*" if "recursive=True" in url.query else "*"))]
        elif verb == "paths-info":
            answer = [entry(folder / given) for given in body["paths"] if (folder / given).exists()]
        else:
            files = [{"rfilename": each.relative_to(folder).as_posix()} for each in folder.rglob("*") if each.is_file()]
            answer = {"id": name, "sha": commit, "siblings": files}
        return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    do_HEAD = do_POST = do_GET

    def data(self, path: Path, commit: str) -> None:
        hub, wanted = self.server, self.headers.get("Range")
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = path.read_bytes()
        headers = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
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
