"""The arithmetic of the mix at the released shapes, as a share of the forward pass."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from tools.benchmarks.result import Result
from tools.benchmarks.shapes import SHAPES


def add_flops(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("flops", help="the arithmetic of the mix, as a share of the forward pass")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["360m", "1.5b", "3b"], help="default: released")
    parser.set_defaults(measure=measure_flops)


def measure_flops(given: argparse.Namespace) -> Result:
    """Counted, not measured: no model is built."""
    from megatron_depthattn.config import load_config
    from megatron_depthattn.model.source_plan import SourcePlan
    from megatron_depthattn.train.metrics import decoder_shape

    result = Result(
        title="Operations of one token's forward pass, in millions",
        columns=["shape", "stride", "projections", "attention", "logits", "mix", "mix / all, %", "paper, %"],
        notes=[
            "a multiplication with its addition counts as two; projections: QKV, output and SwiGLU matrices; "
            "attention: causal, averaged over the positions of a sequence; mix: group means of the query, scores and "
            "weighted values over depth; norms, RoPE, softmaxes and the embedding are not counted",
            "the modules of a built model give the same numbers, and its matrix products are checked against torch's "
            "FlopCounterMode: tests/unit/test_flops.py",
            "backward counts twice in every line, so the share is that of a step, too (what is recomputed in it, the "
            "scores of the mix among it, is not counted)",
        ],
    )
    for name in given.shape:
        config = load_config(SHAPES[name])
        layers = config.model.num_layers * config.model.num_loops
        for stride in dict.fromkeys((max(1, layers // 2), 1)):
            plan = SourcePlan(num_layers=layers, stride=stride)
            flops = decoder_shape(config).forward_flops(config.data.sequence_length, plan)
            millions = [f"{number / 1e6:,.3f}" for number in asdict(flops).values()]
            share = 100 * flops.mix / flops.total
            paper = "" if stride == 1 else "under 0.01"
            result.rows.append([name, str(stride), *millions, f"{share:.4f}", paper])
            result.figures[f"{name}, stride {stride}"] = asdict(flops) | {"share": share / 100}
    return result
