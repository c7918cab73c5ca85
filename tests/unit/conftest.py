"""What the tests of corpus preparation share: a tokenizer, and the shards of documents that many layouts hold."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.prepared import save_tokenizer  # imports torch, which other tests here need not

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def plain(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of TEXTS as text files; these are compared with the bare library's tokens."""
    from megatron_depthattn.data.prepare import prepare_corpus
    from tests.prepared import TEXTS, assert_holds, make_settings, shards, write_texts

    folder = tmp_path_factory.mktemp("plain")
    write_texts(folder / "in")
    prepare_corpus(make_settings(folder / "in", tokenizer, folder / "out"))
    assert_holds(folder / "out", TEXTS, tokenizer)
    return shards(folder / "out")
