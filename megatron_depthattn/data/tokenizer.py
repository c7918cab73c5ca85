"""The corpus's tokenizer: trained or loaded, identified by its hash, applied to batches of documents."""

import copy
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TRAIN_BPE = "train-bpe:"
BPE_TRAINING_BYTES = 32 << 20  # of the train split, from its start: the merges hardly change after that
MIN_BPE_VOCAB = 256 + 2  # every byte and the two special tokens
PIECE_CHARACTERS = 8 << 20  # a longer document is encoded in pieces cut after a line end, to bound memory
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # for a bare tokenizer.json, which names none


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
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
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
    path = Path(given)
    if not path.exists():
        raise ValueError(f"--tokenizer {given} does not exist: give a folder, a tokenizer.json, or {TRAIN_BPE}VOCAB")
    if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").is_file():
        path = path.parent  # the folder also names the special tokens
    try:
        if path.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
            tokenizer.eos_token = next((t for t in KNOWN_EOS if t in tokenizer.get_vocab()), None)
    except Exception as error:  # these loaders raise bare Exception, among others
        raise ValueError(f"--tokenizer {given} does not load: {str(error).splitlines()[0]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"--tokenizer {given} has no tokenizer.json: save it as a fast tokenizer first")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--tokenizer {given} has no end-of-sequence token: set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def tokenizer_identity(given: str) -> str:
    """`--tokenizer` as given, plus the digest of its tokenizer.json if it names one; checks `train-bpe:`."""
    if bpe_vocab(given) is not None:
        return given
    path = Path(given)
    path = path / "tokenizer.json" if path.is_dir() else path
    return f"{given} (sha256 {file_sha256(path)})" if path.is_file() else given


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pieces(text: str) -> Iterator[str]:
    """`text` in parts of at most `PIECE_CHARACTERS`, cut after a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


class Encoder:
    """Encodes documents in batches. No special token or padding is added, and none is read from the text.

    Attributes:
        vocab_size: the largest id + 1; ids can have gaps in tokenizers with hand-placed added tokens.
        dtype: the smallest of uint16 and uint32 that holds every id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        # A copy: the settings below must not be saved with the tokenizer.
        self._backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        # "<|endoftext|>" spelt out in a document is text, not its end.
        self._backend.encode_special_tokens = True
        self._end: npt.NDArray[Any] = np.array([tokenizer.eos_token_id], self.dtype)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The token ids of each document, with its EOS."""
        parts = [list(pieces(text)) for text in texts]
        flat = list(itertools.chain.from_iterable(parts))
        encoded = (
            np.array(encoding.ids, self.dtype)
            for encoding in self._backend.encode_batch_fast(flat, add_special_tokens=False)
        )
        return [np.concatenate([*itertools.islice(encoded, len(of)), self._end]) for of in parts]
