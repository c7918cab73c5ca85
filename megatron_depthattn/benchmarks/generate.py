"""Generation with the exported models in transformers: time and peak memory over vanilla.

That is table 4 of arXiv:2606.05014. Each model has the shape of a config and random weights, the same for all that
vanilla has too. `generate` decodes greedily with its own cache; when the first logits are there, prefill is over.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from megatron_depthattn.benchmarks.models import cuts_text, free_bytes, single_config
from megatron_depthattn.benchmarks.result import Result, progress
from megatron_depthattn.benchmarks.timing import bootstrap_interval, device_clock, spread, taking_turns
from megatron_depthattn.cli.common import check, find_config
from megatron_depthattn.config import RunConfig, load_config
from megatron_depthattn.estimate.counts import decoder_shape, element_bytes
from megatron_depthattn.estimate.paper import TITLES, with_method
from megatron_depthattn.estimate.prefill import TensorTracker, exported_model

PAPER = {"vanilla": ("526.6", "30.6"), "Depth-Attention": ("532.8 (+1.18 %)", "30.6")}
"""Seconds of generation and GB at the peak of prefill, at 3B with 64 sequences of 2048 and 2048 tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="3b", metavar="CONFIG", help="YAML file or shipped name (3b)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="other keys of the config"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sequences (default 64, the paper's)")
    parser.add_argument("--prompt-length", type=int, default=2048, metavar="N", help="tokens (default 2048)")
    parser.add_argument("--new-tokens", type=int, default=2048, metavar="N", help="of each sequence (default 2048)")
    methods = ["vanilla", *TITLES]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods[:2], help="the first is compared with")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="generations of each model (default 3)")


def measure(given: argparse.Namespace) -> Result:
    """Models take turns, one generation a round; a ratio is that of two generations of the same round.

    Raises:
        ValueError: a number is below 1; the models and their caches do not fit into the device.
    """
    numbers = {name: getattr(given, name) for name in ("batch_size", "prompt_length", "new_tokens", "rounds")}
    for name, number in numbers.items():
        check((number < 1, f"--{name.replace('_', '-')} is {number}: set 1 or more"))
    path = find_config(given.config)
    config = single_config(path, given.set)
    configs = {TITLES.get(name, name): with_method(config, name) for name in given.methods}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_memory(config, len(configs), given, device.type)
    models = {title: random_model(own, device) for title, own in configs.items()}
    generator = torch.Generator().manual_seed(0)
    size = (given.batch_size, given.prompt_length)
    prompt = torch.randint(config.model.vocab_size, size, generator=generator).to(device)
    peaks = {title: prefill_peak(model, prompt) for title, model in models.items()}
    runs: dict[str, list[tuple[float, float]]] = {title: [] for title in models}

    def result() -> Result:
        found = _result(config, runs, peaks, given)
        if cuts := cuts_text(config, load_config(path)):
            found.notes.append(f"cut from {given.config}: {cuts}")
        return found

    for turn in range(-1, given.rounds):  # the first round is not counted
        for title in taking_turns([*models], turn):
            _, *seconds = generate(models[title], prompt, given.new_tokens)
            if turn >= 0:
                runs[title].append((seconds[0], seconds[1]))
        progress(given, f"round {turn + 1} of {given.rounds}", result if turn >= 0 else None)
    return result()


def random_model(config: RunConfig, device: torch.device) -> Any:
    """The config's model as it is exported, on the device, with weights of a fixed seed."""
    with torch.device(device):
        torch.manual_seed(0)
        return exported_model(config)


def generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[Tensor, float, float]:
    """Greedy continuations of ``prompt`` [b, t] by transformers.

    Returns:
        Prompts and continuations [b, t + new_tokens]; seconds (`device_clock`) to the first logits, and from there.
    """
    now, first = device_clock(prompt.device), list[float]()

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        if not first:
            first.append(now())
        return scores

    started = now()
    tokens: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
        logits_processor=[note], eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    ended = now()
    assert tokens.shape == (len(prompt), prompt.shape[1] + new_tokens)
    return tokens, first[0] - started, ended - first[0]


