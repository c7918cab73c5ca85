"""Suites of downstream tasks, run by EleutherAI's lm-evaluation-harness on exported models and shown beside a paper's.

A suite is a YAML file: its tasks by their names in lm_eval, the numbers of examples to show before each question, and
the published figures to compare with, if any. ``configs/lm_eval/paper.yaml`` is table 1 of arXiv:2606.05014.

The harness and `datasets` try the Hub before their cache, for minutes where there is no network. Here they read what
is on disk, and only `load_tasks` with ``download`` reaches for the Hub: both run the same code, so what one fetches is
what the other finds.
"""

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_depthattn.estimate.paper import TITLES as OF_METHODS
from megatron_depthattn.evaluation import auto_batch_size
from megatron_depthattn.hf.quietly import one_line

METRIC = "acc"
FEWSHOT_SEED = 1234  # the harness's own
SAME_SIZE = 0.03  # parameters may differ by so much from a published size's: a cross-layer method adds up to 1.1 %
TITLES = {"vanilla": "vanilla"} | OF_METHODS
VERSIONS = ("megatron-depthattn", "lm-eval", "datasets", "transformers", "torch")
MISSING = "-"
_OTHER_COLUMNS = ("size", "method", "perplexity")
_PUBLISHED = ("source", "sizes", "task_shots", "columns", "rows")

Table = tuple[str, list[str], list[list[str]]]
"""A caption, the columns and the rows."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite as its file gives it."""

    title: str
    tasks: dict[str, dict[str, Any]]
    """By name in lm_eval: ``column``, the heading, and ``version``, of the task that the suite was written for."""
    shots: list[int]
    """Numbers of examples before a question; one table each."""
    mean_without: dict[int, list[str]] = field(default_factory=dict)
    """By number of examples: the tasks that a second mean leaves out."""
    include_path: list[Path] = field(default_factory=list)
    published: dict[str, Any] | None = None
    """``source``, ``note``, ``sizes`` (parameters by name), ``columns``, ``task_shots`` and ``rows``."""

    def left_out(self, shots: int) -> list[str]:
        """The tasks that the second mean leaves out; empty: there is none."""
        return [name for name in self.mean_without.get(shots, ()) if name in self.tasks]


def load_suite(file: Path, only: Sequence[str] | None = None) -> Suite:
    """Read a suite.

    Args:
        only: the tasks to keep, by name or heading; None: all.

    Raises:
        ValueError: the file is no suite, or has no such task.
    """
    from lm_eval import tasks

    try:
        given = yaml.safe_load(file.read_text())
        suite = Suite(**given)
        if fault := next(_faults(suite), None):
            raise ValueError(fault)
        headings = {name: task["column"] for name, task in suite.tasks.items()}
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{file} is no suite ({one_line(error)}): take configs/lm_eval/paper.yaml as a model"
        ) from error
    if unknown := set(only or ()) - headings.keys() - set(headings.values()):
        known = ", ".join(headings)
        raise ValueError(f"--tasks {' '.join(sorted(unknown))}: the suite {file} has {known}")
    kept = {name: task for name, task in suite.tasks.items() if not only or {name, headings[name]} & set(only)}
    places = [(file.parent / folder, Path(tasks.__file__).parent / folder) for folder in given.get("include_path", ())]
    paths = [own if own.is_dir() else theirs for own, theirs in places]
    return Suite(**given | {"tasks": kept, "include_path": paths})


