"""How long steps wait for a corpus in a slow object store, with and without ``data.predownload`` and a cache limit.

The store is a server on this machine that speaks as much of S3 as a download needs, with a bandwidth and a delay. The
bandwidths are multiples of what training needs: the bytes of a step's samples over the seconds that a step takes.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.parallel.launch_env import set_variables

CHUNK_BYTES = 1 << 14
SHARD_BYTES = 1 << 17
BUCKET = "s3://bucket/corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="default 2048")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="sequences of a step (default 16)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="read in a run (default 200)")
    parser.add_argument("--step-seconds", type=float, default=0.1, metavar="S", help="of a step (default 0.1)")
    parser.add_argument("--delay", type=float, default=0.05, metavar="S", help="before each answer (default 0.05)")
    parser.add_argument("--share", type=float, default=0.1, metavar="X", help="of the corpus, in a limited cache")
    parser.add_argument("--bandwidths", nargs="+", type=float, default=[0.8, 1.5, 3.0], metavar="X", help="of the need")


def measure(given: argparse.Namespace) -> Result:
    """Seconds that steps waited, beside those that the network itself would have made them wait."""
    from megatron_depthattn.data.cache import counts

    result = Result(
        title=f"{given.steps} steps of {given.batch} x {given.sequence_length} tokens and {given.step_seconds} s, from "
        f"a store that answers after {given.delay} s",
        columns=["bandwidth over need", "data.predownload", "cache", "waited, s", "least by bandwidth, s", "evicted"],
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored, raw = _write_corpus(folder / "served" / "bucket" / "corpus", given)
        need = stored / given.steps / given.step_seconds
        for factor in given.bandwidths:
            least = max(0.0, stored / (factor * need) - given.steps * given.step_seconds)
            for predownload, limit in ((0, None), (given.batch, None), (None, None), (None, int(given.share * raw))):
                cache = folder / "cache"
                waited = _waited(folder / "served", cache, factor * need, predownload, limit, given)
                ahead = "default" if predownload is None else str(predownload)
                room = f"{given.share:g} of the corpus" if limit else "no limit"
                evicted = str(counts(cache).evicted) if limit else ""
                result.rows.append([f"{factor:g}", ahead, room, f"{waited:.2f}", f"{least:.2f}", evicted])
                result.figures[f"{factor:g}, {ahead}, {room}"] = {"waited": waited, "least": least}
                print(f"{factor:g} x need, predownload {ahead}, {room}: {waited:.2f} s", file=sys.stderr, flush=True)
                shutil.rmtree(cache)
    result.notes.append(
        f"The corpus: {stored / 1e6:.1f} MB in the store, {raw / 1e6:.1f} MB in a cache; need: {need / 1e6:.2f} MB/s."
    )
    return result


def _write_corpus(folder: Path, given: argparse.Namespace) -> tuple[int, int]:
    """Random tokens in small shards; returns their bytes in the store and expanded."""
    import numpy as np

    from megatron_depthattn.data import shard_writer
    from megatron_depthattn.data.pack import Packing, SplitWriter
    from megatron_depthattn.data.stream import TokenDataset

    shard_writer.SHARD_BYTES = SHARD_BYTES  # many shards of a small corpus
    writer = SplitWriter(folder / "train", Packing(given.sequence_length), np.zeros(1, np.uint16))
    count = given.steps * given.batch * given.sequence_length + 1
    writer.append((np.random.default_rng(0).zipf(1.2, count) % 50304).astype(np.uint16), np.array([count]))
    writer.finish()
    (folder / "manifest.json").write_text(json.dumps({"vocab_size": 50304}))
    dataset = TokenDataset(folder)
    stored = sum(file.stat().st_size for file in (folder / "train").glob("*.zstd"))
    return stored, sum(dataset.bytes_of(shard)[0] for shard in range(len(dataset.samples_per_shard)))


def _waited(
    served: Path, cache: Path, bandwidth: float, predownload: int | None, limit: int | None, given: argparse.Namespace
) -> float:
    """Seconds that steps waited, but for the first one, which starts the processes."""
    from megatron_depthattn.data import shard_files
    from megatron_depthattn.data.corpus import Corpus
    from megatron_depthattn.data.loader import TokenLoader
    from megatron_depthattn.data.predownload import samples_ahead

    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(str(served), bandwidth, given.delay, theirs), daemon=True)
    server.start()
    try:
        set_variables(
            S3_ENDPOINT_URL=f"http://127.0.0.1:{ours.recv()}",
            **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none"),
            AWS_DEFAULT_REGION="us-east-1",
        )
        shard_files._clients = threading.local()  # of the server before
        corpus = Corpus([BUCKET], [1.0], "train", cache=cache, cache_limit=limit)
        sizes = {"global_batch_size": given.batch, "micro_batch_size": given.batch}
        ahead = samples_ahead(predownload, corpus, given.batch)
        options: dict[str, Any] = {"consumed_samples": 0, "num_workers": 1, "predownload": ahead, **sizes}
        loader = TokenLoader(
            corpus, corpus.sequence(seed=0, shuffle=False), data_parallel_rank=0, data_parallel_size=1, **options
        )
        next(loader)
        started = time.perf_counter()
        for _ in range(given.steps - 1):
            time.sleep(given.step_seconds)
            next(loader)
        waited = time.perf_counter() - started - (given.steps - 1) * given.step_seconds
        loader.close()
        return waited
    finally:
        server.kill()
        server.join()


def serve(folder: str, bandwidth: float, delay: float, port: Connection) -> None:
    """Answer requests for files; all answers share the bandwidth, in bytes a second."""
    lock, free = threading.Lock(), [0.0]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay)
            super().do_GET()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            while chunk := source.read(CHUNK_BYTES):
                with lock:
                    free[0] = max(free[0], time.monotonic()) + len(chunk) / bandwidth
                    until = free[0]
                time.sleep(max(0.0, until - time.monotonic()))
                outputfile.write(chunk)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    port.send(server.server_port)
    server.serve_forever()
