"""lm-evaluation-harness on exported folders: `depthattn evaluate --suite`, and the harness by itself. No network."""

import ast
import json
import math
import socket
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from statistics import stdev
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file
from streaming import MDSWriter
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from megatron_depthattn import suite as suites
from megatron_depthattn.cli.evaluate import main
from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from tests.e2e.commands import REPOSITORY, must_succeed, python
from tests.e2e.eight_data_sets import write_eight
from tests.e2e.exported import error_of, export
from tests.e2e.hub import Hub

TASKS = REPOSITORY / "configs/lm_eval"
EIGHT = ("lambada_openai", "piqa", "winogrande", "sciq", "hellaswag", "arc_easy", "arc_challenge", "race")
FEW = 30  # questions that are scored
TOLERANCE = 1e-4  # of a log-likelihood in nats
Way = tuple[str, str]
"""A context and what follows it."""
Question = tuple[list[Way], int]
"""Ways to answer, and which of them is right."""


def task_module() -> ModuleType:
    spec = util.spec_from_file_location("offline_tasks", TASKS / "utils.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = task_module()
BRACKETS, LAST_WORDS, NAMES = MODULE.load(), MODULE.load_last_word(), MODULE.load_which_name()


def brackets(document: dict[str, Any]) -> Question:
    return [(document["text"], choice) for choice in document["choices"]], document["answer"]


def last_word(document: dict[str, Any]) -> Question:
    context, _, word = document["text"].rpartition(" ")
    return [(context, f" {word}")], 0


def which_name(document: dict[str, Any]) -> Question:
    return [(context, f" {document['continuation']}") for context in document["contexts"]], document["answer"]


OFFLINE: dict[str, tuple[Callable[[dict[str, Any]], Question], dict[str, datasets.Dataset]]] = {
    "python_brackets": (brackets, BRACKETS),
    "last_word": (last_word, LAST_WORDS),
    "which_name": (which_name, NAMES),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe((document["text"].encode() for document in BRACKETS["test"]), 320)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt something of the tasks, so that no accuracy is 0 or 1."""
    path = tmp_path_factory.mktemp("export") / "model"
    model = export(path, tokenizer, max_position_embeddings=512, initializer_range=0.1)
    texts = ["\n\n".join(LAST_WORDS["test"]["text"][i : i + 4]) for i in range(100)]
    rows = torch.tensor([row[:96] for row in tokenizer(texts)["input_ids"] if len(row) >= 96])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for step in range(60):
        batch = rows[torch.arange(16 * step, 16 * step + 16) % len(rows)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> DepthAttnForCausalLM:
    return DepthAttnForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `datasets` keeps what it has loaded; empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    return tmp_path / "home"


@torch.no_grad()
def likelihood(model: DepthAttnForCausalLM, tokenizer: PreTrainedTokenizerFast, way: Way) -> tuple[float, bool]:
    """Log-likelihood of what follows, in fp64 from the logits on; and whether each token is the likeliest.

    Of what is longer than the model's positions the beginning is left out.
    """
    context = tokenizer.encode(way[0], add_special_tokens=False)
    whole = torch.tensor(tokenizer.encode("".join(way), add_special_tokens=False))
    rest, whole = whole[len(context) :], whole[-model.config.max_position_embeddings - 1 :]
    scores = model(whole[None, :-1], use_cache=False).logits[0, -len(rest) :].double()
    nats = functional.cross_entropy(scores, rest, reduction="sum")
    return -nats.item(), bool((scores.argmax(-1) == rest).all())


def choice(model: DepthAttnForCausalLM, tokenizer: PreTrainedTokenizerFast, ways: list[Way]) -> int:
    """The likeliest way, of equals the first; of a lone one 0 if its tokens are the likeliest, or else 1."""
    found = [likelihood(model, tokenizer, way) for way in ways]
    best = max(value for value, _ in found)
    first = next(i for i, (value, _) in enumerate(found) if value > best - 1e-9)
    return first if len(found) > 1 else int(not found[0][1])


def requests(task: Any) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """The task's questions as they were last asked."""
    asked: dict[int, list[tuple[str, str]]] = {}
    for instance in sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx)):
        asked.setdefault(instance.doc_id, []).append(instance.args)
    yield from ((task.eval_docs[i], ways) for i, ways in asked.items())