def _faults(suite: Suite) -> Iterator[str]:
    """What would fail, or be left out in silence, only once the models have run."""
    for name, kind in (("tasks", dict), ("shots", list), ("mean_without", dict), ("include_path", list)):
        if not isinstance(getattr(suite, name), kind):
            yield f"{name} is no {'mapping' if kind is dict else 'list'}"
    if not suite.tasks or not all(isinstance(task.get("column"), str) for task in suite.tasks.values()):
        yield "tasks needs one task or more, each with a text for its column"
    if not suite.shots or not all(type(shots) is int and shots >= 0 for shots in suite.shots):
        yield f"shots is {suite.shots}: set one number or more, each 0 or more"
    for shots, names in suite.mean_without.items():
        if shots not in suite.shots or not names or not set(names) <= suite.tasks.keys():
            yield f"mean_without has {shots}: {names}, which is not one of shots with a list of its tasks"
    if suite.published is None:
        return
    if not isinstance(suite.published, dict) or not suite.published.keys() >= set(_PUBLISHED):
        yield f"published needs {', '.join(_PUBLISHED)}"
    sizes, at, columns, rows = (suite.published[name] for name in _PUBLISHED[1:])
    if not set(_OTHER_COLUMNS) <= set(columns) <= {*_OTHER_COLUMNS, *suite.shots, *suite.tasks}:
        yield f"published columns are {columns}: give {', '.join(_OTHER_COLUMNS)}, and of shots and tasks what there is"
    if at not in suite.shots or not all(isinstance(count, int) for count in sizes.values()):
        yield "published task_shots is none of shots, or sizes are no numbers of parameters"
    for row in rows:
        named = dict(zip(columns, row, strict=False))
        figures = [value for name, value in named.items() if name not in ("size", "method")]
        if len(row) != len(columns) or not all(isinstance(value, int | float | None) for value in figures):
            yield f"published row {row} has not a figure for each column"
        if named["size"] not in sizes or named["method"] not in TITLES:
            yield f"published row {row} is not of one of sizes and a method, {', '.join(TITLES)}"


def load_tasks(suite: Suite, *, download: bool = False, fetch: str = "--download") -> dict[str, Any]:
    """The suite's tasks by name, as the harness's objects, with their data.

    Args:
        download: fetch what is not on disk from the Hugging Face Hub.
        fetch: the command that does that, for the error.

    Raises:
        ValueError: lm_eval has no such task or it has no accuracy, or data is missing: all of it is named.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    _quiet()
    if download and datasets.config.HF_HUB_OFFLINE:
        raise ValueError("--download with HF_HUB_OFFLINE or HF_DATASETS_OFFLINE set: unset them")
    online, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, not download
    try:
        manager = TaskManager(include_path=suite.include_path, include_defaults=not suite.include_path)
        if unknown := suite.tasks.keys() - set(manager.all_subtasks):
            raise ValueError(f"lm_eval {version('lm-eval')} has no task {', '.join(sorted(unknown))}")
        found: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for name in suite.tasks:
            dataset = manager.task_index[name].cfg.get("dataset_path")
            try:
                found[name] = manager.load(name)["tasks"][name]
            except (OSError, ValueError) as error:  # of a data set that is not there, or not whole
                if dataset is None:
                    raise
                missing[name] = f"{name} ({dataset})" + (f": {one_line(error)}" if download else "")
    finally:
        datasets.config.HF_HUB_OFFLINE = online
    if missing and download:
        raise ValueError(f"could not fetch {'; '.join(missing.values())}")
    if missing:
        raise ValueError(
            f"{datasets.config.HF_DATASETS_CACHE} lacks the data of {', '.join(missing.values())}: fetch it where "
            f"there is a network: {fetch} (HF_HOME or HF_DATASETS_CACHE names the place)"
        )
    for name, task in found.items():
        if METRIC not in task.aggregation():
            raise ValueError(f"task {name} has no metric {METRIC}, only {', '.join(task.aggregation())}")
    return found


def about_tasks(suite: Suite, tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each task is: version, data, and the split that examples are drawn from."""
    about = {}
    for name, task in tasks.items():
        config = task.config
        examples = (task.fewshot_cfg.split, config.training_split, config.validation_split, config.test_split)
        about[name] = {
            "column": suite.tasks[name]["column"],
            "version": task.VERSION,
            "metric": METRIC,
            "dataset": config.dataset_path and "/".join(filter(None, (config.dataset_path, config.dataset_name))),
            "rows": {split: len(rows) for split, rows in task.dataset.items()},
            "questions_from": config.test_split or config.validation_split,
            "examples_from": next(filter(None, examples)),
        }
    return about