def prefill_peak(model: Any, prompt: Tensor) -> tuple[int, int]:
    """Bytes of the model's weights, and the most that is allocated above them until the first new token.

    On a GPU the allocator's; on a CPU those of torch's tensors, without what a kernel takes for itself.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if prompt.device.type == "cuda":
        generate(model, prompt[:1, :8], 1)  # workspaces are there
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        generate(model, prompt, 1)
        return weights, torch.cuda.max_memory_allocated() - before
    with TensorTracker(model) as tracker:
        generate(model, prompt, 1)
    return weights, tracker.peak


def _check_memory(config: RunConfig, models: int, given: argparse.Namespace, kind: str) -> None:
    model, element, free = config.model, element_bytes(config), free_bytes(kind)
    weights = models * decoder_shape(config).parameters * element
    tokens = given.batch_size * (given.prompt_length + given.new_tokens)
    cache = 2 * element * model.num_layers * model.num_query_groups * model.kv_channels * tokens
    check(
        (
            weights + cache > free,
            f"{models} models need {weights / 1e9:.1f} GB and the cache of one {cache / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB are free: set a smaller --batch-size, --prompt-length or --new-tokens, another "
            "CONFIG or --set model.num_layers=...",
        )
    )


def _result(
    config: RunConfig, runs: dict[str, list[tuple[float, float]]], peaks: dict[str, tuple[int, int]],
    given: argparse.Namespace,
) -> Result:  # fmt: skip
    model, base = config.model, next(iter(runs))
    result = Result(
        title=f"Generation: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} KV heads of {model.kv_channels}, {config.precision.dtype}, {given.batch_size} x "
        f"{given.prompt_length} + {given.new_tokens} tokens, {given.rounds} rounds",
        columns=[
            *("model", "prefill, s", "decode, s", "both, s", f"over {base}, %: median (quartiles)"),
            *("95 % of the median, %", "new tokens/s", "prefill peak, GB", f"above {base}, MB"),
            *("arXiv:2606.05014, 3B, 64 x 2048 + 2048: s", "its prefill peak, GB"),
        ],
        notes=[
            "exported models in transformers, random weights of one seed, greedy, transformers' own cache; models take "
            "turns, a percentage is that of two generations of the same round; seconds: medians, CPU time of the "
            "process with one thread on a CPU, else the wall's",
            "prefill: to the first logits; its peak with the model's own weights: the allocator's on a GPU, torch's "
            "tensors on a CPU",
        ],
    )
    totals = {title: [sum(run) for run in own] for title, own in runs.items()}
    for title, own in runs.items():
        prefill, decode = zip(*own, strict=True)
        more = [100 * (mine / other - 1) for mine, other in zip(totals[title], totals[base], strict=True)]
        weights, peak = peaks[title]
        above = weights + peak - sum(peaks[base])
        speed = given.batch_size * given.new_tokens / spread(totals[title]).median
        low, high = bootstrap_interval(more)
        over = ["", ""] if title == base else [spread(more).text(1, 2), f"{low:.2f} to {high:.2f}"]
        result.rows.append(
            [
                *(title, *(f"{spread(part).median:.3f}" for part in (prefill, decode, totals[title])), *over),
                *(f"{speed:,.1f}", f"{(weights + peak) / 1e9:.3f}", "" if title == base else f"{above / 1e6:+.2f}"),
                *PAPER.get(title, ("", "")),
            ]
        )
        result.figures[title] = {
            "prefill_seconds": prefill, "decode_seconds": decode, "percent": spread(more).median,
            "interval": [low, high], "tokens_per_second": speed, "weight_bytes": weights, "prefill_peak_bytes": peak,
        }  # fmt: skip
    return result