def test_the_documents_have_one_answer_each():
    documents = [*BRACKETS["test"], *BRACKETS["train"]]
    assert len(BRACKETS["test"]) == 200 and len({document["text"] for document in documents}) == len(documents) == 240
    for document in documents:
        assert len(set(document["choices"])) == 4 and len(set(map(len, document["choices"]))) == 1
        for index, choice in enumerate(document["choices"]):
            if index == document["answer"]:
                ast.parse(document["text"] + choice)
            else:
                with pytest.raises(SyntaxError):
                    ast.parse(document["text"] + choice)
    assert {document["answer"] for document in documents} == {0, 1, 2, 3}
    for split in ("test", "train"):
        for text, names in zip(LAST_WORDS[split]["text"], NAMES[split], strict=True):
            *known, name, _, value = text.split()
            assert dict(zip(known[::4], known[2::4], strict=True))[name] == value and known[2] != known[6]
            assert names["continuation"] == f"is {value}" and names["contexts"][names["answer"]].endswith(f"; {name}")
    assert not set(LAST_WORDS["test"]["text"]) & set(LAST_WORDS["train"]["text"])
    assert MODULE.documents() == documents


@pytest.mark.parametrize(("shots", "ties"), [(0, False), (5, False), (0, True)])
def test_accuracy_is_that_of_an_own_loop(shots, ties, model, tokenizer):
    """With ties: a model for which all words are equally likely."""
    if ties:
        model = DepthAttnForCausalLM(model.config).eval()
        model.lm_head.weight.data.zero_()
    suite = suites.load_suite(TASKS / "offline.yaml")
    suite.shots[:] = [shots]
    tasks = suites.load_tasks(suite)
    (results,) = suites.run_tasks(model, tokenizer, suite, tasks, limit=FEW).values()
    for name, (question, documents) in OFFLINE.items():
        solved = {"".join(ways[answer]) for ways, answer in map(question, documents["train"])}
        chosen, answers = [], []
        for own, (document, ways) in zip(documents["test"], requests(tasks[name]), strict=False):
            assert document == own
            expected, answer = question(own)
            shown = [context.split("\n\n") for context, _ in ways]
            assert [(parts[-1], rest) for parts, (_, rest) in zip(shown, ways, strict=True)] == expected
            for *examples, _ in shown:
                assert len(set(examples)) == len(examples) == shots and solved >= set(examples)
            chosen.append(choice(model, tokenizer, ways))
            answers.append(answer)
        right = [made == answer for made, answer in zip(chosen, answers, strict=True)]
        figures = results[name]
        assert len(chosen) == figures["questions"] == FEW and figures["num_fewshot"] == shots
        assert figures["acc"] == pytest.approx(sum(right) / FEW)
        if not ties:
            assert 0 < sum(right) < FEW and figures["acc_stderr"] == pytest.approx(stdev(right) / math.sqrt(FEW))
        if name != "last_word":  # another key, another accuracy
            other = [made == (answer + 1) % len(ways) for made, answer in zip(chosen, answers, strict=True)]
            assert sum(other) != sum(right)


