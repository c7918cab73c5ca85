"""Perplexity and bits per byte of exported models on prepared data; with --suite, accuracy on downstream tasks too.

Perplexity reads the whole split unless --max-samples says otherwise. A run's own held-out loss is of train.eval_batches
global batches, the first train.eval_batches x train.global_batch_size samples of the split.

--suite paper is table 1 of arXiv:2606.05014: eight tasks, zero- and five-shot, beside the paper's figures. It reads
data sets from the disk alone; --download fetches them from the Hugging Face Hub first, or only that without --model.
Below each model stand the paper's figures for its method and size.

--follow RUN_DIR scores each new checkpoint of a run beside it, also of one that has not started, and appends the
figures to RUN_DIR/evaluations.jsonl. It ends when the run has finished, or after SIGUSR2 (no checkpoint will follow),
and everything is scored; started again, it continues. It computes on the CPU unless CUDA_VISIBLE_DEVICES or --device
names a GPU: those that it sees may be the run's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_depthattn.cli.common import check, lacks_folder, new_parser, print_table, run, shipped_folder
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from megatron_depthattn.evaluation import Split
    from megatron_depthattn.follow import Figures, Measure
    from megatron_depthattn.suite import Suite

_HASHED = (".json", ".safetensors")
_FOLLOWING = ("every", "once", "keep_exports", "output", "tokenizer")
"""Options of --follow alone."""
_NOTE = (
    "note: the model was trained with data.document_mask=true, and documents see each other here: add --document-mask "
    "to score it as it was trained"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 with one line on stderr when it cannot be done, 130 on Ctrl-C; 75 when --follow was stopped."""
    return run(_evaluate, new_evaluate_parser().parse_args(arguments), RuntimeError)  # torch's, such as out of memory


