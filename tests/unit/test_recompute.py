"""Recomputing activations changes nothing but memory; and what Depth-Attention keeps for backward is bf16.

Shapes: s positions, b batch, H query heads, G key/value heads, d head size.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_depthattn.benchmarks.memory import SavedTensors, saved_tensors
from megatron_depthattn.config import load_config
from megatron_depthattn.estimate.activations import chunk_memory
from megatron_depthattn.model import layer_specs
from megatron_depthattn.model.core_attention import SDPAttention
from megatron_depthattn.model.gpt import build_gpt_model
from megatron_depthattn.model.initialization import initialize_weights
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.microbatch_state import MicrobatchState
from tests.small_models import small_config
from tests.unit.test_estimate_memory import CPU_SHAPE

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

VOCAB, SEQUENCE, BATCH = 128, 24, 2
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 4, 2, 8
RECOMPUTE: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "uniform-1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform-2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "uniform-3": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
    "block-2": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
}


def config_of(**overrides: Any) -> DepthAttentionConfig:
    return small_config(NUM_LAYERS, **overrides)


def build(**overrides: Any) -> GPTModel:
    model = build_gpt_model(config_of(**overrides), vocab_size=VOCAB, max_sequence_length=SEQUENCE)
    initialize_weights(model, seed=3, init_std=0.2)
    return model.train()


def loss_of(model: GPTModel, state: MicrobatchState | None = None) -> Tensor:
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    given = {"extra_block_kwargs": {"attention_bias": state}} if state else {}
    labels = tokens.roll(-1, dims=1)
    return model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None, labels=labels, **given).mean()


def loss_and_gradients(model: GPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("stride", "settings"),
    [
        (1, {}),
        (1, {"op": "reference"}),
        (2, {"recent_window": 1}),
        (2, {"recent_window": 1, "mixes": "key_value"}),
        (1, {"weights": "uniform", "mixes": "key"}),
    ],
    ids=str,
)
def test_every_recompute_mode_gives_the_same_loss_and_gradients(stride, settings):
    """To the bit, but for the order of sums: layers recomputed together sum their gradients of a source before adding
    them, and so do the readers of a key that is left twice, as a key and as a mixed one."""
    plan = {f"depth_attention_{key}": value for key, value in ({"stride": stride} | settings).items()}
    loss, gradients = loss_and_gradients(build(**plan))
    for mode, options in RECOMPUTE.items():
        other_loss, other_gradients = loss_and_gradients(build(**plan, **options))
        assert torch.equal(loss, other_loss), mode
        for name, gradient in gradients.items():
            assert gradient.any(), name
            is_apart = options.get("recompute_num_layers", 1) == 1 or options["recompute_method"] == "block"
            if is_apart and settings.get("mixes") != "key_value":
                assert torch.equal(gradient, other_gradients[name]), (mode, name)
            else:
                assert (gradient - other_gradients[name]).norm() <= 1e-6 * gradient.norm(), (mode, name)


def test_control_the_gradient_through_sources_is_not_small():
    """Were a recompute mode to drop the gradient of the depth path, the test above would see it."""
    _, gradients = loss_and_gradients(build(depth_attention_stride=2))
    model = build(depth_attention_stride=2)
    for layer in model.decoder.layers:
        read = layer._source
        layer._source = lambda index, state, read=read: tuple(tensor.detach() for tensor in read(index, state))
    _, detached = loss_and_gradients(model)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert (gradients[name] - detached[name]).norm() / gradients[name].norm() > 1e-2


def saved_by(model: GPTModel | None = None, **overrides: Any) -> SavedTensors:
    model, state = model or build(**overrides), MicrobatchState()
    with saved_tensors(model, state) as saved:
        loss_of(model, state if model.config.depth_attention else None)
    return saved


def kinds(saved: SavedTensors) -> Counter[tuple[torch.dtype, tuple[int, ...]]]:
    return Counter((tensor.dtype, tuple(tensor.shape)) for tensor in saved.tensors)


BF16: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16}
PLANS = [(1, 0), (2, 1), (3, 0)]
SIZES = {
    **{"model.num_layers": NUM_LAYERS, "model.hidden_size": 32, "model.num_attention_heads": NUM_HEADS},
    **{"model.num_query_groups": NUM_KV_HEADS, "model.kv_channels": HEAD_DIM, "data.sequence_length": SEQUENCE},
    **{"train.micro_batch_size": BATCH, "model.spec": "te", "precision.dtype": "bf16"},
}


@pytest.mark.parametrize(("stride", "window"), PLANS)
def test_the_mix_keeps_its_bf16_inputs_and_nothing_in_fp32(stride, window, record_property):
    vanilla = saved_by(depth_attention=False, **BF16)
    lean = saved_by(depth_attention_stride=stride, depth_attention_recent_window=window, **BF16)
    more = kinds(lean) - kinds(vanilla)
    assert {kind for kind in more if kind[0] is not torch.bfloat16} == set(), more
    # The q that core attention keeps in another shape; k and v; of a layer that is read, the mixed value. Of vanilla's
    # layers the value is a view that keeps the whole projection.
    bytes_per_head = 2 * HEAD_DIM * SEQUENCE * BATCH
    assert sum(more.values()) <= 4 * NUM_LAYERS
    assert lean.num_bytes - vanilla.num_bytes <= NUM_LAYERS * bytes_per_head * 3 * NUM_KV_HEADS
    record_property("tensors", sum(more.values()))
    record_property("storage_bytes", lean.num_bytes - vanilla.num_bytes)
    record_property("vanilla_bytes", vanilla.num_bytes)

    reference = saved_by(
        depth_attention_stride=stride, depth_attention_recent_window=window, depth_attention_op="reference", **BF16
    )
    in_fp32 = [kind for kind in (kinds(reference) - kinds(vanilla)) if kind[0] is torch.float32]
    record_property("reference_storage_bytes", reference.num_bytes - vanilla.num_bytes)
    assert in_fp32, "the control: plain autograd keeps fp32 intermediates"
    assert reference.num_bytes > lean.num_bytes


class KeepsCopies(SDPAttention):
    """Keeps q, k and v, contiguous, for backward."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(query.contiguous(), key.contiguous(), value.contiguous(), *args, **kwargs)


