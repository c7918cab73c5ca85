"""tools/evaluate.py on an exported folder, against a plain loop and the raw text."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import MDSWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_depthattn.cli.convert import main as convert
from megatron_depthattn.cli.evaluate import main
from megatron_depthattn.config import load_config
from megatron_depthattn.data.documents import is_validation
from megatron_depthattn.data.prepare import PrepareSettings, prepare_corpus
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from tests.e2e.commands import REPOSITORY, must_succeed
from tests.e2e.exported import edit_json, error_of, export
from tests.e2e.small_run import train

LENGTH = 32
WORDS = ["alpha", "épsilon", "火山", "👩🏽‍🚀", "naïve", "x = 1", "\n", "<|endoftext|>", "  return"]
DOCUMENTS = [f"{i}: " + " ".join(WORDS[(i * k) % len(WORDS)] for k in range(40)) + " end." for i in range(1, 41)]
VAL = [document for document in DOCUMENTS if is_validation(document.encode(), 0.5)]


def prepare(folder: Path, tokenizer: str, **changes: object) -> Path:
    source = folder.with_name(folder.name + ".jsonl")
    source.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    settings = {"sequence_length": LENGTH, "validation_fraction": 0.5} | changes
    prepare_corpus(PrepareSettings(inputs=(str(source),), tokenizer=tokenizer, output=folder, **settings))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data") / "mds", "train-bpe:320")


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    export(path, AutoTokenizer.from_pretrained(data / "tokenizer"))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> DepthAttnForCausalLM:
    return DepthAttnForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(data, tmp_path / "data")


def evaluated(folder: Path, data: Path, tmp_path: Path, *options: object) -> dict:
    """The figures of a run in this process."""
    file = tmp_path / "figures.json"
    assert main(["--model", str(folder), "--data", str(data), "--json", str(file), *map(str, options)]) == 0
    return json.loads(file.read_text())


def val_stream(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The val split's tokens, from its text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return [token for text in VAL for token in [*backend.encode(text, add_special_tokens=False).ids, 0]]


@torch.no_grad()
def plain_loss(model: DepthAttnForCausalLM, stream: list[int], samples: int, length: int = LENGTH) -> float:
    """Mean nats of `samples` samples, one at a time, in fp64 from the logits on."""
    total = 0.0
    for i in range(samples):
        row = torch.tensor(stream[i * length : (i + 1) * length + 1])
        logits = model(row[None, :-1], use_cache=False).logits[0].double()
        total += functional.cross_entropy(logits, row[1:], reduction="sum").item()
    return total / (samples * length)


def test_figures_are_those_of_a_plain_loop_and_of_the_raw_text(folder, data, model, tokenizer, tmp_path, capsys):
    capsys.readouterr()
    figures = evaluated(folder, data, tmp_path, "--device", "cpu")
    printed = capsys.readouterr()
    stream = val_stream(tokenizer)
    samples = (len(stream) - 1) // LENGTH
    assert (figures["samples"], figures["tokens"]) == (samples, samples * LENGTH) and samples > 20
    loss = plain_loss(model, stream, samples)
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)

    # The text of all documents, less that of the first token and of the tail that no sample holds.
    unseen = [tokenizer.decode(part, skip_special_tokens=True) for part in (stream[:1], stream[samples * LENGTH + 1 :])]
    assert "\ufffd" not in "".join(unseen)
    num_bytes = sum(len(text.encode()) for text in VAL) - sum(len(text.encode()) for text in unseen)
    assert figures["bytes"] == num_bytes
    assert figures["bits_per_byte"] == pytest.approx(loss / math.log(2) * samples * LENGTH / num_bytes, rel=1e-6)

    assert printed.err == ""
    shown = " ".join(printed.out.split())
    for expected in (f"samples {samples}", f"tokens {samples * LENGTH:,}", f"bytes {num_bytes:,}", f"loss {loss:.4f}"):
        assert expected in shown
    assert f"bits per byte {figures['bits_per_byte']:.6f}" in shown
    assert "bytes: exact: the bytes of each predicted token" in shown


def test_batch_size_does_not_matter_and_first_samples_are_first(folder, data, model, tokenizer, tmp_path):
    one, five = (evaluated(folder, data, tmp_path, "--max-samples", 12, "--batch-size", size) for size in (1, 5))
    assert one["loss"] == pytest.approx(five["loss"], rel=1e-6)
    assert one["bytes"] == five["bytes"] and one["samples"] == 12
    assert one["loss"] == pytest.approx(plain_loss(model, val_stream(tokenizer), 12), rel=1e-6)


def documents_alone(model: DepthAttnForCausalLM, rows: list[list[int]]) -> tuple[float, int, list[int]]:
    """As `plain_loss`, of every document in `rows` by itself, cut where 0 ends it; with the tokens predicted."""
    total, predicted = 0.0, []
    for row in rows:
        ends = [i + 1 for i, token in enumerate(row) if token == 0]
        for begin, end in itertools.pairwise(sorted({0, *ends, len(row)})):
            if end - begin > 1:
                piece = torch.tensor(row[begin:end])
                with torch.no_grad():
                    logits = model(piece[None, :-1], use_cache=False).logits[0].double()
                total += functional.cross_entropy(logits, piece[1:], reduction="sum").item()
                predicted += row[begin + 1 : end]
    return total / len(predicted), len(predicted), predicted


def test_document_mask_scores_every_document_by_itself(folder, own_folder, data, model, tokenizer, tmp_path, capsys):
    """A model that was trained so says it where the mask is left out."""
    edit_json(own_folder / "config.json", trained_with_document_mask=True)
    stream, options = val_stream(tokenizer), ("--max-samples", 12, "--batch-size", 5)
    masked = evaluated(own_folder, data, tmp_path, *options, "--document-mask")
    assert "note" not in capsys.readouterr().err
    plain = evaluated(own_folder, data, tmp_path, *options)
    assert "trained with data.document_mask=true" in capsys.readouterr().err
    loss, count, predicted = documents_alone(model, [stream[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(12)])
    assert (masked["tokens"], plain["tokens"]) == (count, 12 * LENGTH) and count < 12 * LENGTH
    assert masked["loss"] == pytest.approx(loss, rel=1e-6) and abs(plain["loss"] / loss - 1) > 1e-3
    assert masked["bytes"] == len(tokenizer.decode(predicted, skip_special_tokens=True).encode())
    assert (masked["document_mask"], plain["document_mask"]) == (True, False)


@pytest.mark.parametrize("masks", [False, True])
def test_the_loss_is_the_held_out_one_of_training(masks, config_file, corpus, tmp_path):
    """Of an export, which says how it was trained, and which comes back as a step folder all the same."""
    run, hf = tmp_path / "run", tmp_path / "hf"
    mask = f"data.document_mask={str(masks).lower()}"
    more = (
        "train.eval_batches=50",
        "train.eval_interval=2",
        "model.init_std=0.3",
    )  # borders, and weights that show them
    must_succeed(train(config_file, f"run.dir={run}", mask, "train.stop_after=2", *more))
    assert convert(["to-hf", "--checkpoint", str(run / "checkpoints"), "--output", str(hf)]) == 0
    assert convert(["from-hf", "--model", str(hf), "--output", str(tmp_path / "back" / "step_00000000")]) == 0
    assert json.loads((hf / "config.json").read_text()).get("trained_with_document_mask", False) == masks
    assert ("document_mask: true" in (hf / "README.md").read_text().split("## Use")[0]) == masks
    config = load_config(run / "config.yaml")
    samples = ("--max-samples", config.train.eval_batches * config.train.global_batch_size)
    trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
    losses = {flag: evaluated(hf, corpus, tmp_path, *samples, *flag)["loss"] for flag in ((), ("--document-mask",))}
    own, other = (losses[flag] for flag in ((("--document-mask",), ()) if masks else ((), ("--document-mask",))))
    assert own == pytest.approx(trained, rel=1e-6) and abs(other / trained - 1) > 1e-5


@pytest.mark.parametrize("mask", [(), ("--document-mask",)], ids=str)
def test_padding_is_not_scored(mask, folder, model, tmp_path):
    """Rows of whole documents, filled up: the same figures as of the row without what fills it."""
    documents = [[[*range(3, 3 + n), 0] for n in lengths] for lengths in ([9, 16], [31], [20, 5])]
    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}", "starts": f"ndarray:uint8:{LENGTH // 8 + 1}"}
    rows = [list(itertools.chain(*row)) for row in documents]
    with MDSWriter(columns=columns | {"padding": "uint32"}, out=str(tmp_path / "mds" / "val")) as out:
        for row, tokens in zip(documents, rows, strict=True):
            ends = list(itertools.accumulate(map(len, row), initial=0))
            starts, padding = np.zeros(LENGTH + 1, bool), LENGTH + 1 - len(tokens)
            starts[ends[: -1 if padding == 0 else None]] = True
            padded = np.array(tokens + [0] * padding, np.uint16)
            out.write({"tokens": padded, "starts": np.packbits(starts), "padding": np.uint32(padding)})
    figures = evaluated(folder, tmp_path / "mds", tmp_path, *mask, "--batch-size", 2)
    if mask:
        loss, count, _ = documents_alone(model, rows)
    else:
        count = sum(len(row) - 1 for row in rows)
        loss = sum(plain_loss(model, row, 1, len(row) - 1) * (len(row) - 1) for row in rows) / count
    assert figures["tokens"] == count < 3 * LENGTH
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)


def test_splits_models_and_types(folder, data, tokenizer, tmp_path):
    options = ("--max-samples", 6)
    val, named, train, rounded = (
        evaluated(folder, data, tmp_path, *options, *more)
        for more in ((), ("--split", "val"), ("--split", "train"), ("--dtype", "bf16"))
    )
    direct = evaluated(folder, data / "val", tmp_path, *options)
    assert train["loss"] != val["loss"] == named["loss"] == direct["loss"]
    assert val["bytes"] == direct["bytes"] and direct["split"] == "val"
    assert rounded["dtype"] == "bfloat16" and val["loss"] != rounded["loss"] == pytest.approx(val["loss"], rel=0.02)
    export(tmp_path / "vanilla", tokenizer, use_depth_attention=False)
    one, two = evaluated(folder, data, tmp_path, *options, "--model", folder, tmp_path / "vanilla")
    assert one["loss"] == val["loss"] != two["loss"]
    assert one["batch_size"] == 64, "a quarter of the memory holds 64 samples of this size"


def test_shards_without_manifest_or_tokenizer(folder, own_folder, own_data, tmp_path):
    whole = evaluated(folder, own_data, tmp_path)
    for name in ("manifest.json", "tokenizer", "train"):
        (shutil.rmtree if (own_data / name).is_dir() else Path.unlink)(own_data / name)
    assert evaluated(folder, own_data / "val", tmp_path)["bits_per_byte"] == whole["bits_per_byte"]
    (own_folder / "tokenizer.json").unlink()
    alone = evaluated(own_folder, own_data, tmp_path)
    assert alone["loss"] == whole["loss"]
    assert alone["bytes"] is None and alone["bits_per_byte"] is None and "unknown" in alone["bytes_source"]


def test_other_tokenizers_take_the_splits_average(tmp_path):
    """Words with a space where one stood before: a token alone does not say whether that was in the text."""
    words = sorted({word for text in DOCUMENTS for word in text.split()})
    backend = Tokenizer(models.WordLevel({"</s>": 0, "?": 1} | {f"▁{w}": i for i, w in enumerate(words, 2)}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    own.save_pretrained(tmp_path / "words")
    data = prepare(tmp_path / "mds", str(tmp_path / "words"), sequence_length=16)
    export(tmp_path / "model", own)
    figures = evaluated(tmp_path / "model", data, tmp_path)
    counts = json.loads((data / "manifest.json").read_text())["splits"]["val"]
    assert counts["bytes"] == sum(len(text.encode()) for text in VAL)
    assert figures["bytes"] == pytest.approx(figures["tokens"] * counts["bytes"] / counts["tokens"])
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2) * counts["tokens"] / counts["bytes"])
    assert figures["bytes_source"].startswith("estimate: ") and "average" in figures["bytes_source"]


def test_a_read_only_corpus_and_no_shared_memory_left(folder, own_data, data, tmp_path):
    """In a mount namespace where the corpus cannot be written and shared memory is our own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare -rm (a kernel with user namespaces) to mount a folder read-only")
    shutil.rmtree(own_data / "val")
    fresh = prepare(tmp_path / "again", str(own_data / "tokenizer"))  # its shards were never expanded
    before = sorted(fresh.rglob("*"))
    script = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && mount -t tmpfs none /dev/shm && shift && '
        '"$@" || exit 9; ls -A /dev/shm'
    )
    tool_command = [sys.executable, "tools/evaluate.py", "--model", folder, "--data", fresh, "--max-samples", "4"]
    command = ["unshare", "-rm", "sh", "-c", script, "sh", fresh, *tool_command]
    result = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    expected = evaluated(folder, data, tmp_path, "--max-samples", 4)
    assert f"{expected['loss']:.6f}" in result.stdout
    *_, last = result.stdout.splitlines()
    assert last.startswith("bytes: "), f"left in /dev/shm: {last}"
    assert sorted(fresh.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--split", "test"], "has no split 'test': it has the splits train, val"),
        (["--batch-size", "0"], "--batch-size 0: set at least 1, or auto"),
        (["--batch-size", "many"], "--batch-size many: set at least 1, or auto"),
        (["--max-samples", "0"], "--max-samples 0: set at least 1, or leave it out"),
        (["--json", "/nowhere/f.json"], "--json /nowhere/f.json: its folder does not exist"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used here"),
        (["--data", "{tmp}/nowhere"], "does not exist"),
        (["--data", "{tmp}"], "has no split 'val': it is no corpus of depthattn prepare"),
        (["--data", "{data}/val", "--split", "train"], "is itself a split and --split is train"),
        (["--model", "{tmp}/nowhere"], "does not exist"),
        (["--model", "{tmp}"], "has no config.json"),
    ],
)
def test_evaluate_rejects_options(options, complaint, folder, data, tmp_path, capsys):
    options = [option.format(tmp=tmp_path, data=data) for option in options]
    assert complaint in error_of(main, capsys, "--model", folder, "--data", data, *options)


