"""Preparing a corpus: the stored samples are the tokenised documents, cut; errors; repeatability."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_depthattn.cli.prepare import summary
from megatron_depthattn.data import readers, shard_writer
from megatron_depthattn.data.documents import corpus_files
from megatron_depthattn.data.prepare import PrepareSettings, prepare_corpus
from megatron_depthattn.data.tokenizer import load_tokenizer
from tests.prepared import LENGTH, expected_streams, make_documents, make_settings, read_shards, write


def write_corpus(folder: Path) -> None:
    """Text files in sub-folders, with every kind that is passed over or repaired."""
    for i, text in enumerate(make_documents(60)):
        write(folder / f"d{i % 3}" / f"{i:03}{('', '.txt', '.py', '.weird')[i % 4]}", text.encode())
    (folder / "literal.txt").write_text("before <|endoftext|> after <|padding|> end " * 4)
    (folder / "latin1.txt").write_bytes("déjà vu, naïve ".encode("latin-1") * 5)
    (folder / "binary").write_bytes(b"\x7fELF\0\0 text after")
    (folder / "late.bin").write_bytes(b"a" * 70_000 + b"\0")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    lines = [json.dumps({"text": f"line {i} " + "delta " * i, "url": "x"}) for i in range(12)]
    (folder / "lines.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": ""})]))


def settings(inputs: Path, output: Path, **changes: object) -> PrepareSettings:
    return make_settings(inputs, str(changes.pop("tokenizer", "train-bpe:300")), output, **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of documents, prepared folder); small shards, so that there are several."""
    source, output = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("out") / "corpus"
    write_corpus(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "SHARD_BYTES", 2048)
        patch.setattr(readers, "UNIT_BYTES", 1000)  # samples across the ends of units
        prepare_corpus(settings(source, output))
    return source, output


def expected_documents(source: Path) -> list[bytes]:
    """The documents in the walk's order: a folder's files by name, then its folders by name."""
    names = ["latin1.txt", "lines.jsonl", "literal.txt"]
    files = [source / n for n in names] + sorted(p for d in ("d0", "d1", "d2") for p in (source / d).iterdir())
    found: list[bytes] = []
    for file in files:
        lines = file.read_bytes().splitlines() if file.suffix == ".jsonl" else []
        found += [json.loads(line)["text"].encode() for line in lines if line] if lines else [file.read_bytes()]
    return [document for document in found if document]


