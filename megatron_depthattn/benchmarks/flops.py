"""Operations of one token's forward pass at the released shapes, as the planner counts them."""

from __future__ import annotations

import argparse

from megatron_depthattn.benchmarks.result import Result
from megatron_depthattn.benchmarks.shapes import SHAPES


def add_flops(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verbs.add_parser("flops", help="operations of a forward pass, counted").set_defaults(measure=count_flops)


def count_flops(_: argparse.Namespace) -> Result:
    """The released shapes at their default stride and at stride 1."""
    from megatron_depthattn.config import load_config
    from megatron_depthattn.estimate.counts import forward_flops
    from megatron_depthattn.model.source_plan import default_stride

    parts = ("projections", "attention", "logits", "mix")
    result = Result("Operations of one token's forward pass, in millions", ["shape", "stride", *parts, "mix / all, %"])
    for shape in ("360m", "1.5b", "3b"):
        for stride in (default_stride(load_config(SHAPES[shape]).model.num_layers), 1):
            flops = forward_flops(load_config(SHAPES[shape], [f"model.depth_attention.stride={stride}"]))
            cells = [f"{getattr(flops, part) / 1e6:,.3f}" for part in parts]
            result.rows.append([shape, str(stride), *cells, f"{100 * flops.mix / flops.total:.4f}"])
            result.figures[f"{shape} stride {stride}"] = {part: getattr(flops, part) for part in parts}
    return result
