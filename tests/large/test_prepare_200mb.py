"""One document of 200 MB, as a text file and as one JSON line: prepared whole, in bounded memory (about 3 minutes)."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from tests.prepared import make_documents, read_shards, save_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENT_BYTES = 200_000_000
# Of the largest process. About 1.0 GB are torch and transformers, in the process that reads and writes; of a JSON line
# several copies are made, there and in the encoding process.
PEAK_BYTES = {"a.txt": 1.4e9, "a.jsonl": 2.2e9}


@pytest.fixture(scope="module")
def document() -> bytes:
    lines = ("\n".join(make_documents(20_000)) + "\n").encode()
    text = b"".join(b"part %d\n%s" % (i, lines) for i in range(DOCUMENT_BYTES // len(lines) + 1))
    return text[:DOCUMENT_BYTES].decode(errors="ignore").encode()


def token_bytes(tokenizer: Path) -> list[bytes]:
    """The bytes of each token of a byte-level BPE; EOS has none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table: the rest is moved past 255
    moved = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}
    assert sorted(byte_of) == alphabet
    vocab = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab()
    table = [b""] * len(vocab)
    for token, i in vocab.items():
        table[i] = b"" if token.startswith("<|") else bytes(byte_of[c] for c in token)
    return table


def peak_bytes(process: psutil.Process) -> float:
    """The largest resident memory of a process so far; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return float(found[1]) * 1024 if found else 0.0


def stored_bytes(split: Path, table: list[bytes]) -> Iterator[bytes]:
    samples = read_shards(split)
    stream = np.append(samples[:, :-1].ravel(), samples[-1, -1])
    for block in np.array_split(stream, 64):
        yield b"".join([table[i] for i in block.tolist()])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PEAK_BYTES)
def test_a_document_of_200_mb(name: str, document: bytes, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    is_json = name.endswith(".jsonl")
    data = json.dumps({"text": document.decode()}, ensure_ascii=False).encode() if is_json else document
    (tmp_path / name).write_bytes(data)
    del data
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--input", str(tmp_path / name)]
    command += ["--tokenizer", str(tokenizer), "--sequence-length", "1024", "--validation-fraction", "0"]
    peak = 0.0
    with subprocess.Popen([*command, "--output", str(tmp_path / "out")]) as process:
        while process.poll() is None:
            tool = psutil.Process(process.pid)
            peak = max([peak, *map(peak_bytes, [tool, *tool.children(recursive=True)])])
            time.sleep(0.2)
    assert process.returncode == 0
    print(f"{name}: peak {peak / 1e9:.2f} GB")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["documents"] == 1
    found = b"".join(stored_bytes(tmp_path / "out" / "train", token_bytes(tokenizer)))
    dropped = len(document) - len(found)
    assert document.startswith(found)
    assert 0 <= dropped < 1025 * 20
    assert peak < PEAK_BYTES[name]