def versions() -> dict[str, str]:
    """The versions that the figures depend on."""
    return {name: version(name) for name in VERSIONS}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    tasks: Mapping[str, Any],
    batch_size: int | None = None,
    limit: int | None = None,
) -> dict[int, dict[str, dict[str, Any]]]:
    """Accuracy by number of examples and task.

    The log-softmax is taken in fp32, whatever the model computes in.

    Args:
        model: in evaluation mode, on the device to use.
        batch_size: None: on a GPU what the harness finds to fit, elsewhere `auto_batch_size`.
        limit: only the first questions of each task.

    Returns:
        For each: ``acc`` and its standard error ``acc_stderr`` (a share of 1), ``questions``, ``num_fewshot``, and
        ``cut``, the questions that lost their beginning, for they are longer than the model's positions.
    """
    with redirect_stdout(sys.stderr):  # DeepSpeed, which accelerate imports, has a word on accelerators
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

    _quiet()
    automatic = "auto" if model.device.type == "cuda" else auto_batch_size(model, model.config.max_position_embeddings)
    options = {"batch_size": batch_size or automatic, "softmax_dtype": torch.float32}
    harness = HFLM(pretrained=model, tokenizer=tokenizer, **options)
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for shots in suite.shots:
        for task in tasks.values():
            task.set_config("num_fewshot", shots)
            task.set_fewshot_seed(FEWSHOT_SEED)
        with redirect_stdout(sys.stderr):  # where it reports its batch sizes
            found = evaluate(harness, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=False)
        results[shots] = {}
        for name, task in tasks.items():
            acc, questions = found["results"][name][f"{METRIC},none"], found["n-samples"][name]["effective"]
            results[shots][name] = {
                "acc": acc,
                "acc_stderr": math.sqrt(acc * (1 - acc) / (questions - 1)) if questions > 1 else None,
                "questions": questions,
                "num_fewshot": shots,
                "cut": _count_cut(task, tokenizer, harness.max_length),
            }
    return results


