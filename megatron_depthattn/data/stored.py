"""A corpus as it is stored, for the tools that look at whole shards: nothing is written but to temporary folders.

`stream.py` reads single samples for a run, and expands shards beside the compressed ones or into a cache.
"""

import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_depthattn.data.shard_files import copy, damage, download, expanded, is_remote, open_plain, read_small_file
from megatron_depthattn.data.shard_index import INDEX_NAME, StoredFile, parse_index, starts_bytes
from megatron_depthattn.data.shard_writer import Samples
from megatron_depthattn.data.stream import AGAIN, MANIFEST_NAME, pack_of, read_manifest

SPLITS = ("train", "val")
TOKENIZER_FILE = "tokenizer/tokenizer.json"


class Documents(NamedTuple):
    """Where the documents of some samples begin."""

    starts: npt.NDArray[np.bool_]
    """[number of samples, N + 1]; also the first token of the padding."""
    padding: npt.NDArray[np.int64]
    """Tokens at the end of each sample, [number of samples]."""

    @property
    def is_text(self) -> npt.NDArray[np.bool_]:
        """The tokens that are no padding, [number of samples, N + 1]."""
        return np.arange(self.starts.shape[1]) < self.starts.shape[1] - self.padding[:, None]


class StoredSplit:
    """One split: its index, and its shards, read whole and checked.

    Raises:
        ValueError: there is no such split, or its index is damaged.
    """

    def __init__(self, corpus: "StoredCorpus", name: str) -> None:
        self.corpus, self.name, self.place = corpus, name, f"{corpus.place}/{name}"
        file = f"{self.place}/{INDEX_NAME}"
        try:
            content = read_small_file(file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{self.place} has no {INDEX_NAME}: {AGAIN}") from error
        self.index = parse_index(content, file)
        self.entries: list[dict[str, Any]] = json.loads(content)["shards"]
        """As in the file."""
        self.ends: npt.NDArray[np.int64] = np.cumsum([shard.samples for shard in self.index.shards], dtype=np.int64)
        self.num_samples, self.sequence_length = int(self.ends[-1]), self.index.tokens_per_sample - 1
        self.counts: Mapping[str, Any] = corpus.manifest.get("splits", {}).get(name, {})
        """Of the manifest."""
        self._ends_with_eos: dict[int, bool] = {}

    @property
    def is_packed(self) -> bool:
        """Whether samples are filled with whole documents; otherwise each shares its first token with the last one's
        end."""
        manifest = self.corpus.manifest
        return self.index.stores_documents and (not manifest or pack_of(manifest) == "best-fit")

    @property
    def breaks(self) -> npt.NDArray[np.int64]:
        """The samples that do not continue the one before them, but for the first."""
        return np.array(self.counts.get("breaks", []), np.int64)

    def first_sample(self, shard: int) -> int:
        return int(self.ends[shard]) - self.index.shards[shard].samples

    def stored_file(self, shard: int) -> StoredFile:
        """The file that holds a shard: the compressed one, unless only its expanded form is there."""
        entry = self.index.shards[shard]
        is_there = entry.packed and (is_remote(self.place) or os.path.lexists(f"{self.place}/{entry.packed.name}"))
        return entry.packed if entry.packed and is_there else entry.raw

    def read(self, shard: int) -> Samples:
        """The samples of a shard; of format 3 without starts and padding.

        Raises:
            ValueError: the shard is damaged or missing; names the file.
        """
        entry, stored = self.index.shards[shard], self.stored_file(shard)
        place, content = f"{self.place}/{stored.name}", io.BytesIO()
        with on_this_machine(place) as file:
            if stored is entry.raw:
                wrong = damage(file, entry.raw, content, place)
            else:
                wrong = damage(file, stored, name=place)
                if wrong is None:
                    with open_plain(file, place) as stream:
                        wrong = copy(expanded(stream, stored.name), entry.raw, content)
                    wrong = wrong and f"expands to {entry.raw.name}, which {wrong}"
        if wrong:
            raise ValueError(f"{place} {wrong}: {AGAIN}")
        tokens, bits = self.index.tokens_per_sample, starts_bytes(self.index.tokens_per_sample)
        columns: list[tuple[Any, ...]] = [("padding", "<u4"), ("starts", "u1", (bits,))]
        columns = [*(columns if self.index.stores_documents else []), ("tokens", self.index.dtype, (tokens,))]
        kind, raw = np.dtype(columns), content.getbuffer()
        offsets = np.frombuffer(raw, "<u4", entry.samples + 1, 4).astype(np.int64)
        header = int(np.frombuffer(raw, "<u4", 1)[0]), int(offsets[-1]), set(np.diff(offsets).tolist())
        if header != (entry.samples, len(raw), {kind.itemsize}):
            raise ValueError(
                f"{place} is not {entry.samples} samples of {kind.itemsize} bytes one after the other: {AGAIN}"
            )
        rows = np.frombuffer(raw, kind, entry.samples, int(offsets[0]))
        # At odd addresses numpy 2 crashes where it compares them with a number beyond their type, such as 65536.
        aligned = rows["tokens"].copy()
        if self.index.stores_documents:
            return Samples(rows["padding"], rows["starts"], aligned)
        return Samples(np.zeros(entry.samples, np.uint32), np.zeros((entry.samples, 0), np.uint8), aligned)

    def documents(self, shard: int, samples: Samples) -> Documents:
        """Where documents begin in the samples of a shard, as `read` returned them.

        Of format 3 that is after each EOS, and at the first sample and at breaks.

        Raises:
            ValueError: starts and padding do not fit together, or nothing says where documents end.
        """
        tokens, padding = samples.tokens, samples.padding.astype(np.int64)
        if self.index.stores_documents:
            starts = np.unpackbits(samples.starts, axis=1, count=tokens.shape[1]).astype(bool)
            found = Documents(starts, padding)
            first = tokens.shape[1] - padding
            inside = np.flatnonzero((padding > 0) & (first > 0))
            after = starts & ~found.is_text
            wrong = (first <= 0) | (after.sum(1) != (padding > 0))
            wrong[inside] |= ~starts[inside, first[inside]]
            if wrong.any():
                file, number = self.stored_file(shard).name, int(np.argmax(wrong))
                raise ValueError(
                    f"{self.place}/{file}: in its sample {number} the padding of {padding[number]} tokens and the "
                    f"starts of documents do not fit together: {AGAIN}"
                )
            return found
        is_end = tokens == self.corpus.eos
        starts, first = np.empty(tokens.shape, bool), self.first_sample(shard)
        starts[:, 1:], starts[1:, 0] = is_end[:, :-1], is_end[:-1, -2]
        self._ends_with_eos[shard] = bool(is_end[-1, -2])
        if shard and shard - 1 not in self._ends_with_eos:
            self._ends_with_eos[shard - 1] = bool(self.read(shard - 1).tokens[-1, -2] == self.corpus.eos)
        starts[0, 0] = shard == 0 or self._ends_with_eos[shard - 1]
        breaks = self.breaks - first
        starts[breaks[(breaks >= 0) & (breaks < len(starts))], 0] = True
        return Documents(starts, padding)


def measure(split: StoredSplit, samples: Samples, found: Documents | None) -> Counter[str]:
    """What some samples add to the counts of their split; without `found` what can be said then.

    Where samples share tokens, a document is counted where its first token is not the last one of a sample.
    """
    num, width = samples.tokens.shape
    counts = Counter(samples=num, padding_tokens=int(samples.padding.astype(np.int64).sum()))
    if found:
        begun = found.starts & found.is_text
        counts["documents"] = int(begun[:, : None if split.is_packed else -1].sum())
        counts["predicted_tokens"] = int((width - 1 - np.minimum(found.padding, width - 1)).sum())
        counts["predicted_within_documents"] = counts["predicted_tokens"] - int(begun[:, 1:].sum())
    return counts


class StoredCorpus:
    """A prepared corpus: a local folder, also as file://, or a URL.

    Raises:
        ValueError: its manifest is damaged.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place).removeprefix("file://").rstrip("/")
        self.is_remote = is_remote(self.place)
        if not self.is_remote and not Path(self.place).is_dir():
            raise ValueError(f"{self.place} is no folder: give a corpus of depthattn prepare")
        self.has_manifest = (manifest := read_manifest(self.place)) is not None
        self.manifest: dict[str, Any] = manifest or {}
        there = (
            () if self.is_remote else (file.parent.name for file in sorted(Path(self.place).glob(f"*/{INDEX_NAME}")))
        )
        names = dict.fromkeys([*self.manifest.get("splits", {}), *there]) or dict.fromkeys(SPLITS[: self.is_remote])
        self.split_names = [*names]
        """By the manifest and the folders."""
        if not names:
            raise ValueError(f"{self.place} holds no corpus: give a folder of depthattn prepare, with train/ in it")

    @property
    def eos(self) -> int:
        """The EOS token's id.

        Raises:
            ValueError: no manifest names it.
        """
        if "eos_token_id" not in self.manifest:
            raise ValueError(
                f"{self.place} does not say where its documents end: it has no {MANIFEST_NAME} with eos_token_id; "
                "prepare it with depthattn prepare"
            )
        return int(self.manifest["eos_token_id"])

    def split(self, name: str) -> StoredSplit:
        if name not in self.split_names:
            raise ValueError(f"{self.place} has no split {name!r}: it has {', '.join(self.split_names)}")
        return StoredSplit(self, name)

    def splits(self) -> list[StoredSplit]:
        return [StoredSplit(self, name) for name in self.split_names]

    def small_file(self, name: str) -> bytes | None:
        """The content of a file beside the manifest, or None where it cannot be had."""
        try:
            return read_small_file(f"{self.place}/{name}")
        except (OSError, ValueError):
            return None


@contextmanager
def on_this_machine(place: str) -> Iterator[Path]:
    """A file of a corpus; a remote one is downloaded, and removed afterwards."""
    if not is_remote(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "content")
        download(place, file)
        yield file
