"""The corpus's tokenizer: trained or loaded, identified by its hash, applied to documents.

transformers is imported where it is needed: the encoding processes need only the `Encoder`, and transformers brings
torch, hundreds of megabytes a process.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
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
    from transformers import PreTrainedTokenizerFast

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
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

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
    """`--tokenizer` as given, plus the digest of the files that decide the tokens; checks `train-bpe:`."""
    if bpe_vocab(given) is not None:
        return given
    path = Path(given)
    folder = path if path.is_dir() else path.parent
    # The tokenizer, and what names its EOS.
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    files = [folder / name for name in names] if path.is_dir() or path.name == names[0] else [path]
    digests = [file_sha256(file) for file in files if file.is_file()]
    return f"{given} (sha256 {hashlib.sha256(' '.join(digests).encode()).hexdigest()})" if digests else given


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Encoder:
    """Encodes texts. No special token or padding is added, and none is read from the text. Can be pickled.

    Attributes:
        vocab_size: the largest id + 1; ids can have gaps in tokenizers with hand-placed added tokens.
        dtype: the smallest of uint16 and uint32 that holds every id.
        end: EOS, [1].
        no_tokens: [0].
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        self.end: npt.NDArray[Any] = np.array([tokenizer.eos_token_id], self.dtype)
        self.no_tokens = self.end[:0]
        # A copy: the settings below must not be saved with the tokenizer.
        self._backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        # "<|endoftext|>" spelt out in a document is text, not its end.
        self._backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._backend.encode_special_tokens = True  # the one setting that the library does not pickle

    def tokens(self, text: str) -> npt.NDArray[Any]:
        """The token ids of a text, [number of tokens]."""
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids = encoding.ids
        return np.fromiter(ids, self.dtype, len(ids))  # a third of np.array's time

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The token ids of each document, with its EOS."""
        return [np.concatenate([self.tokens(text), self.end]) for text in texts]
