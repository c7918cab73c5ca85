"""Continue a prompt with an exported model; the text appears as it is made."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_depthattn.cli.common import check, new_parser, print_table, run
from megatron_depthattn.cli.evaluate import add_device
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 0.01
"""Shares below this are left out of the table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when the text is out, 1 with one line on stderr when it cannot be, 130 on Ctrl-C."""
    parser = new_parser("generate", __doc__)
    prompt = "the text to continue; - reads it from standard input, its last line end included"
    temperature = "0 takes the likeliest token each time (the default); above 0 samples, the flatter the higher"
    depth = (
        "behind the text: what the values of the last N tokens (default 4; the prompt's last and new ones) are mixed "
        "of, in a model with Depth-Attention"
    )
    parser.add_argument("--model", type=user_path, required=True, metavar="HF_DIR", help="a Hugging Face model folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help=prompt)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=temperature)
    top_p = "sample from the likeliest tokens that make up P"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=top_p)
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (0: from all)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling (default 0)")
    parser.add_argument("--show-depth", type=int, nargs="?", const=4, metavar="N", help=depth)
    add_device(parser)
    return run(_generate, parser.parse_args(arguments), RuntimeError)  # torch's, such as out of memory


def _generate(given: argparse.Namespace) -> None:
    _check_options(given)
    prompt = _read_prompt(given.prompt)

    import torch
    from transformers import TextStreamer

    from megatron_depthattn.hf.loading import DTYPES, load_causal_lm, pick_device
    from megatron_depthattn.hf.tokenizer import load_fast_tokenizer
    from megatron_depthattn.hf.weights_folder import HFFolder

    class PrintableStreamer(TextStreamer):  # type: ignore[misc]
        """Writes out on a terminal what it would obey; into a file or a pipe the text goes as it is."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text) if sys.stdout.isatty() else text, stream_end)

    device = pick_device(given.device)
    HFFolder(given.model)  # the error of a wrong folder is about the folder, not about its tokenizer
    tokenizer = load_fast_tokenizer(given.model)
    # As training text is encoded: without special tokens.
    tokens = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)], dtype=torch.long, device=device)
    check((not tokens.numel(), "the prompt is empty: give --prompt some text to continue"))
    model = load_causal_lm(given.model, DTYPES[given.dtype]).to(device)
    _check_model(given, tokens, model)
    # Set on the model, not handed to `generate`, which would fill its gaps from the folder's own settings.
    model.generation_config = _generation_config(given, model, tokenizer)
    torch.manual_seed(given.seed)
    streamer = PrintableStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    with torch.inference_mode():
        text = model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=streamer)
        if given.show_depth is not None:
            first = max(tokens.shape[1] - 1, text.shape[1] - given.show_depth)
            mixed = {"key": "keys", "key_value": "keys and values"}.get(model.config.depth_attention_mixes, "values")
            columns = ("token", "layer", f"reads mixed {mixed} of", f"made of {mixed} of")
            caption = f"means over KV heads; shares below {SHOWN:g} are left out"
            if (loops := getattr(model.config, "num_loops", 1)) > 1:
                caption += f"; layers are counted on through {loops} loops of {model.config.num_hidden_layers}"
            rows = list(_depth_rows(model, tokenizer, text, first))
            print_table(columns, rows, width=10_000, show_lines=True, caption=caption)  # lines in a file are not broken


def _check_options(given: argparse.Namespace) -> None:
    hot, top_p, top_k, shown = given.temperature, given.top_p, given.top_k, given.show_depth
    cold = hot == 0 and (top_p < 1 or top_k > 0)
    check(
        (given.max_new_tokens < 1, f"--max-new-tokens {given.max_new_tokens}: set at least 1"),
        (shown is not None and shown < 1, f"--show-depth {shown}: set at least 1 token"),
        (not hot >= 0, f"--temperature {hot}: set 0 (the likeliest token each time) or more"),
        (not 0 < top_p <= 1, f"--top-p {top_p}: set a number in (0, 1]; 1 keeps every token"),
        (top_k < 0, f"--top-k {top_k}: set at least 1, or 0 to keep every token"),
        (cold, "--top-p and --top-k choose among sampled tokens: set --temperature above 0 as well"),
    )


def _check_model(given: argparse.Namespace, tokens: Tensor, model: PreTrainedModel) -> None:
    """Raise where the model does not know the tokens [1, t], has no room for new ones, or has no depth to show."""
    config, length, largest = model.config, tokens.shape[1], int(tokens.max())
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    layers = range(getattr(config, "num_effective_layers", 0))
    has_depth = hasattr(config, "depth_sources") and any(map(config.depth_sources, layers))
    too_long = (
        f"the prompt's {length} tokens and {given.max_new_tokens} new ones are more than the model's {positions} "
        "positions (max_position_embeddings): shorten the prompt or set a smaller --max-new-tokens"
    )
    unknown = (
        f"the prompt has token {largest} and the model's vocab_size is {config.vocab_size}: the tokenizer in the "
        "folder belongs to another model"
    )
    no_depth = (
        f"--show-depth: no layer of this model (model_type {config.model_type!r}) attends over depth; leave the "
        "option out, or give --model a folder with Depth-Attention"
    )
    check(
        (length + given.max_new_tokens > positions, too_long),
        (largest >= config.vocab_size, unknown),
        (given.show_depth is not None and not has_depth, no_depth),
    )


def _generation_config(
    given: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """What the command line asks for, and the end of text; nothing else of the folder's own settings is used."""
    from transformers import GenerationConfig

    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    # transformers' own default of top_k is the 50 likeliest tokens.
    sampling = {"do_sample": True, "temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k}
    sampling = sampling if given.temperature > 0 else {}
    return GenerationConfig(max_new_tokens=given.max_new_tokens, eos_token_id=end, pad_token_id=pad, **sampling)


def _read_prompt(given: str) -> str:
    """The text of --prompt."""
    try:
        prompt = sys.stdin.read() if given == "-" else given
        prompt.encode()  # bytes of the command line that are no UTF-8 are kept as lone surrogates
        return prompt
    except UnicodeError as error:
        place = "standard input (--prompt -)" if given == "-" else "--prompt"
        raise ValueError(f"{place} is not UTF-8 ({error}): give text in UTF-8") from error


def _depth_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Tensor, first: int
) -> Iterator[list[str]]:
    """What the values of ``tokens`` [1, t] from position ``first`` on are mixed of, in every layer that mixes."""
    from megatron_depthattn.hf.depth_origins import depth_origins

    weights = model(tokens, use_cache=False, logits_to_keep=1, output_depth_weights=True).depth_weights
    reads = [model.config.depth_sources(layer) for layer in range(len(weights))]
    origins = depth_origins(weights, reads)
    for position in range(first, tokens.shape[1]):
        lines = []
        for layer, sources in enumerate(reads):
            if sources:
                direct, made_of = (of[layer][0, :, position].float().mean(dim=0).tolist() for of in (weights, origins))
                lines.append((str(layer), _shares([*sources, "itself"], direct), _shares(range(layer + 1), made_of)))
        yield [f"{position} {tokenizer.decode(tokens[0, position])!r}", *map("\n".join, zip(*lines, strict=True))]


def _shares(names: Iterable[object], values: Iterable[float]) -> str:
    """``name:share`` of all that are not nearly nothing."""
    return "  ".join(f"{name}:{share:.2f}" for name, share in zip(names, values, strict=False) if share >= SHOWN)
