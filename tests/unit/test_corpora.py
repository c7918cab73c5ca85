"""Prepared corpora described, checked, joined and divided: against what streaming's own reader finds in the shards."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset
from streaming.base.compression import decompress
from tokenizers import Tokenizer

from megatron_depthattn.cli.prepare import main
from megatron_depthattn.data import shard_writer
from megatron_depthattn.data.check import check_corpus
from megatron_depthattn.data.inspect import inspect_corpus
from megatron_depthattn.data.merge import merge_corpora, split_corpus
from megatron_depthattn.data.prepare import prepare_corpus
from megatron_depthattn.data.stream import TokenDataset
from tests.prepared import LENGTH, folder_bytes, json_lines, make_documents, make_settings, save_tokenizer, write

PACKS = ("concat", "best-fit")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora PACK-0 and PACK-1 of different documents, of several shards; their documents in texts-0 and texts-1."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = save_tokenizer(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "SHARD_BYTES", 700)
        for pack, i in itertools.product(PACKS, range(2)):
            source = folder / f"texts-{i}" / "texts.jsonl"
            write(source, json_lines([text[:90] for text in make_documents(60, seed=i)]))
            prepare_corpus(make_settings(source, tokenizer, folder / f"{pack}-{i}", pack=pack))
    return folder


def rows(split: Path) -> list[tuple[list[int], list[bool], int]]:
    """Tokens, starts and padding of every sample, by streaming's own reader of unpacked shards."""
    copied = shutil.copytree(split, split.parent.parent / f"read-{split.parent.name}-{split.name}")
    for packed in copied.glob("*.zstd"):
        packed.with_suffix("").write_bytes(decompress("zstd", packed.read_bytes()))
    try:
        read = LocalDataset(str(copied))
        return [
            (
                row["tokens"].tolist(),
                np.unpackbits(row["starts"])[: LENGTH + 1].astype(bool).tolist(),
                int(row["padding"]),
            )
            for row in (read[i] for i in range(len(read)))
        ]
    finally:
        shutil.rmtree(copied)


def faults(place: object) -> list[str]:
    return check_corpus(str(place), workers=2).faults


