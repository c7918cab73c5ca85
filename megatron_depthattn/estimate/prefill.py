"""What a prefill reads, writes and holds: the exported models run as they are, tensor by tensor.

With fake tensors (shapes without numbers) this takes seconds and no memory at any size. An operation is one of torch's
in inference: attention by ``scaled_dot_product_attention`` counts as one, which reads q, k, v and writes its output.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_depthattn.config import RunConfig
from megatron_depthattn.estimate.counts import element_bytes


class TensorTracker(TorchDispatchMode):
    """Inside it, what torch's operations move and hold is counted; a model's own weights are not.

    Attributes:
        live: bytes of the storages that were made inside and are still there.
        peak: the most that these have been.
        moved: bytes of the tensors that operations read and wrote; views move nothing, an expanded tensor counts once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.moved = 0
        self._weights = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(self._weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = {tensor.untyped_storage(): tensor for tensor in _tensors((args, kwargs))}
        written = {tensor.untyped_storage(): tensor for tensor in _tensors(result)}
        if func._schema.is_mutable or written.keys() - read.keys():
            inputs = [tensor for tensor in _tensors((args, kwargs)) if tensor.untyped_storage() not in self._weights]
            self.moved += sum(map(_num_bytes, (*inputs, *_tensors(result))))
        for storage in [storage for storage in written if storage not in self._known]:
            self._known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _release(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _num_bytes(tensor: Tensor) -> int:
    """Of what it holds, an expanded dimension once."""
    number = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride else min(size, 1)
    return number


def exported_model(config: RunConfig) -> Any:
    """The config's model as it is exported, on torch's default device, with random weights in its own type."""
    import transformers

    from megatron_depthattn.hf import modeling_cross_layer, modeling_depthattn
    from megatron_depthattn.hf.model_config import to_hf_config

    dtype = torch.bfloat16 if element_bytes(config) == 2 else torch.float32
    section = to_hf_config(asdict(config.model), dtype=str(dtype).removeprefix("torch."), special_tokens={})
    (name,), _ = section.pop("architectures"), section.pop("auto_map", None)
    model_class = next(
        found for module in (modeling_depthattn, modeling_cross_layer, transformers)
        if (found := getattr(module, name, None))
    )  # fmt: skip
    del section["model_type"]
    return model_class._from_config(model_class.config_class(**section), dtype=dtype).eval()


class Prefill(NamedTuple):
    """Of one sequence, in bytes; weights are left out."""

    moved: int
    peak: int
    kept: list[int]
    """What is there when a layer begins: the cache, and what layers keep for later ones."""


def fake_prefill(config: RunConfig, tokens: int) -> Prefill:
    """One forward pass of so many tokens that fills a cache, with fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: list[int] = []
    with FakeTensorMode(), torch.inference_mode():
        model, ids = exported_model(config), torch.zeros(1, tokens, dtype=torch.long)
        with TensorTracker(model) as tracker:
            for layer in model.model.layers:
                layer.register_forward_pre_hook(lambda *_: kept.append(tracker.live))
            mask = {"full_attention": None}  # causal, as `generate` finds for a prompt without padding
            model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    return Prefill(tracker.moved, tracker.peak, kept)
