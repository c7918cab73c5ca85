"""As much of a Weights & Biases server as the client needs to log a run to it, and to resume that run."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


class Server(ThreadingHTTPServer):
    """Keeps what the client streams to it, by file and line."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[int, str]] = defaultdict(dict)
        self.bucket: dict[str, Any] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history, in order."""
        return [json.loads(line) for _, line in sorted(self.files[HISTORY].items())]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What a GraphQL request gets."""
        entity, lines = {"id": "e", "name": "team"}, self.files[HISTORY]
        known = {
            "id": "b",
            "displayName": "",
            "tags": [],
            "notes": "",
            "description": "",
            "historyLineCount": len(lines),
        }
        known |= {"name": variables.get("name"), "sweepName": None, "config": "{}", **self.bucket}
        project = {"id": "p", "name": variables.get("project"), "entity": entity}
        if operation == "UpsertBucket":
            own = {key: variables[key] for key in ("name", "displayName", "config") if variables.get(key)}
            is_new = not self.bucket
            self.bucket |= own
            return {"upsertBucket": {"bucket": known | self.bucket | {"project": project}, "inserted": is_new}}
        if operation == "RunResumeStatus":
            tail = [line for _, line in sorted(lines.items())][-1:]
            summary = self.files["wandb-summary.json"].get(0, "{}")
            known |= {"summaryMetrics": summary, "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]"}
            known |= {"historyTail": json.dumps(tail), "wandbConfig": '{"t": 1}'}
            return {"model": project | {"bucket": known if self.bucket else None}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        viewer = {"id": "v", "entity": "team", "username": "someone", "email": "", "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}}} if operation == "Viewer" else {}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": self.server.answer(request.get("operationName", ""), request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            for name, chunk in json.loads(body).get("files", {}).items():
                self.server.files[name] |= dict(enumerate(chunk["content"], chunk["offset"]))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _serve

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server for as long as it is needed."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
