"""Several streams as one numbered set of samples, and the settings that name them."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from megatron_depthattn.config import StreamConfig, from_dict, load_config, save_config, to_dict, validate
from megatron_depthattn.data.corpus import Corpus

LENGTH = 4
SIZES = {"code": 90, "books": 23, "wiki": 11}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora; the tokens of sample i of a corpus are `number of the corpus * 1000 + i`."""
    folder = tmp_path_factory.mktemp("streams")
    for number, (name, size) in enumerate(SIZES.items()):
        for split, count in (("train", size), ("val", 5)):
            columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
            out = str(folder / name / split)
            with MDSWriter(columns=columns, out=out, compression="zstd", hashes=["xxh64"], size_limit=400) as writer:
                for i in range(count):
                    writer.write({"tokens": np.full(LENGTH + 1, number * 1000 + i, np.uint16)})
        digest = hashlib.sha256(b"one tokenizer").hexdigest()
        (folder / name / "manifest.json").write_text(json.dumps({"tokenizer_sha256": digest, "vocab_size": 5000}))
    return folder


def open_streams(folder: Path, *names: str, proportions: tuple[float, ...] = (), split: str = "train") -> Corpus:
    names = names or tuple(SIZES)
    return Corpus([str(folder / name) for name in names], proportions or (0.6, 0.3, 0.1)[: len(names)], split)


def test_ids_count_through_the_streams(folder: Path) -> None:
    corpus = open_streams(folder)
    assert (len(corpus), corpus.offsets) == (124, (0, 90, 113, 124))
    expected = [number * 1000 + i for number, size in enumerate(SIZES.values()) for i in range(size)]
    assert [int(corpus[i][0]) for i in range(124)] == expected


def test_every_stream_goes_through_its_own_epochs(folder: Path) -> None:
    corpus = open_streams(folder)
    ids = corpus.sequence(seed=7, shuffle=True).sample_ids(np.arange(2000))
    for i, count in enumerate((1200, 600, 200)):
        low, high = corpus.offsets[i : i + 2]
        own = ids[(ids >= low) & (ids < high)]
        assert len(own) == count
        whole = own[: count // (high - low) * (high - low)].reshape(-1, high - low)
        assert (np.sort(whole, axis=1) == np.arange(low, high)).all()
        assert len({tuple(epoch) for epoch in whole.tolist()}) == len(whole)
    assert corpus.epochs(2000, seed=7) == [1200 / 90, 600 / 23, 200 / 11]


def test_streams_of_one_size_are_shuffled_independently(folder: Path) -> None:
    corpus = open_streams(folder, "books", "books", proportions=(1, 1))
    ids = corpus.sequence(seed=7, shuffle=True).sample_ids(np.arange(1000))
    assert ids[ids < 23].tolist() != (ids[ids >= 23] - 23).tolist()


def test_one_stream_is_the_plain_sequence(folder: Path) -> None:
    corpus = open_streams(folder, "books")
    ids = corpus.sequence(seed=1, shuffle=False).sample_ids(np.arange(50))
    assert ids.tolist() == list(itertools.islice(itertools.cycle(range(23)), 50))
    assert corpus.describe(23, 46, seed=1) == [
        f"stream 0: {folder / 'books'}: 23 samples (ids from 0), 100 % of what is read; "
        "epochs read 1.00, at the end 2.00"
    ]


def test_the_digest_follows_contents_and_their_order(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    digests = [
        open_streams(folder).digest,
        open_streams(folder, "books", "code", "wiki").digest,
        open_streams(folder, "books", "code").digest,
        open_streams(folder, split="val").digest,
    ]
    assert len(set(digests)) == 4
    assert open_streams(moved).digest == digests[0]


def change_manifest(folder: Path, **values: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change_manifest(f / "books", tokenizer_sha256="ab" * 32), r"books was tokenised with another token"),
        (lambda f: (f / "wiki" / "manifest.json").unlink(), r"wiki has no manifest\.json that names its tokenizer"),
        (lambda f: (f / "wiki" / "train" / "index.json").unlink(), r"wiki/train has no index\.json"),
        (lambda f: [file.unlink() for file in f.glob("code/train/shard.00001.*")], r"train/shard\.00001\.mds\.zstd is"),
    ],
)
def test_streams_that_do_not_fit_are_errors(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    open_streams(copy)
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        open_streams(copy)


def test_streams_of_another_length_are_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.sequence_length is 5, but .*code was prepared with 4"):
        Corpus([str(folder / "code"), str(folder / "wiki")], [1, 1], "train", sequence_length=5)


# ------------------------------------------------------------------------------------------- settings

TWO = "data.streams=[{path: a, proportion: 0.7}, {path: b, proportion: 3}]"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text("run: {dir: out}\n")
    return path


def test_streams_are_read_saved_and_read_again(base: Path, tmp_path: Path) -> None:
    expected = [StreamConfig(path="a", proportion=0.7), StreamConfig(path="b", proportion=3.0)]
    config = load_config(base, [TWO])
    validate(config, 1)
    assert config.data.streams == config.data.sources == expected
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config == from_dict(to_dict(config), "a checkpoint")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data:\n  streams:\n  - {path: a, proportion: 0.7}\n  - path: b\n    proportion: 3\n")
    assert load_config(base, [str(overlay)]) == config
    assert load_config(base, [TWO, "data.streams=null", "data.path=a"]).data.sources == [
        StreamConfig(path="a", proportion=1.0)
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("[{path: a, proprtion: 1}]", "unknown key 'data.streams.proprtion' in the command line; the nearest valid "
         "key is 'data.streams.proportion'"),
        ("[{path: a, proportion: 1}, {path: a}]", "data.streams[1].proportion is missing (in the command line); "
         "set it"),
        ("[{path: a, proportion: much}]", "data.streams is list [{'path': 'a', 'proportion': 'much'}] (from the "
         "command line); expected a list, each entry {path, proportion} or null (Value 'much' of type 'str' could not "
         "be converted to Float)"),
        ("[a]", "data.streams is list ['a'] (from the command line); expected a list, each entry {path, proportion} "
         "or null (Invalid type assigned: str is not a subclass of StreamConfig. value: a)"),
        ("a", "data.streams is string 'a' (from the command line); expected a list, each entry {path, proportion} or "
         "null"),
        ("[]", "data.streams is an empty list; give at least one entry of path and proportion, or set data.path"),
        ("[{path: a, proportion: 0}]", "data.streams[0].proportion is 0.0; set a number above 0 (or 0 where "
         "data.stages gives it more later, and another stream has more until then)"),
        ("[{path: '', proportion: 1}]", "data.streams[0].path is empty; set the folder or URL of a prepared corpus"),
        ("[{path: 's3://a', proportion: 1}]", "data.streams[0].path is the remote s3://a and data.cache is null: "
         "shards have nowhere to go; set data.cache to a local folder of each node"),
    ],
)  # fmt: skip
def test_wrong_streams_are_errors(base: Path, setting: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        validate(load_config(base, [f"data.streams={setting}"]), 1)
    assert str(raised.value) == message


def test_path_and_streams_exclude_each_other(base: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is c and data\.streams is set as well; set data\.path=''"):
        validate(load_config(base, [TWO, "data.path=c"]), 1)
    with pytest.raises(ValueError, match=r"data\.path is not set: the run has nothing to read"):
        validate(load_config(base), 1)
