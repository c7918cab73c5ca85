"""Prepare a corpus in processes that are killed at random moments, until one gets to the end.

Arguments: source, tokenizer, output, number of kills. Prints {"killed": number, "continued": how many began in the
middle}. Each attempt is a fork of this process, which has imported everything and started no thread.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # not in the encoding processes, which import this file again
    from megatron_depthattn.data import file_bytes, prepare, readers, shard_writer
    from megatron_depthattn.data.prepare import PrepareProgress, prepare_corpus
    from tests.prepared import make_settings


def attempt(source: str, tokenizer: str, output: Path, reports: int, workers: int) -> None:
    """Preparation with small units and shards, which saves after every unit and reports it with a byte."""
    prepare.SAVE_SECONDS, shard_writer.SHARD_BYTES = 0.0, 20_000
    readers.UNIT_BYTES = file_bytes.BLOCK_BYTES = 5000

    def report(progress: "PrepareProgress") -> None:
        os.write(reports, b"c" if progress.message else b"u")

    prepare_corpus(make_settings(Path(source), tokenizer, output, workers=workers), report)


def main() -> None:
    source, tokenizer, output, num_kills = sys.argv[1:]
    choose = random.Random(0)
    killed = continued = 0
    while True:
        reader, writer = os.pipe()
        program = os.fork()
        if program == 0:
            attempt(source, tokenizer, Path(output), writer, workers=2 - killed % 2)
            os._exit(0)
        os.close(writer)
        seen = b""
        if killed < int(num_kills):
            units = choose.randint(0, 8)
            while seen.count(b"u") < units and (more := os.read(reader, 1)):
                seen += more
            time.sleep(choose.uniform(0, 0.03))
            os.kill(program, signal.SIGKILL)
        while more := os.read(reader, 1 << 12):
            seen += more
        os.close(reader)
        continued += b"c" in seen
        _, status = os.waitpid(program, 0)
        if os.WIFEXITED(status):
            print(json.dumps({"killed": killed, "continued": continued}))
            sys.exit(os.WEXITSTATUS(status))
        killed += 1


if __name__ == "__main__":
    main()
