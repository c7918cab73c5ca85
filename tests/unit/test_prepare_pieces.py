"""A long document is encoded in pieces, with the tokens of the whole."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_depthattn.data.documents import PIECE_BYTES, pieces
from megatron_depthattn.data.prepare import prepare_corpus
from megatron_depthattn.data.tokenizer import Encoder, load_tokenizer
from tests.prepared import WORDS, folder_bytes, make_documents, make_settings, stored_stream

SHORT = " ".join(make_documents(20))


def test_a_long_document_is_cut_after_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_depthattn.data.documents.PIECE_BYTES", 10)
    cases = {
        b"one two\nthree four": b"one two\n",
        b"one\ntwo\n\n\nthree": b"one\n",  # not inside a run of white space, if there is another place
        b"\n\n\n\n\n\n\n\n\n\n\n\nend": b"\n" * 10,
        b"one two three four": b"one two th",
        "ééééééééé".encode(): "ééééé".encode(),
        "xééééééééé".encode(): "xéééé".encode(),
    }
    for document, first in cases.items():
        for block in (1, 3, len(document)):
            parts = list(pieces(document[i : i + block] for i in range(0, len(document), block)))
            assert b"".join(parts) == document
            assert max(map(len, parts)) <= 10
            assert parts[0] == first


def test_a_cut_document_has_the_tokens_of_the_whole(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPT-2 pre-tokenizer, whichever way the lines end up in the pieces; the control cuts elsewhere."""
    monkeypatch.setattr("megatron_depthattn.data.documents.PIECE_BYTES", 1 << 17)
    encoder = Encoder(load_tokenizer(str(tokenizer)))
    rng = np.random.default_rng(1)
    lines = [
        " " * int(rng.integers(0, 3)) + " ".join(rng.choice(WORDS, int(rng.integers(0, 9)))) for _ in range(12_000)
    ]
    text = "\n".join(lines)
    parts = [piece.decode() for piece in pieces([text.encode()])]
    assert len(parts) == -(-len(text.encode()) // (1 << 17)) > 1
    whole = encoder.tokens(text)
    assert np.array_equal(np.concatenate([encoder.tokens(part) for part in parts]), whole)
    middle = text.index("alpha") + 2
    assert not np.array_equal(np.concatenate([encoder.tokens(text[:middle]), encoder.tokens(text[middle:])]), whole)


def test_a_long_document_goes_through_in_pieces(tokenizer: Path, tmp_path: Path) -> None:
    """The same tokens whether the reader cuts it (a text), or an encoding process (one JSON line)."""
    text = "\n".join(make_documents(9_000, seed=2))
    assert len(text.encode()) > PIECE_BYTES
    outputs = []
    for name, data in (("a.txt.gz", gzip.compress(text.encode(), 1)), ("a.jsonl", json.dumps({"text": text}).encode())):
        source = tmp_path / f"in-{name}"
        source.mkdir()
        (source / name).write_bytes(data)
        (source / "b.txt").write_text(SHORT)
        output = tmp_path / f"out-{name}"
        prepare_corpus(make_settings(source, tokenizer, output, workers=2, validation_fraction=0.0))
        outputs.append(folder_bytes(output / "train"))
    assert outputs[0] == outputs[1]
    bare = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    expected = [*bare.encode(text).ids, 0, *bare.encode(SHORT).ids, 0]
    stored = stored_stream(tmp_path / "out-a.jsonl" / "train")
    assert np.array_equal(stored, expected[: len(stored)])