def test_the_harness_itself_loads_the_folder_with_its_code_in_padded_batches(folder, model, tokenizer, monkeypatch):
    """What ``lm_eval --model hf --model_args pretrained=...,trust_remote_code=True`` does."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder.parent))
    harness = HFLM(str(folder), trust_remote_code=True, batch_size=8, device="cpu")
    assert type(harness.model).__module__.startswith("transformers_modules.")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    options = {"task_manager": manager, "num_fewshot": 5, "bootstrap_iters": 0, "limit": 8}
    found = simple_evaluate(harness, tasks=["python_brackets"], **options)
    rows = sorted(found["samples"]["python_brackets"], key=lambda row: row["doc_id"])
    task = suites.load_tasks(suites.load_suite(TASKS / "offline.yaml"))["python_brackets"]
    task.set_config("num_fewshot", 5)
    task.set_fewshot_seed(suites.FEWSHOT_SEED)
    task.build_all_requests(limit=8)
    for row, (_, ways) in zip(rows, requests(task), strict=True):
        assert list(map(tuple, row["arguments"])) == ways, "a suite asks what lm_eval asks"
        expected = [likelihood(model, tokenizer, way)[0] for way in ways]
        assert [value for value, _ in row["filtered_resps"]] == pytest.approx(expected, abs=TOLERANCE)


def test_the_papers_suite_without_its_data(cache, capsys, monkeypatch):
    """Tasks are those of the installed lm_eval, published means are of their columns, missing data is named."""
    suite = suites.load_suite(TASKS / "paper.yaml")
    assert tuple(suite.tasks) == EIGHT
    index = TaskManager(include_path=suite.include_path, include_defaults=False).task_index
    for name, task in suite.tasks.items():
        config = index[name].cfg
        assert "acc" in [metric["metric"] for metric in config["metric_list"]]
        assert config["metadata"]["version"] == task["version"]
    rows = [dict(zip(suite.published["columns"], row, strict=True)) for row in suite.published["rows"]]
    assert len(rows) == 10
    for row in rows:
        assert sum(row[name] for name in EIGHT) / 8 == pytest.approx(row[0], abs=0.00501)
    assert sum(rows[0][name] for name in EIGHT[:7]) / 7 != pytest.approx(rows[0][0], abs=0.5)  # control
    error = error_of(main, capsys, "--suite", "paper", "--model", cache / "no-model")
    for name in EIGHT:
        assert f"{name} ({index[name].cfg['dataset_path']})" in error
    assert f"{cache / 'datasets'} lacks the data of" in error and "depthattn evaluate --suite paper --download" in error
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "--download with HF_HUB_OFFLINE" in error_of(main, capsys, "--suite", "paper", "--download")


def test_the_paper_row_is_that_of_the_method_and_size():
    suite = suites.load_suite(TASKS / "paper.yaml")

    def names(parameters: int, method: str) -> list[str]:
        return [row["name"] for row in suites.comparable(suite, parameters, method)]

    assert names(1_343_774_208, "depth_attention") == ["paper: 1.5B Depth-Attention"]
    assert names(2_747_998_208 + 48 * 2 * 24 * 4 * 2048, "mhc") == ["paper: 3B mHC"]  # with its connectors
    assert names(426_000_000, "attnres") == [f"paper: {size} Attention Residuals" for size in ("1.5B", "3B")]
    some = suites.load_suite(TASKS / "paper.yaml", ["PIQA", "race"])
    (row,) = suites.comparable(some, 1_343_774_208, "vanilla")
    assert row["mean"] == {0: pytest.approx((68.61 + 33.11) / 2)} and row["acc"] == {0: {"piqa": 68.61, "race": 33.11}}
    methods = {"depthattn": True}, {"depthattn": False}, {"llama": True}, {"qwen3": None}, {"mhc": None}
    found = [suites.method_of({"model_type": k, "use_depth_attention": v}) for each in methods for k, v in each.items()]
    assert found == ["depth_attention", "vanilla", "depth_attention", "vanilla", "mhc"]


def test_the_papers_tasks_on_data_that_download_fetched(cache, folder, model, tokenizer, tmp_path, capsys, monkeypatch):
    """The true tasks on small data sets of the true layout, fetched from a Hub on this machine, read without one."""
    write_eight(tmp_path / "hub", 7)
    with Hub(tmp_path / "hub") as hub, monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.setenv("HF_HOME", str(cache))
        fetched = must_succeed(python("-m", "megatron_depthattn.cli", "evaluate", "--suite", "paper", "--download"))
    assert fetched.stdout == f"on disk: the data of {', '.join(EIGHT)}\n"
    reached: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    vanilla = tmp_path / "plain"
    export(vanilla, tokenizer, max_position_embeddings=512, use_depth_attention=False)

    files = {"--json": tmp_path / "f.json", "--markdown": tmp_path / "f.md"}
    options = [str(word) for pair in files.items() for word in pair]
    assert main(["--suite", "paper", "--model", str(folder), str(vanilla), "--limit", "5", *options]) == 0
    shown, text = capsys.readouterr().out, files["--markdown"].read_text()
    report = json.loads(files["--json"].read_text())
    assert max(map(len, shown[: shown.index("tasks of lm_eval")].splitlines())) <= 120
    ours, plain = report["models"]
    assert (ours["method"], plain["method"]) == ("depth_attention", "vanilla")
    beside = [f"paper: {size} {title}" for title in ("Depth-Attention", "vanilla") for size in ("1.5B", "3B")]
    names = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith(("| model", "| plain", "| pap"))]
    assert names == 2 * ["model", *beside[:2], "plain", *beside[2:]], "the paper's rows stand below each model's"
    assert report["tasks"]["race"]["version"] == 3.0 and report["versions"]["lm-eval"] == suites.version("lm-eval")
    assert report["tasks"]["race"]["examples_from"] == "test" and report["tasks"]["sciq"]["examples_from"] == "train"

    suite = suites.load_suite(TASKS / "paper.yaml")
    tasks = suites.load_tasks(suite)
    for shots in (0, 5):
        accs = {}
        for name, task in tasks.items():
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(suites.FEWSHOT_SEED)
            task.build_all_requests(limit=5)
            chosen = [(choice(model, tokenizer, ways), GOLD[name](document)) for document, ways in requests(task)]
            accs[name] = sum(made == answer for made, answer in chosen) / 5
            assert ours["results"][str(shots)][name]["acc"] == pytest.approx(accs[name]), (name, shots)
            contexts = [context for _, ways in requests(task) for context, _ in ways]
            assert {context.count("\n\n") for context in contexts} == {(shots + 1) * (name == "race") + shots}
        cut = {name: figures["cut"] for name, figures in ours["results"][str(shots)].items()}
        assert cut == {name: 5 * (name == "race" and shots > 0) for name in EIGHT}
        of_all, without = sum(accs.values()) / 8, sum(accs[name] for name in EIGHT[:7]) / 7
        assert ours["means"][str(shots)]["all"]["acc"] == pytest.approx(of_all)
        row = next(line for line in text.split(f"{shots}-shot")[1].splitlines() if line.startswith("| model |"))
        assert f"| {100 * of_all:.2f}±" in row and f" {accs['piqa'] * 100:.2f} " in row
        assert (f"| {100 * without:.2f}±" in row) == bool(shots) or of_all == without
    assert "| paper: 3B Depth-Attention | 7.25 | 55.69 | 62.25 | 72.36" in text
    assert "| paper: 1.5B vanilla | 8.17 | 51.65 | - |" in text
    notes = "race 3.0", "only the first 5 questions", "LAMBADA, RACE: examples are drawn", "does not say which"
    assert all(note in shown for note in (*notes, "5-shot RACE: 5 of 5"))
    assert not reached, "no network where all is on disk"


GOLD: dict[str, Callable[[dict[str, Any]], int]] = {
    "lambada_openai": lambda document: 0,
    "piqa": lambda document: document["label"],
    "winogrande": lambda document: int(document["answer"]) - 1,
    "sciq": lambda document: 3,
    "hellaswag": lambda document: int(document["label"]),
    "arc_easy": lambda document: "ABCD".index(document["answerKey"]),
    "arc_challenge": lambda document: "ABCD".index(document["answerKey"]),
    "race": lambda document: "ABCD".index(ast.literal_eval(document["problems"])[-1]["answer"]),
}
"""Which answer is right, read from the data set's own columns."""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--suite", "nowhere"], "nowhere is no suite"),
        (["--suite", "python_brackets"], "python_brackets.yaml is no suite"),
        (["--suite", "offline", "--tasks", "piqa"], "--tasks piqa: the suite"),
        (
            ["--tasks", "piqa"],
            "lacks the data of piqa (baber/piqa): fetch it where there is a network: depthattn evaluate --tasks",
        ),
        (["--limit", "3", "--data", "x"], "--limit: only with a suite, such as --suite paper"),
        (["--suite", "offline", "--limit", "0"], "--limit 0: set at least 1"),
        (["--suite", "offline", "--split", "val"], "--split: only with --data"),
        (["--suite", "offline", "--split", "val", "--max-samples", "9"], "--split, --max-samples: only with --data"),
        ([], "no --data: name a folder"),
    ],
)
def test_what_is_no_suite_is_named(options, complaint, folder, capsys):
    assert complaint in error_of(main, capsys, "--model", folder, *options)
    assert "no --model: name one" in error_of(main, capsys, "--suite", "offline")


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("shots", 5, "shots is no list"),
        ("shots", [], "shots is []: set one"),
        ("shots", [0, -1], "shots is [0, -1]: set one"),
        ("tasks", {}, "tasks needs one task or more"),
        ("mean_without", ["race"], "mean_without is no mapping"),
        ("mean_without", {5: ["rcae"]}, "mean_without has 5: ['rcae']"),
        ("mean_without", {4: ["race"]}, "mean_without has 4"),
        ("published", [1], "published needs source, sizes"),
        ("sizes", {}, "is not of one of sizes and a method"),
        ("rows", [["3B", "vanilla", *range(10)]], "has not a figure for each column"),
        ("columns", ["size", "method", "perplexity", 0, 5, "racee"], "published columns are ['size'"),
        ("task_shots", 3, "published task_shots is none of shots"),
        ("rows", [["3B", "vanilla", "7.25", *range(10)]], "has not a figure for each column"),
        ("rows", [["3B", "depthattn", *range(11)]], "is not of one of sizes and a method"),
        ("rows", [["7B", "vanilla", *range(11)]], "is not of one of sizes and a method"),
    ],
)
def test_a_suite_is_checked_before_any_model_runs(key, value, complaint, tmp_path):
    given, file = yaml.safe_load((TASKS / "paper.yaml").read_text()), tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(given))
    assert suites.load_suite(file, ["race"]).published == given["published"]  # the control
    (given["published"] if key in given["published"] else given)[key] = value
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(ValueError) as error:
        suites.load_suite(file, ["race"])
    assert str(error.value).startswith(f"{file} is no suite (") and complaint in str(error.value)


@pytest.mark.parametrize("suite", [[], ["--suite", "offline", "--limit", "1"]], ids=["data", "suite"])
def test_every_model_is_checked_before_the_first_one_runs(suite, folder, tokenizer, tmp_path, capsys):
    with MDSWriter(columns={"tokens": "ndarray:uint16:33"}, out=str(tmp_path / "data" / "val")) as out:
        out.write({"tokens": torch.zeros(33, dtype=torch.uint16).numpy()})
    export(tmp_path / "short", tokenizer, max_position_embeddings=31)
    options = ["--data", str(tmp_path / "data"), "--json", str(tmp_path / "f.json"), *suite, "--model", str(folder)]
    assert "samples of 32 tokens are longer than the model's 31" in error_of(main, capsys, *options, tmp_path / "short")
    assert not (tmp_path / "f.json").exists() and main(options) == 0 and (tmp_path / "f.json").exists()
