"""The corpus's tokenizer: trained or loaded, identified by its hash, applied to documents.

transformers is imported where it is needed: the encoding processes need only the `Encoder`, and transformers brings
torch, hundreds of megabytes a process.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN_BPE = "train-bpe:"
BPE_TRAINING_BYTES = 32 << 20  # of the train split, from its start: the merges hardly change after that
MIN_BPE_VOCAB = 256 + 2  # every byte and the two special tokens
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"


def bpe_vocab(given: str) -> int | None:
    """VOCAB of `train-bpe:VOCAB`, or None for a tokenizer to load.

    Raises:
        ValueError: VOCAB is not an integer of at least `MIN_BPE_VOCAB`.
    """
    if not given.startswith(TRAIN_BPE):
        return None
    vocab = given.removeprefix(TRAIN_BPE)
    if not vocab.isdecimal() or int(vocab) < MIN_BPE_VOCAB:
        raise ValueError(f"--tokenizer {given}: VOCAB must be an integer of at least {MIN_BPE_VOCAB}")
    return int(vocab)


def train_bpe(documents: Iterator[bytes], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of GPT-NeoX: EOS (also BOS) is id 0, padding id 1."""
    from transformers import PreTrainedTokenizerFast

    from megatron_depthattn.hf.tokenizer import MODEL_INPUTS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_input_names=MODEL_INPUTS,
    )


def _training_texts(documents: Iterator[bytes]) -> Iterator[str]:
    left = BPE_TRAINING_BYTES
    for document in documents:
        yield document[:left].decode("utf-8", errors="replace")
        left -= len(document)
        if left <= 0:
            return


def load_tokenizer(given: str) -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer folder or a tokenizer.json.

    Raises:
        ValueError: it does not exist or load, is not a fast tokenizer, or has no end-of-sequence token.
    """
    from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

    tokenizer = load_fast_tokenizer(given)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {given} has no end-of-sequence token: set eos_token in tokenizer_config.json")
    return tokenizer


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Encoder:
    """Encodes texts. No special token or padding is added, and none is read from the text. Can be pickled.

    Attributes:
        vocab_size: the largest id + 1; ids can have gaps in tokenizers with hand-placed added tokens.
        dtype: the smallest of uint16 and uint32 that holds every id.
        end: EOS, [1].
        sha256: of everything that decides the tokens of a text, whatever files it came from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        self.end: npt.NDArray[Any] = np.array([tokenizer.eos_token_id], self.dtype)
        # A copy: the settings below must not be saved with the tokenizer.
        self._backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.sha256 = hashlib.sha256(f"{self.end[0]} {self._backend.to_str()}".encode()).hexdigest()
        # "<|endoftext|>" spelt out in a document is text, not its end.
        self._backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._backend.encode_special_tokens = True  # the one setting that the library does not pickle

    def tokens(self, text: str) -> npt.NDArray[Any]:
        """The token ids of a text, [number of tokens]."""
        ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.fromiter(ids, self.dtype, len(ids))  # a third of np.array's time
