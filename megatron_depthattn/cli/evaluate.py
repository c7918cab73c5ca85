"""Perplexity and bits per byte of exported models on prepared data; with --suite, accuracy on downstream tasks too.

Perplexity reads the whole split unless --max-samples says otherwise. A run's own held-out loss is of train.eval_batches
global batches, the first train.eval_batches x train.global_batch_size samples of the split.

--suite paper is table 1 of arXiv:2606.05014: eight tasks, zero- and five-shot, beside the paper's figures. It reads
data sets from the disk alone; --download fetches them from the Hugging Face Hub first, or only that without --model.
Below each model stand the paper's figures for its method and size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_depthattn.cli.common import check, lacks_folder, new_parser, print_table, run, shipped_folder
from megatron_depthattn.paths import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from megatron_depthattn.evaluation import Split
    from megatron_depthattn.suite import Suite

_HASHED = (".json", ".safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 with one line on stderr when it cannot be done, 130 on Ctrl-C."""
    parser = new_parser("evaluate", __doc__)
    add, data = parser.add_argument, "a folder written by depthattn prepare, or one of its splits"
    add("--model", type=user_path, nargs="+", metavar="HF_DIR", default=[], help="Hugging Face model folders")
    add("--data", type=user_path, metavar="MDS_DIR", help=f"{data}; may be left out with --suite")
    add("--split", metavar="NAME", help="train or val (default val)")
    add("--batch-size", metavar="auto|N", default="auto", help="samples at a time (default auto: as memory allows)")
    add("--max-samples", type=int, metavar="N", help="perplexity of the first N samples alone")
    add("--suite", metavar="NAME|FILE.yaml", help="tasks to run: paper, offline (generated, for trying it), or a file")
    add("--tasks", nargs="+", metavar="NAME", help="only these tasks of the suite")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--download", action="store_true", help="fetch the suite's data sets first")
    add_device(parser)
    add("--json", type=user_path, metavar="FILE", help="also write the figures here")
    add("--markdown", type=user_path, metavar="FILE", help="also write the suite's tables here")
    return run(_evaluate, parser.parse_args(arguments), RuntimeError)  # torch's, such as out of memory


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where and in what type an exported model computes."""
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    dtypes = ("auto", "fp32", "bf16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the type in config.json")


def _evaluate(given: argparse.Namespace) -> None:
    size = given.batch_size
    counts = {"max-samples": given.max_samples, "limit": given.limit}
    of_suite, of_data = (
        [f"--{name.replace('_', '-')}" for name in names if getattr(given, name)]
        for names in (("tasks", "limit", "download", "markdown"), ("split", "max_samples"))
    )
    check(
        (size != "auto" and not (size.isdecimal() and int(size)), f"--batch-size {size}: set at least 1, or auto"),
        *((n is not None and n < 1, f"--{name} {n}: set at least 1, or leave it out") for name, n in counts.items()),
        lacks_folder("--json", given.json),
        lacks_folder("--markdown", given.markdown),
        (not given.suite and bool(of_suite), f"{', '.join(of_suite)}: only with a suite, such as --suite paper"),
        (not given.model and not given.download, "no --model: name one or more Hugging Face model folders"),
        (not given.suite and not given.data, "no --data: name a folder written by depthattn prepare, or a --suite"),
        (not given.data and bool(of_data), f"{', '.join(of_data)}: only with --data, the data to score"),
    )
    given.batch_size = None if size == "auto" else int(size)
    if given.suite:
        _evaluate_suite(given)
        return
    from megatron_depthattn.evaluation import open_split
    from megatron_depthattn.hf.loading import pick_device

    device = pick_device(given.device)
    with open_split(given.data, given.split) as split:
        _check_models(given.model, split)
        found = [_measure(folder, split, device, given) for folder in given.model]
    if given.json is not None:
        given.json.write_text(json.dumps(found if len(found) > 1 else found[0], indent=2) + "\n")


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

    length = split.dataset.sequence_length
    batch = given.batch_size or auto_batch_size(model, length)
    start = time.perf_counter()
    result = evaluate(model, split, find_tokenizer(split, folder), batch, given.max_samples)
    about = {"model": str(folder), "data": str(given.data), "split": split.name, "sequence_length": length}
    about |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device), "batch_size": batch}
    return about | {"seconds": time.perf_counter() - start} | result


def _evaluate_suite(given: argparse.Namespace) -> None:
    check((find_spec("lm_eval") is None, "--suite needs lm-eval: pip install 'megatron-depthattn[eval]'"))
    from megatron_depthattn import suite as suites
    from megatron_depthattn.evaluation import open_split
    from megatron_depthattn.hf.loading import pick_device
    from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

    shipped = shipped_folder("configs") / "lm_eval" / f"{given.suite}.yaml"
    file = shipped if shipped.is_file() else user_path(given.suite)
    suite = suites.load_suite(file, given.tasks)
    fetch = ["depthattn", "evaluate", "--suite", given.suite, *(("--tasks", *given.tasks) if given.tasks else ())]
    tasks = suites.load_tasks(suite, download=given.download, fetch=shlex.join([*fetch, "--download"]))
    if not given.model:
        print(f"on disk: the data of {', '.join(tasks)}")
        return
    device, about = pick_device(given.device), suites.about_tasks(suite, tasks)
    found: list[dict[str, Any]] = []
    report: dict[str, Any] = {"suite": str(file), "suite_sha256": _sha256(file), "versions": suites.versions()}
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
    from megatron_depthattn.hf.tokenizer import load_fast_tokenizer

    model = _load(folder, device, given)
    data = _perplexity(model, folder, split, given) if split is not None else None
    results = suites.run_tasks(model, load_fast_tokenizer(folder), suite, tasks, given.batch_size, given.limit)
    names = [each.absolute().name for each in given.model]
    parameters, method = sum(p.numel() for p in model.parameters()), suites.method_of(model.config.to_dict())
    return {
        "name": folder.absolute().name if names.count(folder.absolute().name) == 1 else str(folder),
        "path": str(folder.absolute()),
        "sha256": {each.name: _sha256(each) for each in sorted(folder.iterdir()) if each.suffix in _HASHED},
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show(result: dict[str, Any], seconds: float, of: str) -> None:
    def shown(name: str, form: str) -> str:
        return "unknown" if result[name] is None else format(result[name], form)

    rows = [
        ("samples", shown("samples", ","), of),
        ("tokens", shown("tokens", ","), f"predicted, {result['tokens'] / seconds:,.0f} a second"),
        ("bytes", shown("bytes", ",.0f"), ""),
        ("loss", shown("loss", ".6f"), "nats a token"),
        ("perplexity", shown("perplexity", ",.4f"), "a token"),
        ("bits per byte", shown("bits_per_byte", ".6f"), ""),
    ]
    print_table(("", "", ""), rows, show_header=False, box=None)
    print("a run's own held-out loss is of its first train.eval_batches x train.global_batch_size samples alone")
    print(f"bytes: {result['bytes_source']}")
