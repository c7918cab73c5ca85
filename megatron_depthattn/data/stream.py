"""A prepared corpus as a data set of token sequences, read by sample number."""

import json
import reprlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from megatron_depthattn.data.shard_index import count
from megatron_depthattn.data.shard_reader import Shards, is_remote, logger, read_small_file

MANIFEST_NAME = "manifest.json"


def _read_manifest(path: str) -> dict[str, Any] | None:
    """The corpus's manifest, or None where there is none (MDS shards from elsewhere)."""
    file = f"{path.rstrip('/')}/{MANIFEST_NAME}"
    try:
        content = read_small_file(file)
    except FileNotFoundError:
        return None
    except ValueError as error:  # stores do not agree on how they say that there is none
        if not is_remote(path):
            raise
        logger.warning("note: vocabulary and tokenizer of %s are not checked: %s", path, error)
        return None
    try:
        manifest = json.loads(content)
        _check_manifest(manifest)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no manifest of a corpus: {error}; copy or prepare the corpus again") from error
    return cast(dict[str, Any], manifest)


def _check_manifest(manifest: Any) -> None:
    """Check the type of whatever is used of a manifest; all of it may be absent."""
    for key in manifest.keys() & {"vocab_size", "eos_token_id"}:
        count(manifest, key)
    if manifest.keys() >= {"vocab_size", "eos_token_id"} and manifest["eos_token_id"] >= manifest["vocab_size"]:
        raise ValueError(f"its eos_token_id is {manifest['eos_token_id']}, and its vocab_size {manifest['vocab_size']}")
    digest = manifest.get("tokenizer_sha256", "0")
    if not isinstance(digest, str) or not digest.isalnum():  # it is printed
        raise ValueError(f"tokenizer_sha256 is {reprlib.repr(digest)}, not a hash")
    for counts in manifest.get("splits", {}).values():
        for key in counts.keys() & {"bytes", "tokens"}:
            count(counts, key)


class TokenDataset(Dataset[torch.Tensor]):
    """One split of a prepared corpus, read by sample number.

    Args:
        path: the folder written by `tools/prepare_data.py`, or a remote URL of its copy.
        split: "train" or "val".
        sequence_length: what the model will be trained with; None takes what the corpus has.
        cache: folder for downloaded and expanded shards. Needed for a URL; with a local path it holds the expanded
            shards, for a corpus in a read-only folder. Nothing is ever evicted.

    Raises:
        ValueError: no such split, a shard missing, another sequence length, or a URL without a cache.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        sequence_length: int | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.path = str(path)
        if is_remote(self.path) and cache is None:
            raise ValueError(
                f"data.path {self.path} is remote and data.cache is not set: set data.cache to a local folder"
            )
        self._shards = Shards(self.path, split, None if cache is None else Path(cache))
        index = self._shards.index
        self.digest = index.digest
        """SHA-256 of the split's index, which holds the hash of every shard."""
        self.samples_per_shard: npt.NDArray[np.int64] = self._shards.samples_per_shard
        self.num_samples = len(self._shards)
        self.manifest = _read_manifest(self.path)
        self.sequence_length = index.tokens_per_sample - 1
        if sequence_length is not None and sequence_length != self.sequence_length:
            raise ValueError(
                f"data.sequence_length is {sequence_length}, but {self.path} was prepared with "
                f"{self.sequence_length}: set data.sequence_length={self.sequence_length}, or prepare again "
                f"with --sequence-length {sequence_length}"
            )
        if not self._shards.has_hashes:
            logger.warning("note: %s has no hashes in its index: only the sizes of its shards are checked", self.path)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tokens of one sample: int64 [sequence_length + 1]; expands or downloads its shard on first use.

        Raises:
            ValueError: the shard is damaged or missing; names the file.
        """
        return torch.from_numpy(self._shards[index].astype(np.int64))