def new_evaluate_parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = new_parser("evaluate", __doc__)
    add, data = parser.add_argument, "a folder written by depthattn prepare, or one of its splits"
    add("--model", type=user_path, nargs="+", metavar="HF_DIR", default=[], help="Hugging Face model folders")
    add("--data", type=user_path, metavar="MDS_DIR", help=f"{data}; may be left out with --suite")
    add("--split", metavar="NAME", help="train or val (default val)")
    add("--batch-size", metavar="auto|N", default="auto", help="samples at a time (default auto: as memory allows)")
    add("--max-samples", type=int, metavar="N", help="perplexity of the first N samples alone")
    add("--document-mask", action="store_true", help="documents do not see each other, as in data.document_mask")
    add("--suite", metavar="NAME|FILE.yaml", help="tasks to run: paper, offline (generated, for trying it), or a file")
    add("--tasks", nargs="+", metavar="NAME", help="only these tasks of the suite; without one: tasks of lm_eval")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--download", action="store_true", help="fetch the suite's data sets first")
    add_device(parser)
    add("--json", type=user_path, metavar="FILE", help="also write the figures here")
    add("--markdown", type=user_path, metavar="FILE", help="also write the suite's tables here")
    add("--follow", type=user_path, metavar="RUN_DIR", help="score each new checkpoint of this run")
    add("--every", type=int, metavar="N", help="of --follow: steps divisible by N, and the last one (default: all)")
    add("--once", action="store_true", help="of --follow: score what is there, and end")
    add("--output", type=user_path, metavar="DIR", help="of --follow: exports lie below it (default RUN_DIR/exports)")
    add("--keep-exports", action="store_true", help="of --follow: leave the Hugging Face folders there")
    add("--tokenizer", type=user_path, metavar="DIR", help="of --follow: default the one of the run's data")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where and in what type an exported model computes."""
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    dtypes = ("auto", "fp32", "bf16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the type in config.json")


def check_evaluate(given: argparse.Namespace) -> None:
    """Raise ValueError for options that do not fit together."""
    size = given.batch_size
    counts = {"max-samples": given.max_samples, "limit": given.limit, "every": given.every}
    of_suite, of_data, of_follow, of_models = (
        [f"--{name.replace('_', '-')}" for name in names if getattr(given, name)]
        for names in (
            *(("limit", "download", "markdown"), ("split", "max_samples", "document_mask")),
            *(_FOLLOWING, ("model", "download", "json", "markdown")),
        )
    )
    follows, has_suite = bool(given.follow), bool(given.suite or given.tasks)
    check(
        (size != "auto" and not (size.isdecimal() and int(size)), f"--batch-size {size}: set at least 1, or auto"),
        *((n is not None and n < 1, f"--{name} {n}: set at least 1, or leave it out") for name, n in counts.items()),
        lacks_folder("--json", given.json),
        lacks_folder("--markdown", given.markdown),
        (not has_suite and bool(of_suite), f"{', '.join(of_suite)}: only with a suite, such as --suite paper"),
        (not follows and bool(of_follow), f"{', '.join(of_follow)}: only with --follow, the run to score"),
        (follows and bool(of_models), f"{', '.join(of_models)}: not with --follow, which scores a run's checkpoints"),
        (
            not follows and not given.model and not given.download,
            "no --model: name one or more Hugging Face model folders",
        ),
        (
            not has_suite and not given.data,
            "no --data: name a folder written by depthattn prepare, or a --suite" + " or --tasks" * follows,
        ),
        (not given.data and bool(of_data), f"{', '.join(of_data)}: only with --data, the data to score"),
        (
            follows and given.once and not (given.follow / "config.yaml").is_file(),
            f"--follow {given.follow} --once: there is no run (no config.yaml); without --once it is waited for",
        ),
    )


def _evaluate(given: argparse.Namespace) -> int | None:
    check_evaluate(given)
    given.batch_size = None if given.batch_size == "auto" else int(given.batch_size)
    if given.follow:
        return _follow(given)
    if given.suite or given.tasks:
        _evaluate_suite(given)
        return None
    from megatron_depthattn.evaluation import open_split
    from megatron_depthattn.hf.loading import pick_device

    device = pick_device(given.device)
    with open_split(given.data, given.split) as split:
        _check_models(given.model, split)
        found = [_measure(folder, split, device, given) for folder in given.model]
    if given.json is not None:
        given.json.write_text(json.dumps(found if len(found) > 1 else found[0], indent=2) + "\n")
    return None


def _check_models(folders: Sequence[Path], split: Split | None) -> None:
    """Raise for any model that is none or does not fit the split, before the first takes its hours."""
    from megatron_depthattn.evaluation import check_fit
    from megatron_depthattn.hf.loading import load_causal_config

    for folder in folders:
        config = load_causal_config(folder)
        if split is not None:
            check_fit(split, config, folder)


def _load(folder: Path, device: torch.device, given: argparse.Namespace) -> PreTrainedModel:
    from megatron_depthattn.hf.loading import DTYPES, load_causal_lm

    return load_causal_lm(folder, DTYPES[given.dtype]).to(device)


def _measure(folder: Path, split: Split, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """Print and return a model's figures on the split."""
    figures = _perplexity(_load(folder, device, given), folder, split, given)
    print(f"{folder} on {given.data}, split {split.name}, in {figures['dtype']} on {device}")
    length = split.dataset.sequence_length
    _show(figures, figures["seconds"], f"of {len(split.dataset):,} in the split, {length} tokens each")
    return figures


def _perplexity(model: PreTrainedModel, folder: Path, split: Split, given: argparse.Namespace) -> dict[str, Any]:
    from megatron_depthattn.evaluation import auto_batch_size, evaluate, find_tokenizer
    from megatron_depthattn.hf.model_config import TRAINED_WITH_DOCUMENT_MASK

    if getattr(model.config, TRAINED_WITH_DOCUMENT_MASK, False) and not (given.document_mask or "noted" in given):
        given.noted = True  # once for all checkpoints of a run
        print(_NOTE, file=sys.stderr)
    length = split.dataset.sequence_length
    batch = given.batch_size or auto_batch_size(model, length)
    start = time.perf_counter()
    result = evaluate(model, split, find_tokenizer(split, folder), batch, given.max_samples, given.document_mask)
    about = {"model": str(folder), "data": str(given.data), "split": split.name, "sequence_length": length}
    about |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "batch_size": batch}
    return about | {"seconds": time.perf_counter() - start} | result


