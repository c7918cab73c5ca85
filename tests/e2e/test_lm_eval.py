"""lm-evaluation-harness on an exported folder, offline, with the task that the repository brings along."""

import ast
import json
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from megatron_depthattn.data.tokenizer import train_bpe
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from tests.e2e.commands import REPOSITORY, must_succeed, run
from tests.e2e.exported import export

TASKS = REPOSITORY / "configs/lm_eval"
TASK = "python_brackets"
FEW = 40  # documents that are scored
TOLERANCE = 1e-4  # of a log-likelihood in nats


def task_module() -> ModuleType:
    spec = util.spec_from_file_location("brackets_utils", TASKS / "utils.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCUMENTS = task_module().documents()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe((document["text"].encode() for document in DOCUMENTS), 320)


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model"
    export(path, tokenizer)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> DepthAttnForCausalLM:
    return DepthAttnForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def expected(model: DepthAttnForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[list[float]]:
    """Log-likelihood of every choice, one sequence at a time, without padding or cache."""
    scores = []
    for document in DOCUMENTS[:FEW]:
        context = tokenizer.encode(document["text"], add_special_tokens=False)
        scores.append([])
        for choice in document["choices"]:
            whole = tokenizer.encode(document["text"] + choice, add_special_tokens=False)
            assert whole[: len(context)] == context
            with torch.no_grad():
                chances = model(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
            scores[-1].append(sum(chances[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    return scores


def accuracy(scores: list[list[float]]) -> float:
    right = sum(max(range(4), key=s.__getitem__) == d["answer"] for s, d in zip(scores, DOCUMENTS, strict=False))
    return right / len(scores)


def far(scores: list[list[float]], expected: list[list[float]]) -> float:
    return max(abs(a - b) for one, other in zip(scores, expected, strict=True) for a, b in zip(one, other, strict=True))


def test_the_documents_have_one_answer_each():
    assert len({document["text"] for document in DOCUMENTS}) == len(DOCUMENTS) == 200
    for document in DOCUMENTS:
        assert len(set(document["choices"])) == 4 and len(set(map(len, document["choices"]))) == 1
        for index, choice in enumerate(document["choices"]):
            if index == document["answer"]:
                ast.parse(document["text"] + choice)
            else:
                with pytest.raises(SyntaxError):
                    ast.parse(document["text"] + choice)
    assert {document["answer"] for document in DOCUMENTS} == {0, 1, 2, 3}
    assert task_module().documents() == DOCUMENTS


def test_the_command(folder, expected, tmp_path, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    command = [Path(sys.executable).with_name("lm_eval"), "--model", "hf"]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", "--tasks", TASK]
    command += ["--include_path", "configs/lm_eval", "--device", "cpu", "--limit", str(FEW)]
    result = must_succeed(run([*command, "--output_path", tmp_path / "out", "--log_samples"], seconds=180))
    assert f"|{TASK}|" in result.stdout
    (figures,) = (tmp_path / "out").rglob("results_*.json")
    reported = json.loads(figures.read_text())["results"][TASK]["acc,none"]
    assert reported == pytest.approx(accuracy(expected))
    (samples,) = (tmp_path / "out").rglob(f"samples_{TASK}_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["doc"]["text"] for row in rows] == [document["text"] for document in DOCUMENTS[:FEW]]
    assert far([[float(likelihood) for likelihood, _ in row["filtered_resps"]] for row in rows], expected) < TOLERANCE


def test_padding_and_batches_change_nothing(model, tokenizer, expected):
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(model=harness, tasks=[TASK], task_manager=manager, bootstrap_iters=0, limit=FEW)
    assert found["results"][TASK]["acc,none"] == pytest.approx(accuracy(expected))
    rows = sorted(found["samples"][TASK], key=lambda row: row["doc_id"])
    assert far([[likelihood for likelihood, _ in row["filtered_resps"]] for row in rows], expected) < TOLERANCE


def test_generation_in_left_padded_batches(model, tokenizer):
    """The harness pads prompts of unequal length on the left."""
    texts = sorted((document["text"] for document in DOCUMENTS), key=len)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    made = []
    for batch_size in (1, 4):
        requests = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts[::50])]
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        made.append(harness.generate_until(requests, disable_tqdm=True))
    assert made[0] == made[1] and len(set(made[0])) == 4