def _count_cut(task: Any, tokenizer: PreTrainedTokenizerBase, positions: int) -> int:
    """The questions that are longer than the model's positions, with examples and the longest answer."""
    longest: dict[int, str] = {}
    for request in task.instances:
        longest[request.doc_id] = max(longest.get(request.doc_id, ""), "".join(request.args), key=len)
    encoded = tokenizer(list(longest.values()), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(len(tokens) > positions + 1 for tokens in encoded)  # nothing follows the last one


def means(suite: Suite, results: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """By number of examples: the mean of ``all`` tasks and, where the suite asks for it, the mean ``without`` some."""
    made: dict[int, dict[str, Any]] = {}
    for shots in suite.shots:
        made[shots] = {"all": _mean(results[shots], ())}
        if left_out := suite.left_out(shots):
            made[shots]["without"] = _mean(results[shots], left_out)
    return made


def _mean(results: Mapping[str, Mapping[str, Any]], left_out: Sequence[str]) -> dict[str, Any] | None:
    parts = [figures for name, figures in results.items() if name not in left_out]
    if not parts:
        return None
    errors = [figures["acc_stderr"] for figures in parts]
    error = None if None in errors else math.hypot(*errors) / len(parts)
    acc = sum(figures["acc"] for figures in parts) / len(parts)
    return {"acc": acc, "acc_stderr": error, "tasks": len(parts), "left_out": list(left_out)}


def method_of(config: Mapping[str, Any]) -> str:
    """The method of a config.json, as `model.method` names it, or vanilla."""
    kind = str(config.get("model_type"))
    if kind in TITLES:
        return kind
    return "depth_attention" if config.get("use_depth_attention") else "vanilla"


def comparable(suite: Suite, parameters: int, method: str) -> list[dict[str, Any]]:
    """Published figures of a model's method, at its size, or at every size where none is like it.

    Returns:
        For each: ``name``, ``perplexity``, ``mean`` by number of examples, ``acc`` by that and by task; in per cent.
    """
    if (published := suite.published) is None:
        return []
    sizes, at = published["sizes"], published["task_shots"]
    near = {size for size, count in sizes.items() if abs(parameters - count) <= SAME_SIZE * count} or set(sizes)
    rows = []
    for row in (dict(zip(published["columns"], row, strict=True)) for row in published["rows"]):
        if row["method"] != method or row["size"] not in near:
            continue
        accs = {name: value for name, value in row.items() if name not in (*_OTHER_COLUMNS, *suite.shots)}
        means = {shots: row.get(shots) for shots in suite.shots}
        if not accs.keys() <= suite.tasks.keys():  # only some tasks are asked for
            accs = {name: value for name, value in accs.items() if name in suite.tasks}
            means = {at: sum(accs.values()) / len(accs)} if accs.keys() == suite.tasks.keys() else {}
        name = f"{published['source']}: {row['size']} {TITLES[method]}"
        rows.append({"name": name, "perplexity": row["perplexity"], "mean": means, "acc": {at: accs}})
    return rows


def tables(suite: Suite, models: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table for each number of examples, in per cent: below each model the published rows of its method and size.

    Args:
        models: ``name``, ``perplexity`` (may be None), and ``results``, ``means`` and ``published`` as made here.
    """
    made = []
    for shots in suite.shots:
        without = suite.left_out(shots)
        columns = ["", "PPL", f"mean of {len(suite.tasks)}"]
        columns += ["without " + ", ".join(suite.tasks[name]["column"] for name in without)] if without else []
        columns += [task["column"] for task in suite.tasks.values()]
        rows = []
        for model in models:
            results, of = model["results"][shots], model["means"][shots]
            means = [_percent(of["all"]), *([_percent(of["without"])] if without else [])]
            accs = [f"{100 * results[name]['acc']:.2f}" for name in suite.tasks]
            rows.append([model["name"], _shown(model["perplexity"]), *means, *accs])
            for row in model["published"]:
                means = [_shown(row["mean"].get(shots)), *([MISSING] if without else [])]
                accs = [_shown(row["acc"].get(shots, {}).get(name)) for name in suite.tasks]
                rows.append([row["name"], _shown(row["perplexity"]), *means, *accs])
        made.append((f"{suite.title}: {shots}-shot accuracy, per cent", columns, rows))
    return made


def _shown(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _percent(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return MISSING
    error = figures["acc_stderr"]
    return f"{100 * figures['acc']:.2f}" + (f"±{100 * error:.2f}" if error is not None else "")


def notes(
    suite: Suite, about: Mapping[str, Mapping[str, Any]], models: Sequence[Mapping[str, Any]], limit: int | None
) -> list[str]:
    """What a reader of the tables must know."""
    named = ", ".join(f"{name} {task['version']}" for name, task in about.items())
    lines = [f"tasks of lm_eval {version('lm-eval')}: {named}; metric {METRIC}; ± is one standard error"]
    lines += [f"only the first {limit} questions of each task: not comparable"] if limit is not None else []
    for name, task in about.items():
        if str(task["version"]) != str(suite.tasks[name].get("version", task["version"])):
            lines.append(
                f"{name} is version {task['version']}, the suite was written for {suite.tasks[name]['version']}"
            )
    lines += [suite.published["note"]] if suite.published and "note" in suite.published else []
    own = [task["column"] for task in about.values() if task["examples_from"] == task["questions_from"]]
    if own and any(suite.shots):
        lines.append(f"{', '.join(own)}: examples are drawn from the split of the questions, for there is no other")
    for model in models:
        cut = [(shots, name, f) for shots, by in model["results"].items() for name, f in by.items() if f["cut"]]
        lines += [
            f"{model['name']}, {shots}-shot {suite.tasks[name]['column']}: {figures['cut']} of {figures['questions']} "
            "prompts lost their beginning and examples with it: longer than the model's positions"
            for shots, name, figures in cut
        ]
    return lines


def markdown(made: Iterable[Table], remarks: Iterable[str]) -> str:
    """The tables and notes as Markdown."""
    lines: list[str] = []
    for caption, columns, rows in made:
        lines += [f"**{caption}**", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join([*lines, *(f"- {remark}" for remark in remarks)]) + "\n"


def _quiet() -> None:
    """Silence for warnings that a user can do nothing about, such as which copy of a data set was found."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
