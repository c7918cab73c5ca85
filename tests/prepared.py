"""What the tests of corpus preparation share: documents, files that hold them, their tokens by the bare library."""

import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
from streaming.base.compression import decompress
from tokenizers import Tokenizer

from megatron_depthattn.data.documents import is_validation
from megatron_depthattn.data.prepare import PrepareSettings
from megatron_depthattn.data.tokenizer import train_bpe

LENGTH = 16
FRACTION = 0.25
WORDS = ["alpha", "beta", "gamma", "épsilon", "zeta", "火山", "λ", "kappa\tmu", "nu\n", "{xi}", "'s", "  rho"]


def make_documents(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(5, 80)))) + f" {i}" for i in range(number)]


TEXTS = make_documents(120)


def json_lines(texts: Sequence[str], field: str = "text") -> bytes:
    records = [{"id": i, "meta": {"set": "ArXiv"}, field: text} for i, text in enumerate(texts)]
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def halves(texts: Sequence[str], compress: Callable[[bytes], bytes]) -> bytes:
    """Lines in two members or frames, one after the other, not cut at a line."""
    data = json_lines(texts)
    return compress(data[:3333]) + compress(data[3333:])


def table(texts: Sequence[str | None], kind: pyarrow.DataType | None = None) -> pyarrow.Table:
    column, meta = pyarrow.array(texts, kind or pyarrow.string()), [{"set": "ArXiv"}] * len(texts)
    return pyarrow.table({"id": range(len(texts)), "text": column, "meta": meta})


def parquet_bytes(texts: Sequence[str], rows: int = 50, **options: object) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table(texts), sink, row_group_size=rows, **options)
    return sink.getvalue()


def arrow_file_bytes(texts: Sequence[str], rows: int = 50, **options: object) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table(texts), sink, chunksize=rows, **options)
    return sink.getvalue()


def arrow_stream_bytes(texts: Sequence[str], rows: int = 50) -> bytes:
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table(texts).schema) as writer:
        writer.write_table(table(texts), max_chunksize=rows)
    return sink.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_texts(folder: Path, compress: Callable[[bytes], bytes] = bytes, ending: str = "") -> None:
    for i, text in enumerate(TEXTS):
        write(folder / f"{i:03}.txt{ending}", compress(text.encode()))


def save_tokenizer(folder: Path) -> Path:
    """A small BPE, trained once, so that a test does not train its own."""
    train_bpe((text.encode() for text in make_documents(100)), 300).save_pretrained(folder)
    return folder


def make_settings(source: Path, tokenizer: Path | str, output: Path, **changes: object) -> PrepareSettings:
    values = {"sequence_length": LENGTH, "validation_fraction": FRACTION, "workers": 1} | changes
    return PrepareSettings(inputs=(str(source),), tokenizer=str(tokenizer), output=output, **values)


def expected_streams(documents: Sequence[str | bytes], tokenizer: Path) -> dict[str, list[int]]:
    """Each split's tokens by the bare library, one document at a time."""
    bare = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    bare.encode_special_tokens = True
    streams: dict[str, list[int]] = {"train": [], "val": []}
    for document in documents:
        data = document if isinstance(document, bytes) else document.encode()
        split = "val" if is_validation(data, FRACTION) else "train"
        streams[split] += [*bare.encode(data.decode(errors="replace"), add_special_tokens=False).ids, 0]
    return streams


class Stored(NamedTuple):
    tokens: np.ndarray
    """[samples, N + 1]"""
    starts: np.ndarray
    """bool [samples, N + 1]"""
    padding: np.ndarray
    """[samples]"""


def read_samples(split: Path, dtype: str = "uint16") -> Stored:
    """All samples of a split, straight from the files: a count, offsets, a header; samples of padding, bits, tokens."""
    samples = []
    for shard in json.loads((split / "index.json").read_text())["shards"]:
        raw = decompress("zstd", (split / shard["zip_data"]["basename"]).read_bytes())
        count = int(np.frombuffer(raw, np.uint32, 1)[0])
        offsets = np.frombuffer(raw, np.uint32, count + 1, offset=4)
        for a, b in itertools.pairwise(offsets):
            length = next(n for n in itertools.count(1) if 4 + (n + 7) // 8 + n * np.dtype(dtype).itemsize == b - a)
            tokens = np.frombuffer(raw[b - length * np.dtype(dtype).itemsize : b], dtype)
            starts = [raw[a + 4 + t // 8] >> (7 - t % 8) & 1 == 1 for t in range(length)]
            samples.append((tokens, starts, int.from_bytes(raw[a : a + 4], "little")))
    return Stored(*map(np.array, zip(*samples, strict=True)))


def read_shards(split: Path, dtype: str = "uint16") -> np.ndarray:
    """The tokens of all samples of a split, [samples, N + 1]."""
    return read_samples(split, dtype).tokens


def stored_stream(split: Path, dtype: str = "uint16") -> list[int]:
    """The split's tokens but for the dropped tail: the samples joined, shared tokens once."""
    samples = read_shards(split, dtype)
    stream: list[int] = [*samples[:, :-1].ravel().tolist(), int(samples[-1, -1])]
    return stream


def assert_holds(output: Path, documents: Sequence[str | bytes], tokenizer: Path) -> None:
    """The stored tokens are those of the documents, up to a tail that fills no sample."""
    for split, expected in expected_streams(documents, tokenizer).items():
        stored = stored_stream(output / split)
        assert stored == expected[: len(stored)], split
        assert len(expected) - len(stored) < LENGTH
        starts = [0, *(i + 1 for i, token in enumerate(stored[:-1]) if token == 0)]
        is_start = np.isin(np.arange(len(stored)), starts)
        samples = read_samples(output / split)
        assert not samples.padding.any()
        assert np.array_equal(samples.starts, [is_start[i : i + LENGTH + 1] for i in range(0, len(stored) - 1, LENGTH)])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(output).items() if name.startswith(("train/", "val/"))}