def test_shards_hold_the_documents_joined_by_eos_and_cut(corpus: tuple[Path, Path]) -> None:
    source, output = corpus
    manifest = json.loads((output / "manifest.json").read_text())
    for split, stream in expected_streams(expected_documents(source), output / "tokenizer").items():
        stored = read_shards(output / split)
        num_samples = (len(stream) - 1) // LENGTH
        expected = [stream[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(num_samples)]
        assert stored.tolist() == expected
        counts = manifest["splits"][split]
        assert counts["tokens"] == len(stream)
        assert counts["samples"] == num_samples
        assert counts["dropped_tail_tokens"] == len(stream) - 1 - num_samples * LENGTH
    assert len(json.loads((output / "train" / "index.json").read_text())["shards"]) > 1


def test_documents_come_back_as_text(corpus: tuple[Path, Path]) -> None:
    """EOS appears at ends of documents only, though one document spells it out."""
    source, output = corpus
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
    texts = {document.decode(errors="replace") for document in expected_documents(source)}
    for split in ("train", "val"):
        samples = read_shards(output / split)
        stream = np.concatenate([samples[:, :-1].ravel(), samples[-1, -1:]])
        ends = np.flatnonzero(stream == tokenizer.eos_token_id)
        starts = np.concatenate([[0], ends[:-1] + 1])
        for a, b in zip(starts, ends, strict=True):
            assert tokenizer.decode(stream[a:b], clean_up_tokenization_spaces=False) in texts


def test_manifest_counts_what_was_passed_over(corpus: tuple[Path, Path]) -> None:
    source, output = corpus
    manifest = json.loads((output / "manifest.json").read_text())
    documents = expected_documents(source)
    assert {name: n for name, n in manifest["skipped"].items() if n} == {
        "binary_files_skipped": 2,
        "empty_documents": 3,
    }
    counts = manifest["splits"].values()
    assert sum(c["documents"] for c in counts) == len(documents)
    assert sum(c["documents_with_replaced_utf8"] for c in counts) == 1
    files = [p for p in source.rglob("*") if p.is_file() and p.suffix != ".jsonl"]
    text_bytes = sum(p.stat().st_size for p in files if p.name not in {"binary", "late.bin", "blank.txt"})
    lines = [json.loads(line)["text"] for line in (source / "lines.jsonl").read_text().splitlines() if line]
    assert sum(c["bytes"] for c in counts) == text_bytes + sum(map(len, lines))
    assert manifest["sequence_length"] == LENGTH
    assert manifest["vocab_size"] == 300
    assert manifest["settings"]["input"] == [str(source)]


def test_the_saved_tokenizer_is_the_trained_one(corpus: tuple[Path, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus[1] / "tokenizer")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.bos_token_id, tokenizer.pad_token, tokenizer.pad_token_id) == (0, "<|padding|>", 1)
    assert tokenizer.encode("x<|endoftext|>")[-1] == 0  # in use, unlike in preparation, it is a special token
    text = "déjà 火 \x01\n\t  λ"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_split_does_not_depend_on_order(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    source, output = corpus
    files = sorted(str(p) for p in (source / "d0").iterdir())
    found = []
    for name, inputs in (("a", files), ("b", files[::-1])):
        given = settings(source, tmp_path / name, tokenizer=output / "tokenizer", sequence_length=8)
        prepare_corpus(replace(given, inputs=tuple(inputs)))
        found.append(json.loads((tmp_path / name / "manifest.json").read_text())["splits"])
    assert [found[0][s]["bytes"] for s in found[0]] == [found[1][s]["bytes"] for s in found[1]]
    assert found[0]["val"]["documents"] > 0


def test_a_repeat_does_nothing_and_other_settings_or_files_are_an_error(tmp_path: Path) -> None:
    source, output = tmp_path / "text", tmp_path / "out"
    write_corpus(source)
    assert not prepare_corpus(settings(source, output)).already_prepared
    shard = output / "train" / "shard.00000.mds.zstd"
    stamp = shard.stat().st_mtime_ns
    manifest = json.loads((output / "manifest.json").read_text())
    for key in [key for key, value in manifest["settings"].items() if value is None]:
        del manifest["settings"][key]  # as before there was such a setting
    manifest["settings"]["format_version"] = 3  # whose samples are the same, without the borders of documents
    (output / "manifest.json").write_text(json.dumps(manifest))
    repeated = prepare_corpus(settings(source, output))
    assert repeated.already_prepared and "already prepared" in summary(output, repeated)
    assert shard.stat().st_mtime_ns == stamp
    with pytest.raises(
        ValueError, match="sequence_length 16, not 32: use it, choose another folder or pass --overwrite"
    ):
        prepare_corpus(settings(source, output, sequence_length=32))
    (source / "new.txt").write_text("more")
    with pytest.raises(ValueError, match="corpus_files_sha256"):
        prepare_corpus(settings(source, output))
    replaced = prepare_corpus(settings(source, output, sequence_length=32, overwrite=True))
    assert replaced.manifest["sequence_length"] == 32
    assert read_shards(output / "train").shape[1] == 33
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text"]


def test_what_is_not_ours_or_of_an_earlier_version_is_neither_taken_nor_replaced(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a prepared corpus"):
        prepare_corpus(settings(corpus[0], tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").exists()
    manifest = json.loads((corpus[1] / "manifest.json").read_text())
    manifest["settings"]["format_version"] = 2
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"was prepared by another version of this tool, with format_version 2, not 4.*use it, choose"
    ):
        prepare_corpus(settings(corpus[0], tmp_path))


def test_max_bytes_cuts_at_a_character(tmp_path: Path) -> None:
    """The split gets the first bytes of the documents, wherever that falls, each document ended."""
    text = {"a.txt": "é" * 100, "b.txt": "later"}
    for name, content in text.items():
        write(tmp_path / "text" / name, content.encode())
    for limit, kept in ((51, ["é" * 25]), (50, ["é" * 25]), (200, ["é" * 100]), (203, ["é" * 100, "lat"])):
        changes = {"max_bytes": limit, "validation_fraction": 0.0, "sequence_length": 1}
        output = tmp_path / f"out{limit}"
        manifest = prepare_corpus(settings(tmp_path / "text", output, **changes)).manifest
        assert manifest["splits"]["train"]["bytes"] == len("".join(kept).encode())
        tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
        samples = read_shards(output / "train")
        stream = [*samples[:, 0], samples[-1, 1]]
        assert tokenizer.decode(stream) == "".join(f"{document}<|endoftext|>" for document in kept)
    with pytest.raises(ValueError, match="holds no text"):
        prepare_corpus(settings(tmp_path / "text", tmp_path / "out1", max_bytes=1, validation_fraction=0.0))


def word_tokenizer(num_words: int) -> Tokenizer:
    vocab = {f"w{i}": i for i in range(num_words)} | {"[UNK]": num_words}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def word_tokenizer_file(folder: Path) -> Path:
    tokenizer = word_tokenizer(10)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "words.json"))
    return folder / "words.json"


def test_a_given_tokenizer_with_a_large_vocabulary(tmp_path: Path) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(70_000), eos_token="</s>")
    fast.save_pretrained(tmp_path / "tok")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text(" ".join(f"w{i}" for i in range(69_000, 69_100)))
    for name, given in (("folder", tmp_path / "tok"), ("file", tmp_path / "tok" / "tokenizer.json")):
        output = tmp_path / name
        changes = {"tokenizer": str(given), "validation_fraction": 0.0}
        manifest = prepare_corpus(settings(tmp_path / "text", output, **changes)).manifest
        assert (manifest["token_dtype"], manifest["vocab_size"]) == ("uint32", 70_002)
        assert read_shards(output / "train", "uint32")[:, :-1].ravel().tolist() == list(range(69_000, 69_096))
        assert not (output / "val").exists()
        assert AutoTokenizer.from_pretrained(output / "tokenizer").eos_token == "</s>"


def test_a_bare_tokenizer_file_needs_a_known_eos(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    word_tokenizer(10).save(str(file))
    with pytest.raises(ValueError, match="no end-of-sequence token: set eos_token"):
        load_tokenizer(str(file))
    assert load_tokenizer(str(word_tokenizer_file(tmp_path))).eos_token == "</s>"


def test_any_change_of_a_tokenizer_is_noticed(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a vocabulary and merges, which have no tokenizer.json; a file that does not matter does not."""
    folder, output = tmp_path / "tok", tmp_path / "out"
    folder.mkdir()
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "al", "ta"]
    files = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}),
        "merges.txt": "#version: 0.2\na l\nt a\n",
        "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}',
        "README.md": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    changes = {"tokenizer": str(folder)}
    assert prepare_corpus(settings(corpus[0], output, **changes)).manifest["vocab_size"] == len(tokens)
    (folder / "README.md").write_text("read me")
    assert prepare_corpus(settings(corpus[0], output, **changes)).already_prepared
    for name, text in (
        ("merges.txt", "#version: 0.2\na l\n"),
        ("vocab.json", files["vocab.json"].replace('"al": 257, "ta": 258', '"ta": 257, "al": 258')),
        ("added_tokens.json", '{"alpha": 259}'),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "a"}'),
    ):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=r"was prepared with tokenizer '.*tok \(sha256 .*', not '.*tok \(sha256"):
            prepare_corpus(settings(corpus[0], output, **changes))
        if name in files:
            (folder / name).write_text(files[name])
        else:
            (folder / name).unlink()
    assert prepare_corpus(settings(corpus[0], output, **changes)).already_prepared


def test_the_builtin_corpus_is_the_standard_library() -> None:
    names = {file.name for file in corpus_files(["builtin:python-stdlib"])}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert not [n for n in names if "site-packages" in n or "/test/" in n or not n.endswith(".py")]


INVALID = {
    "missing input": ({"inputs": ("/no/such/file",)}, "--input /no/such/file does not exist"),
    "unknown builtin": (
        {"inputs": ("builtin:web",)},
        "--input builtin:web does not exist: give files, folders, hf:NAME, or builtin:python-stdlib",
    ),
    "no input": ({"inputs": ()}, "--input is missing: name files"),
    "small vocabulary": ({"tokenizer": "train-bpe:100"}, "integer of at least 258"),
    "vocabulary in words": ({"tokenizer": "train-bpe:8k"}, "integer of at least 258"),
    "missing tokenizer": ({"tokenizer": "/no/tok"}, "tokenizer /no/tok does not exist"),
    "sequence length": ({"sequence_length": 0}, "--sequence-length 0: set at least 1"),
    "fraction": ({"validation_fraction": 1.5}, r"set a number in \[0, 1\)"),
    "workers": ({"workers": 0}, "--workers 0: set at least 1"),
    "on corrupt": ({"on_corrupt": "ignore"}, "--on-corrupt ignore: set error or skip"),
    "max bytes": ({"max_bytes": 0}, "--max-bytes 0: set at least 1"),
    "max tokens": ({"max_tokens": 3, "sequence_length": 4}, "--max-tokens 3: set at least one sample, 4"),
    "split": ({"split": "train"}, "--split train: it is of data sets: set --input hf:NAME"),
    "revision": ({"revision": "main"}, "--revision main: local inputs have none: leave it out"),
    "revision of a folder": (
        {"inputs": (f"hf:{Path(__file__).parent}",), "revision": "main"},
        "--revision main: local inputs have none: leave it out",
    ),
    "empty val": ({"validation_fraction": 1e-9}, "the val split got 0 documents.*--validation-fraction, or 0"),
    "long sequence": ({"sequence_length": 100_000}, "one sample needs 100001: give more text or set a smaller"),
}


@pytest.mark.parametrize("case", INVALID)
def test_errors_say_what_to_set(case: str, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    changes, message = INVALID[case]
    values = vars(settings(corpus[0], tmp_path / "out")) | changes
    with pytest.raises(ValueError, match=message):
        prepare_corpus(PrepareSettings(**values))
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    for name in ("a.zip", "a.tar.gz", "a.parquet.zst", "a.XZ"):
        (source / name).write_bytes(b"\x1f\x8b")
        with pytest.raises(ValueError, match=r"a\.\S+ is an archive, or not compressed as .gz or .zst"):
            corpus_files([str(source / name)])
    with pytest.raises(ValueError, match=r"--output .* lies inside --input"):
        prepare_corpus(settings(source, source / "out"))
    (source / "b.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"holds no text \(4 archive files skipped, 1 binary files skipped\)"):
        prepare_corpus(settings(source, tmp_path / "out", tokenizer=str(word_tokenizer_file(tmp_path))))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
