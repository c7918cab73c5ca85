"""Models of both layer specs on the meta device under large layouts, one rank after the other, in one process.

A fake process group gives this process any rank of a world whose other ranks do not exist.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformer_engine.pytorch.ops.basic import rmsnorm as te_rmsnorm

from megatron_depthattn.config import load_config
from megatron_depthattn.parallel.groups import shut_down
from megatron_depthattn.train.build import build_chunk, transformer_config
from megatron_depthattn.train.megatron_state import sharded_models
from tests.te.small import small_config

SPECS = ("local", "te")


class Layout(NamedTuple):
    """One rank of one world: the last tensor rank of a pipeline stage."""

    size: str
    tensor: int = 1
    pipeline: int = 1
    stage: int = 0
    context: int = 1
    depth_attention: bool = True

    @property
    def name(self) -> str:
        vanilla = "" if self.depth_attention else "-vanilla"
        return f"{self.size}{vanilla}-tp{self.tensor}-cp{self.context}-pp{self.pipeline}-stage{self.stage}"

    @property
    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.sequence={self.tensor > 1}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.context={self.context}",
            f"model.depth_attention.enabled={self.depth_attention}",
            "data.path=unused",
        ]


def stages(size: str, tensor: int, pipeline: int, **more: Any) -> list[Layout]:
    """Every pipeline stage of a layout."""
    return [Layout(size, tensor, pipeline, stage, **more) for stage in range(pipeline)]


WORLDS = {
    (size, tensor, pipeline): stages(size, tensor, pipeline)
    for size, tensor, pipeline in itertools.product(("410m", "1.5b", "3b"), (1, 2, 8), (1, 4))
    if (size, tensor) != ("1.5b", 8)  # INDIVISIBLE: 6 key/value heads cannot be split over, or repeated on, 8 ranks
}
INDIVISIBLE = Layout("1.5b", tensor=8)
VANILLA = stages("410m", 2, 4, depth_attention=False)
CONTEXT = stages("410m", 2, 1, context=2)
LAYOUTS = [*itertools.chain(*WORLDS.values()), *VANILLA, *CONTEXT]


def describe(layout: Layout, spec: str) -> dict[str, Any]:
    """What this rank's model of a spec holds: see `_weights`, `_modules`."""
    with _world(layout), _a_gpu(torch.device("meta")):
        overrides = [*layout.overrides, f"model.spec={spec}", "model.depth_attention.op=lean"]
        config = load_config(f"configs/{layout.size}.yaml", overrides)
        megatron = transformer_config(config)
        megatron.perform_initialization = False
        is_first, is_last = layout.stage == 0, layout.stage == layout.pipeline - 1
        model = build_chunk(config, megatron, pre_process=is_first, post_process=is_last)
        return {
            "numel": sum(parameter.numel() for parameter in model.parameters()),
            "fused RoPE": [megatron.apply_rope_fusion, megatron.fused_single_qkv_rope],
            **_modules(model),
            **_weights(model),
        }


def keeps_projection(spec: str) -> tuple[bool, bool]:
    """Whether the norm of k keeps the projection that k is a view of: as attention has it, and as torch sees it."""
    with _world(Layout("small")), _a_gpu(torch.device("cpu")):
        config = small_config(spec)
        attention = build_chunk(config, transformer_config(config)).decoder.layers[0].self_attention
    norm, size = copy.deepcopy(attention.k_layernorm).float(), attention.hidden_size_per_attention_head
    projection = torch.randn(3, 2, 2 * size, requires_grad=True) * 1
    key, value = projection.chunk(2, dim=-1)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with patch.object(te_rmsnorm, "rmsnorm_fwd", _rmsnorm), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        norm(key)
    assert saved
    return attention._norm_keeps_projection(value), projection.untyped_storage().data_ptr() in saved


def _rmsnorm(x: Tensor, weight: Tensor, eps: float, *_: Any) -> tuple[Tensor, None, Tensor]:
    """TransformerEngine's kernel: the normed input and the reciprocal of its root mean square."""
    scale = (x.pow(2).mean(-1) + eps).rsqrt()
    return x * scale[:, None] * weight, None, scale


def error_of(layout: Layout, spec: str) -> str:
    """Why the layout cannot be built."""
    try:
        describe(layout, spec)
    except (ValueError, AssertionError) as error:
        return str(error)
    return ""


def _weights(model: GPTModel) -> dict[str, Any]:
    """By name in the whole model: global shape, and where this rank's parts of it lie; FP8 state by its keys."""
    state = sharded_models([model])["model0"]
    apply_factories(state)
    weights: dict[str, Any] = {}
    objects = []
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            axes = entry.prepend_axis_num
            weight = weights.setdefault(entry.key, {"shape": list(entry.global_shape[axes:]), "parts": []})
            weight["parts"].append([list(entry.global_offset), list(entry.local_shape), list(entry.replica_id)])
        elif isinstance(entry, ShardedObject):
            objects.append(entry.unique_key)
    return {"weights": weights, "objects": sorted(objects)}


def _modules(model: GPTModel) -> dict[str, Any]:
    """Of the first layer and the final norm, by path: ``classes``, ``epsilons``; of core attention, ``attention``."""
    paths = ("decoder.layers.0", "decoder.final_layernorm")
    modules = {name: module for name, module in model.named_modules() if name.startswith(paths)}
    core: Any = model.decoder.layers[0].self_attention.core_attention
    return {
        "classes": {name: f"{type(module).__module__}.{type(module).__qualname__}" for name, module in modules.items()},
        "epsilons": {name: module.eps for name, module in modules.items() if hasattr(module, "eps")},
        "attention": [getattr(core, "num_gqa_groups_per_partition", None), getattr(core, "cp_global_ranks", None)],
    }


@contextmanager
def _world(layout: Layout) -> Iterator[None]:
    ranks = layout.tensor * layout.context
    rank = layout.stage * ranks + ranks - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks * layout.pipeline)
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            context_parallel_size=layout.context,
            create_gloo_process_groups=False,  # gloo needs a real store
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        assert parallel_state.get_pipeline_model_parallel_rank() == layout.stage
        yield
    finally:
        shut_down()


@contextmanager
def _a_gpu(device: torch.device) -> Iterator[None]:
    """TransformerEngine's constructors believe that there is a GPU; weights are made on ``device``."""
    with patch("torch.cuda.current_device", lambda: device), patch("torch.cuda.is_available", lambda: True):
        yield