def _load_suite(given: argparse.Namespace) -> tuple[Suite, dict[str, Any], Path | None]:
    """The suite, its tasks as the harness's objects, and its file; --tasks alone: lm_eval's own, zero-shot."""
    check((find_spec("lm_eval") is None, "--suite and --tasks need lm-eval: pip install 'megatron-depthattn[eval]'"))
    from megatron_depthattn import suite as suites

    shipped = shipped_folder("configs") / "lm_eval"
    named = ["--tasks", *given.tasks] if given.tasks else []
    file: Path | None = None
    if given.suite:
        file = shipped / f"{given.suite}.yaml"
        file = file if file.is_file() else user_path(given.suite)
        suite, named = suites.load_suite(file, given.tasks), ["--suite", given.suite, *named]
    else:
        suite = suites.Suite(title="tasks", tasks={name: {"column": name} for name in given.tasks}, shots=[0])
        for known in (shipped / "offline.yaml", shipped / "paper.yaml"):  # all of lm_eval takes seconds to look through
            with suppress(ValueError):
                found = suites.load_suite(known, given.tasks)
                suite = replace(suite, tasks=found.tasks, include_path=found.include_path)
    fetch = shlex.join(["depthattn", "evaluate", *named, "--download"])
    return suite, suites.load_tasks(suite, download=given.download, fetch=fetch), file


def _evaluate_suite(given: argparse.Namespace) -> None:
    suite, tasks, file = _load_suite(given)
    from megatron_depthattn import suite as suites
    from megatron_depthattn.data.tokenizer import file_sha256
    from megatron_depthattn.evaluation import open_split
    from megatron_depthattn.hf.loading import pick_device
    from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

    if not given.model:
        print(f"on disk: the data of {', '.join(tasks)}")
        return
    device, about = pick_device(given.device), suites.about_tasks(suite, tasks)
    found: list[dict[str, Any]] = []
    report: dict[str, Any] = {"suite": str(file), "suite_sha256": file_sha256(file)} if file else {}
    report |= {"versions": suites.versions()}
    report |= {"tasks": about, "limit": given.limit, "fewshot_seed": suites.FEWSHOT_SEED, "models": found}
    with open_split(given.data, given.split) if given.data else nullcontext() as split:
        _check_models(given.model, split)
        for folder in given.model:
            load_fast_tokenizer(folder)
        for folder in given.model:
            found.append(_measure_tasks(folder, suite, tasks, split, device, given))
            if given.json is not None:  # after each, for they take hours
                given.json.write_text(json.dumps(report, indent=2) + "\n")
    tables, notes = suites.tables(suite, found), suites.notes(suite, about, found, given.limit)
    for caption, columns, rows in tables:
        print(caption)
        print_table(columns, rows, width=120, box=None)
    print("\n".join(notes))
    if given.markdown is not None:
        given.markdown.write_text(suites.markdown(tables, notes))


def _measure_tasks(
    folder: Path,
    suite: Suite,
    tasks: dict[str, Any],
    split: Split | None,
    device: torch.device,
    given: argparse.Namespace,
) -> dict[str, Any]:
    """All about one model: what it is, its figures on the split and on the tasks, the published ones beside them."""
    from megatron_depthattn import suite as suites
    from megatron_depthattn.data.tokenizer import file_sha256
    from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

    model = _load(folder, device, given)
    data = _perplexity(model, folder, split, given) if split is not None else None
    results = suites.run_tasks(model, load_fast_tokenizer(folder), suite, tasks, given.batch_size, given.limit)
    names = [each.absolute().name for each in given.model]
    parameters, method = sum(p.numel() for p in model.parameters()), suites.method_of(model.config.to_dict())
    return {
        "name": folder.absolute().name if names.count(folder.absolute().name) == 1 else str(folder),
        "path": str(folder.absolute()),
        "sha256": {each.name: file_sha256(each) for each in sorted(folder.iterdir()) if each.suffix in _HASHED},
        "method": method,
        "parameters": parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "data": data,
        "perplexity": data and data["perplexity"],
        "results": results,
        "means": suites.means(suite, results),
        "published": suites.comparable(suite, parameters, method),
    }


