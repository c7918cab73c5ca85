"""Bytes of each token: they add up to the text, or there is no table."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_depthattn.data.token_bytes import token_byte_counts
from megatron_depthattn.data.tokenizer import Encoder, train_bpe

TEXT = "déf f(x):\n\treturn  'naïve 火山 👩🏽‍🚀'  # <|endoftext|>\r\n" + "    spaces    and   more\n" * 3
EVERY_BYTE = "".join(map(chr, [*range(0x250), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640)]))


def bpe() -> PreTrainedTokenizerFast:
    return train_bpe(iter([TEXT.encode() * 5]), 300)


def total(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    counts = token_byte_counts(tokenizer)
    assert counts is not None
    ids = Encoder(tokenizer).tokens(text)
    return int(counts[ids.astype("int64")].sum())


@pytest.mark.parametrize("text", [TEXT, EVERY_BYTE, "<|endoftext|>", ""])
def test_bytes_of_the_tokens_add_up_to_the_text(text):
    assert total(bpe(), text) == len(text.encode())


def test_special_tokens_are_no_text():
    counts = token_byte_counts(bpe())
    assert counts.shape == (300,) and counts[:2].tolist() == [0, 0] and counts[2:].min() == 1


def test_added_words_are_text():
    """As GPT-NeoX's runs of spaces: added, but not special."""
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("éé", normalized=False)])
    assert len(tokenizer) == 302
    assert 300 in Encoder(tokenizer).tokens(TEXT)
    assert total(tokenizer, TEXT + "éé") == len((TEXT + "éé").encode())


def test_an_nfc_normaliser_counts_the_normalised_text():
    tokenizer = bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert total(tokenizer, TEXT) == len(TEXT.encode())
    assert total(tokenizer, "e\u0301") == len("é".encode())


def prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def dropped_spaces(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), tokenizer.pre_tokenizer])


def removed_pieces(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), tokenizer.pre_tokenizer])


def folded_case(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


def no_byte_decoder(tokenizer):
    tokenizer.decoder = decoders.Metaspace()


def greedy_word(tokenizer):
    tokenizer.add_tokens([AddedToken("word", lstrip=True)])


@pytest.mark.parametrize(
    "spoil", [prefix_space, dropped_spaces, removed_pieces, folded_case, no_byte_decoder, greedy_word]
)
def test_no_table_where_a_token_alone_does_not_decide(spoil):
    tokenizer = bpe()
    assert token_byte_counts(tokenizer) is not None
    spoil(tokenizer.backend_tokenizer)
    assert token_byte_counts(tokenizer) is None


def test_no_table_without_every_byte():
    backend = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert token_byte_counts(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")) is None