def test_evaluate_rejects_models_that_do_not_fit_the_data(data, folder, tokenizer, tmp_path, capsys):
    def said(model: Path, corpus: Path = data) -> str:
        return error_of(main, capsys, "--model", model, "--data", corpus)

    export(tmp_path / "small", tokenizer, vocab_size=300)
    assert "the data has a vocabulary of 320 and the model one of 300" in said(tmp_path / "small")
    shards = tmp_path / "foreign" / "val"
    with MDSWriter(columns={"tokens": f"ndarray:uint16:{LENGTH + 1}"}, out=str(shards)) as out:
        for row in itertools.repeat(torch.full((LENGTH + 1,), 310, dtype=torch.uint16).numpy(), 3):
            out.write({"tokens": row})
    assert "the data has token 310, and model and tokenizer know 300" in said(tmp_path / "small", shards.parent)
    assert main(["--model", str(folder), "--data", str(shards)]) == 0


def test_evaluate_rejects_another_tokenizer(folder, own_folder, data, tmp_path, capsys):
    edit_json(own_folder / "tokenizer.json")  # without its indentation: the same by another sha256
    assert (own_folder / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    evaluated(own_folder, data, tmp_path, "--max-samples", 3)
    other = prepare(tmp_path / "other", "train-bpe:300")
    shutil.copy(other / "tokenizer" / "tokenizer.json", own_folder)
    assert f"the data was prepared with another tokenizer than {own_folder / 'tokenizer.json'} (its sha256" in error_of(
        main, capsys, "--model", own_folder, "--data", data
    )


def test_evaluate_rejects_weights_that_are_not_numbers(own_folder, data, capsys):
    tensors = load_file(own_folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, own_folder / "model.safetensors", metadata={"format": "pt"})
    options = ("--model", own_folder, "--data", data, "--batch-size", "8")
    assert "the loss is nan within samples 0 to 7" in error_of(main, capsys, *options)


@pytest.mark.parametrize("changes", [{"eos_token_id": 10**9}, {"eos_token_id": None}, {"vocab_size": "320"}], ids=str)
def test_evaluate_rejects_a_manifest_that_cannot_be(folder, own_data, capsys, changes):
    edit_json(own_data / "manifest.json", **changes)
    complaint = error_of(main, capsys, "--model", folder, "--data", own_data)
    assert f"{own_data / 'manifest.json'} is no manifest of a corpus: " in complaint