# ---- --follow


def _follow(given: argparse.Namespace) -> int:
    """Score a run's checkpoints; 0, or 75 after a signal: the same command continues."""
    from megatron_depthattn.evaluation import open_split
    from megatron_depthattn.follow import Follower, Stopped, stopped_by_signals
    from megatron_depthattn.hf.loading import pick_device
    from megatron_depthattn.launch import EXIT_REQUEUE
    from megatron_depthattn.parallel.launch_env import variable

    try:
        with stopped_by_signals() as no_more, ExitStack() as stack:
            if given.once:
                no_more.set()
            measures: list[Measure] = []
            if given.data:
                measures.append(_data_measure(stack.enter_context(open_split(given.data, given.split)), given))
            if given.suite or given.tasks:
                measures += _task_measures(given)
            is_cpu = given.device == "auto" and not variable("CUDA_VISIBLE_DEVICES")
            device = pick_device("cpu" if is_cpu else given.device)
            Follower(
                given.follow,
                measures,
                lambda folder: _load(folder, device, given),
                output=given.output,
                every=given.every or 1,
                keep_exports=given.keep_exports,
                tokenizer=given.tokenizer,
            ).run(no_more)
    except Stopped as stop:
        print(f"stopped by {stop}: the same command continues", file=sys.stderr)
        return EXIT_REQUEUE
    return 0


def _data_measure(split: Split, given: argparse.Namespace) -> Measure:
    from megatron_depthattn.follow import Figures, Measure

    def score(model: PreTrainedModel, folder: Path) -> Figures:
        _check_models([folder], split)
        found = _perplexity(model, folder, split, given)
        values = {name: found[name] for name in ("loss", "perplexity", "bits_per_byte")}
        return Figures(values, found["samples"], {"tokens": found["tokens"]})

    what = {"task": split.name, "data": str(given.data.absolute()), "limit": given.max_samples}
    name = f"{split.tokenizer_folder.parent.name}/{split.name}"
    if given.document_mask:
        what, name = what | {"document_mask": True}, f"{name}/documents"
    return Measure(what=what, name=name, score=score)


def _task_measures(given: argparse.Namespace) -> list[Measure]:
    """One for each task and number of examples: what one has scored is not lost with the next."""
    suite, tasks, _ = _load_suite(given)
    from megatron_depthattn import suite as suites
    from megatron_depthattn.follow import Figures, Measure
    from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

    about = suites.about_tasks(suite, tasks)

    def measure(name: str, shots: int) -> Measure:
        def score(model: PreTrainedModel, folder: Path) -> Figures:
            alone, tokenizer = replace(suite, shots=[shots]), load_fast_tokenizer(folder)
            found = suites.run_tasks(model, tokenizer, alone, {name: tasks[name]}, given.batch_size, given.limit)
            figures = found[shots][name]
            values = {key: figures[key] for key in ("acc", "acc_stderr")}
            return Figures(values, figures["questions"], {"version": about[name]["version"], "cut": figures["cut"]})

        what = {"task": name, "shots": shots, "limit": given.limit}
        return Measure(what=what, name=f"{name}/{shots}-shot", score=score)

    return [measure(name, shots) for shots in suite.shots for name in tasks]


def _show(result: dict[str, Any], seconds: float, of: str) -> None:
    def shown(name: str, form: str) -> str:
        return "unknown" if result[name] is None else format(result[name], form)

    rows = [
        ("samples", shown("samples", ","), of),
        ("tokens", shown("tokens", ","), f"predicted, {result['tokens'] / seconds:,.0f} a second"),
        ("bytes", shown("bytes", ",.0f"), ""),
        ("loss", shown("loss", ".6f"), "nats a token" + ", documents by themselves" * result["document_mask"]),
        ("perplexity", shown("perplexity", ",.4f"), "a token"),
        ("bits per byte", shown("bits_per_byte", ".6f"), ""),
    ]
    print_table(("", "", ""), rows, show_header=False, box=None)
    print("a run's own held-out loss is of its first train.eval_batches x train.global_batch_size samples alone")
    print(f"bytes: {result['bytes_source']}")