@pytest.mark.parametrize(("stride", "window"), PLANS)
@pytest.mark.parametrize("mode", [None, "uniform-1"])
def test_what_transformer_engine_keeps_above_vanilla(stride, window, mode, monkeypatch):
    """With a core attention and a norm (torch's in bf16 on CPU) that keep contiguous copies, as TransformerEngine's."""
    monkeypatch.setattr(layer_specs, "SDPAttention", KeepsCopies)

    def saved(**mixing: Any) -> SavedTensors:
        return saved_by(**mixing, **BF16, **(RECOMPUTE[mode] if mode else {}))

    depth = saved(depth_attention_stride=stride, depth_attention_recent_window=window)
    more = depth.num_bytes - saved(depth_attention=False).num_bytes
    mixing = {"model.depth_attention.stride": stride, "model.depth_attention.recent_window": window}
    mixing |= {f"recompute.{key[10:]}": value for key, value in RECOMPUTE[mode].items()} if mode else {}
    config = load_config(CPU_SHAPE, [f"{key}={value}" for key, value in (SIZES | mixing).items()])
    assert more == chunk_memory(config, 0).sources


def tensors_within(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_within(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from tensors_within(inner)


@pytest.mark.parametrize("options", [{}, RECOMPUTE["selective"], RECOMPUTE["uniform-2"]], ids=str)
def test_nothing_is_left_on_the_modules(options):
    model = build(depth_attention_stride=1, **options)
    registries = ("_parameters", "_buffers", "_modules")

    def attributes() -> dict[str, set[str]]:
        return {
            path: {name for name in vars(module) if name not in registries}
            for path, module in model.decoder.layers.named_modules()
        }

    before = attributes()
    loss = loss_of(model)
    for stage in ("forward", "backward"):
        assert attributes() == before, stage
        for path, module in model.decoder.layers.named_modules():
            for name in before[path]:
                assert not list(tensors_within(vars(module)[name])), f"{path}.{name} after {stage}"
            assert not list(module.buffers(recurse=False)), path
        if stage == "forward":
            loss.backward()