@pytest.mark.parametrize("pack", PACKS)
def test_a_corpus_is_described_as_streaming_reads_it(made: Path, pack: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = made / f"{pack}-0"
    before = folder_bytes(corpus)
    samples = rows(corpus / "train")
    assert main(["inspect", str(corpus), "--sample", "3", "--shards", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    train, counts = found["splits"]["train"], json.loads((corpus / "manifest.json").read_text())["splits"]["train"]
    assert train["shards"] > 2 and train["samples"] == len(samples)
    if pack == "concat":  # the stream: samples joined, shared tokens once; its last document may not end
        stream = [token for tokens, _, _ in samples for token in tokens[:-1]] + [samples[-1][0][-1]]
        ends = [i + 1 for i, token in enumerate(stream) if token == 0]
        lengths = np.diff([0, *ends, *([len(stream)] if ends[-1] != len(stream) else [])])
        assert abs(round(train["documents_read"]["share_cut"] * len(lengths)) - counts["cut_documents"]) <= 1
    else:
        lengths = np.array(
            [
                end - begin
                for tokens, starts, padding in samples
                for begin, end in itertools.pairwise(
                    [i for i, s in enumerate(starts) if s] + [len(tokens)] * (not padding)
                )
            ]
        )
    assert train["documents_read"]["count"] == len(lengths)
    assert train["documents_read"]["mean"] == pytest.approx(lengths.mean())
    assert (train["documents_read"]["min"], train["documents_read"]["max"]) == (lengths.min(), lengths.max())
    padding = sum(padding for _, _, padding in samples) / len(samples) / (LENGTH + 1)
    assert train["documents_read"]["share_padding"] == pytest.approx(padding) and (padding > 0) == (pack == "best-fit")
    tokens, starts, _ = samples[3]
    shown = found["sample"]["documents"]
    assert [id for each in shown for id in each["tokens"]] == tokens
    assert [each["begin"] for each in shown] == sorted({0, *np.flatnonzero(starts).tolist()})
    bare = Tokenizer.from_file(str(made / "tokenizer/tokenizer.json"))
    assert shown[0]["text"] == bare.decode(shown[0]["tokens"], skip_special_tokens=False)
    assert main(["inspect", str(corpus)]) == 0
    text = capsys.readouterr().out
    assert "--- document, tokens 0 to " in text and f"train: {len(samples)} samples" in text and "\x1b" not in text
    assert main(["inspect", str(corpus), "--sample", str(len(samples))]) == 1
    assert f"has the samples 0 to {len(samples) - 1}" in capsys.readouterr().err
    assert folder_bytes(corpus) == before


@pytest.mark.parametrize("pack", PACKS)
def test_check_passes_here_and_from_a_url_and_writes_nothing(made: Path, pack: str) -> None:
    corpus = made / f"{pack}-1"
    before = folder_bytes(corpus)
    for folder in (corpus, corpus / "train", corpus / "val"):
        folder.chmod(0o555)
    try:
        for place in (str(corpus), f"file://{corpus}"):
            assert main(["check", place]) == 0
            assert inspect_corpus(place)["splits"].keys() == {"train", "val"}
    finally:
        for folder in (corpus, corpus / "train", corpus / "val"):
            folder.chmod(0o755)
    assert folder_bytes(corpus) == before


def test_check_finds_a_changed_byte_in_every_file_and_what_is_missing_or_too_much(made: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(made / "best-fit-0", tmp_path / "corpus")
    rng = random.Random(0)
    hashed = ["train/index.json", "val/index.json", "sources.jsonl", "tokenizer/tokenizer.json"]
    hashed += [str(file.relative_to(corpus)) for file in corpus.glob("*/*.zstd")]
    for name in hashed:
        file, content = corpus / name, (corpus / name).read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(7)
        file.write_bytes(changed)
        assert any(name in fault for fault in faults(corpus)), name
        file.unlink()
        assert any(name in fault or Path(name).parent.name in fault for fault in faults(corpus)), name
        file.write_bytes(content)
    assert not faults(corpus)
    file = corpus / "manifest.json"
    manifest = json.loads(file.read_text())
    train = manifest["splits"]["train"]
    for key in ("samples", "padding_tokens", "predicted_tokens", "predicted_within_documents"):
        file.write_text(
            json.dumps(manifest | {"splits": manifest["splits"] | {"train": train | {key: train[key] + 1}}})
        )
        assert any(f"{train[key] + 1} {key} in train" in fault for fault in faults(corpus)), key
    for changes, words in (
        ({"vocab_size": 20}, "outside the vocabulary"),
        ({"eos_token_id": 1}, "padding that is not EOS"),
        ({"sequence_length": 7}, "says sequence_length 7"),
        ({"splits": {"train": train}}, "names no such split"),
    ):
        file.write_text(json.dumps(manifest | changes))
        assert any(words in fault for fault in faults(corpus)), words
    file.write_text(json.dumps(manifest))
    # the samples of uint16 lie at odd addresses, and 65536 is beyond their type
    file.write_text(json.dumps(manifest | {"vocab_size": 1 << 16}))
    assert not faults(corpus)
    file.write_text(json.dumps(manifest))
    (corpus / "train" / "stray").write_text("")
    (fault,) = faults(corpus)
    assert "train/stray is no part of the corpus" in fault and fault.endswith("remove it")
    plain = shutil.copytree(made / "concat-0", tmp_path / "plain")
    edited = json.loads((plain / "manifest.json").read_text())
    edited["splits"]["val"]["padding_tokens"] = 3  # and there is none
    (plain / "manifest.json").write_text(json.dumps(edited))
    (fault,) = faults(plain)
    assert "counts 3 padding_tokens in val, and its shards hold 0" in fault


@pytest.mark.parametrize("pack", PACKS)
def test_merged_is_one_after_the_other_and_split_gives_them_back(made: Path, pack: str, tmp_path: Path) -> None:
    parts = [made / f"{pack}-{i}" for i in range(2)]
    merged = tmp_path / "merged"
    assert main(["merge", str(parts[0]), f"file://{parts[1]}", "--output", str(merged)]) == 0
    assert not faults(merged)
    own = [json.loads((part / "manifest.json").read_text()) for part in parts]
    joined = json.loads((merged / "manifest.json").read_text())
    for split in ("train", "val"):
        samples = [rows(part / split) for part in parts]
        assert rows(merged / split) == samples[0] + samples[1]
        for key in ("samples", "documents", "bytes", "padding_tokens", "predicted_within_documents"):
            assert joined["splits"][split][key] == sum(each["splits"][split][key] for each in own)
    assert (
        os.stat(merged / "train/shard.00000.mds.zstd").st_ino == os.stat(parts[0] / "train/shard.00000.mds.zstd").st_ino
    )
    assert TokenDataset(merged, cache=tmp_path / "cache").pads == (pack == "best-fit")
    assert [each["settings"] for each in inspect_corpus(str(merged))["settings"]["parts"]] == [
        m["settings"] for m in own
    ]
    with pytest.raises(ValueError, match="was made by depthattn prepare merge"):
        prepare_corpus(make_settings(made / "texts-0", made / "tokenizer", merged, pack=pack))
    num = len(rows(merged / "train"))
    for how, number in (({"parts": 3}, 3), ({"fraction": 0.4}, 2), ({"samples": 5}, 2)):
        output = tmp_path / f"split-{number}-{len(how)}-{next(iter(how))}"
        split_corpus(str(merged), output, **how)
        pieces = sorted(output.iterdir())
        assert len(pieces) == number and not [fault for piece in pieces for fault in faults(piece)]
        for split in ("train", "val"):
            found = [row for piece in pieces if (piece / split).exists() for row in rows(piece / split)]
            assert found == rows(merged / split)
        counts = [json.loads((piece / "manifest.json").read_text())["splits"]["train"] for piece in pieces]
        for key in ("samples", "bytes", "padding_tokens", "predicted_tokens", "predicted_within_documents"):
            assert sum(each[key] for each in counts) == joined["splits"]["train"][key], (how, key)
        if how == {"samples": 5}:
            assert [each["samples"] for each in counts] == [5, num - 5]
    again = tmp_path / "again"
    merge_corpora([str(tmp_path / "split-3-1-parts" / f"part-{i}") for i in range(3)], again)
    # a part does not know of how many documents it was cut: nor does what is made of it
    merge_corpora([str(tmp_path / "split-3-1-parts" / "part-0"), str(parts[1])], tmp_path / "mixed")
    assert "cut_documents" not in json.loads((tmp_path / "mixed/manifest.json").read_text())["splits"]["train"]
    assert not faults(again) and rows(again / "train") == rows(merged / "train")


def test_what_does_not_fit_together_is_one_error(made: Path, tmp_path: Path) -> None:
    one, other, packed = (str(made / name) for name in ("concat-0", "concat-1", "best-fit-0"))
    renamed = shutil.copytree(one, tmp_path / "renamed")
    output = tmp_path / "out"
    for places, words in (
        ([one], "name two corpora"),
        ([one, packed], f"{one} has pack concat, and {packed} best-fit"),
        ([one, other, str(renamed)], "hold the same samples"),
        ([one, str(made / "texts-0")], "holds no corpus"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_corpora(places, output)
    manifest = json.loads((renamed / "manifest.json").read_text())
    for key, value in (("tokenizer_sha256", "0" * 64), ("format_version", 3), ("sequence_length", 8)):
        (renamed / "manifest.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(ValueError, match=f"{other} has {key} .*, and {renamed} {value}"):
            merge_corpora([other, str(renamed)], output)
    for how in ({"parts": 1}, {"parts": 10_000}, {"fraction": 1.0}, {"samples": 0}, {"samples": 10_000}):
        with pytest.raises(ValueError, match=r"has .* samples to train on; set"):
            split_corpus(one, output, **how)
    assert not list(tmp_path.glob("*out*"))
    with pytest.raises(ValueError, match="lies inside"):
        merge_corpora([one, other], made / "concat-0" / "below")
    with pytest.raises(ValueError, match="is there already"):
        merge_corpora([one, other], renamed)
    shard = renamed / "train" / "shard.00001.mds.zstd"
    (renamed / "manifest.json").write_text(json.dumps(manifest))
    shard.write_bytes(shard.read_bytes()[:-1])
    for make in (
        lambda: merge_corpora([str(renamed), other], output),
        lambda: split_corpus(str(renamed), output, parts=2),
    ):
        with pytest.raises(ValueError, match=str(shard)):
            make()
    assert not list(tmp_path.glob("*out*"))


def test_shards_of_tokens_alone_are_divided_too(made: Path, tmp_path: Path) -> None:
    """Whole shards stay as they are; where a cut goes through one, all are written again with their documents."""
    from streaming import MDSWriter

    old = shutil.copytree(made / "concat-0", tmp_path / "old")
    samples = {split: rows(old / split) for split in ("train", "val")}
    manifest = json.loads((old / "manifest.json").read_text()) | {"format_version": 3}
    for split, of in samples.items():
        shutil.rmtree(old / split)
        settings = {"compression": "zstd", "hashes": ["xxh64"], "size_limit": 1500}
        with MDSWriter(columns={"tokens": f"ndarray:uint16:{LENGTH + 1}"}, out=str(old / split), **settings) as out:
            for tokens, _, _ in of:
                out.write({"tokens": np.array(tokens, np.uint16)})
        del manifest["splits"][split]["index_sha256"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert not faults(old)
    per_shard = json.loads((old / "train" / "index.json").read_text())["shards"][0]["samples"]
    for number, is_rewritten in ((per_shard, False), (per_shard + 1, True)):
        split_corpus(str(old), tmp_path / str(number), samples=number)
        parts = [tmp_path / str(number) / f"part-{i}" for i in range(2)]
        assert not [fault for part in parts for fault in faults(part)]
        assert TokenDataset(parts[0], cache=tmp_path / "cache").stores_documents == is_rewritten
    assert [row for part in parts for row in rows(part / "train")] == samples["train"]


KILLED = """
import sys, time
from megatron_depthattn.data import merge
link = merge._link
def slow(piece, target):
    result = link(piece, target)
    print("linked", flush=True)
    time.sleep(60 if target.name == "shard.00001.mds.zstd" else 0)
    return result
merge._link = slow
merge.merge_corpora(sys.argv[1:3], merge.Path(sys.argv[3]))
"""


def test_a_killed_merge_leaves_nothing_in_the_way(made: Path, tmp_path: Path) -> None:
    given = [str(made / "concat-0"), str(made / "concat-1")]
    before = folder_bytes(made)
    process = subprocess.Popen([sys.executable, "-c", KILLED, *given, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() and process.stdout.readline()
    time.sleep(0.1)
    with pytest.raises(ValueError, match="being prepared by another process"):
        merge_corpora(given, tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    merge_corpora(given, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not faults(tmp_path / "out")
    assert folder_bytes(made) == before
