"""Prepare from a Hub on this machine, step by step, and print what became of each as JSON.

Arguments: root of the Hub, tokenizer, folder for outputs. It is a process of its own, for the Hub's libraries read
their endpoint once.
"""

import json
import os
import sys
from pathlib import Path

from tests.e2e.hub import COMMITS, GATED, Hub

NAME = "org/pile"


def main() -> None:
    root, tokenizer, output = sys.argv[1:]
    with Hub(Path(root)) as hub:
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": f"{output}/cache", "no_proxy": "127.0.0.1"}
        import datasets
        import huggingface_hub.constants
        import huggingface_hub.utils

        from megatron_depthattn.data import readers, shard_writer
        from megatron_depthattn.data.prepare import PrepareProgress, prepare_corpus
        from tests.prepared import make_settings

        huggingface_hub.utils.http_backoff.__kwdefaults__["base_wait_time"] = 0.01  # seconds, before it asks again
        readers.UNIT_BYTES, shard_writer.SHARD_BYTES = 2000, 20_000
        results: dict[str, object] = {}

        def step(key: str, folder: str, name: str = NAME, **changes: object) -> None:
            messages: list[str] = []

            def report(progress: PrepareProgress) -> None:
                messages.extend([progress.message] if progress.message else [])

            hub.ranges, hub.requests = [], 0
            settings = make_settings(Path(f"hf:{name}"), tokenizer, Path(output, folder), **changes)
            try:
                done = prepare_corpus(settings, report)
                outcome: object = {"already": done.already_prepared, "manifest": done.manifest}
            except (ValueError, OSError) as error:
                outcome = f"{type(error).__name__}: {error}"
            results[key] = {"outcome": outcome, "messages": messages, "ranges": hub.ranges, "requests": hub.requests}

        hub.drops = 2
        step("dropped twice", "whole")
        hub.answers = len(results["dropped twice"]["ranges"]) // 2  # type: ignore[index]
        step("forbidden half-way", "stopped")
        hub.answers, hub.main = float("inf"), COMMITS[1]
        step("moved on", "stopped")
        step("pinned", "stopped", revision=COMMITS[0])
        step("again", "whole", revision=COMMITS[0])
        step("gated", "x", GATED)
        step("unknown", "x", "org/nothing")
        step("no such revision", "x", revision="v9")
        step("a part", "part", max_tokens=1600)
        step("online, a folder", "folder", f"{root}/{NAME}")
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        step("offline, a folder", "folder2", f"{root}/{NAME}")
        step("offline", "x")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
