"""From the run's config to Megatron objects: the one place where our keys become Megatron's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_depthattn.config import RunConfig
from megatron_depthattn.config.precision import data_parallel_fields, optimizer_fields, transformer_fields
from megatron_depthattn.config.resolve import GPU, resolve
from megatron_depthattn.config.schedule import schedule_of
from megatron_depthattn.methods.definitions import DEFINITIONS
from megatron_depthattn.model.compiled import compile_layers
from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.initialization import initialize_weights
from megatron_depthattn.model.mup import has_scaled_rate
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.schedule import INTERLEAVED_WAITS_FOR_SENDS
from megatron_depthattn.train.hardware import adds_gradients, resolve_here
from megatron_depthattn.train.muon import layout, muon_fields

Chunks = list[DistributedDataParallel]
SAME_NAME = ("hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size")
"""Keys of our config's ``model`` that are Megatron's fields."""
DEPTH_KEYS = ("stride", "recent_window", "op", "loop_sources", "weights", "mixes")


def transformer_config(config: RunConfig, *, only_counted: bool = False) -> DepthAttentionConfig:
    """The model's and layout's config in Megatron's terms.

    ``only_counted``: nothing will be built from it, so TransformerEngine need not be installed where it is asked for.
    """
    config = (resolve(config, GPU) if only_counted else resolve_here(config)).config
    model, parallel, depth = config.model, config.parallel, config.model.depth_attention
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    return qwen3_style_config(
        num_layers=model.num_layers * model.num_loops,
        num_loops=model.num_loops,
        **{name: getattr(model, name) for name in SAME_NAME},
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        method=model.effective_method,
        method_settings=dataclasses.asdict(getattr(model, model.method)) if model.method in DEFINITIONS else {},
        **{f"depth_attention_{key}": getattr(depth, key) for key in DEPTH_KEYS},
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        pipeline_model_parallel_layout=parallel.pipeline_layout or None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        document_mask=config.data.document_mask,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=config.precision.dtype == "bf16",
        **transformer_fields(config.precision),
        # Of q and k one by one, so v is there to be mixed.
        apply_rope_fusion=model.spec == "te" and not only_counted,
        **{f"recompute_{key}": value for key, value in dataclasses.asdict(config.recompute).items()},
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        batch_p2p_sync=False,  # for torch before 2.0
        deallocate_pipeline_outputs=parallel.pipeline > 1
        and (parallel.virtual_pipeline == 1 or (torch.cuda.is_available() and INTERLEAVED_WAITS_FOR_SENDS)),
        bias_activation_fusion=bool(model.fused_swiglu),
        cross_entropy_loss_fusion=bool(model.fused_cross_entropy),
        tp_comm_overlap=parallel.tp_comm_overlap and not only_counted,
        # The loss is a sum over tokens, divided once by the tokens of the whole global batch: equal under every layout.
        calculate_per_token_loss=True,
    )


def build_chunk(config: RunConfig, megatron: DepthAttentionConfig, **place: Any) -> GPTModel:
    """One pipeline chunk, its weights not set yet; by default the whole model. ``place``: see `build_gpt_model`."""
    return build_gpt_model(
        megatron,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        rotary_base=config.model.rotary_base,
        tie_embeddings=config.model.tie_embeddings,
        backend=resolve_here(config).config.model.spec,
        **place,
    )


def build_model(config: RunConfig, device: torch.device, *, bucket_size: int | None = None) -> Chunks:
    """This rank's pipeline chunks, initialised, in data-parallel wrappers.

    ``bucket_size``: elements of a bucket where communication is overlapped; None: Megatron's, 40 million or more.
    """
    megatron = transformer_config(config)
    if megatron.tp_comm_overlap:
        initialize_userbuffers(config)
    num_chunks = config.parallel.virtual_pipeline
    overlap_gather, is_muon = bool(config.parallel.overlap_param_gather), config.optimizer.name == "muon"
    rank, stages = parallel_state.get_pipeline_model_parallel_rank(), config.parallel.pipeline
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=bool(config.parallel.overlap_grad_reduce),
        overlap_param_gather=overlap_gather,
        align_param_gather=num_chunks > 1,
        bucket_size=bucket_size,
        **data_parallel_fields(config.precision),
    )
    chunks: Chunks = []
    for index in range(num_chunks):
        model = build_chunk(
            config,
            megatron,
            pre_process=rank == 0 and index == 0,
            post_process=rank == stages - 1 and index == num_chunks - 1,
            vp_stage=index if num_chunks > 1 else None,
            earlier_chunks=unwrap_model(chunks),
        ).to(device)
        Fp8State([model]).reset()  # else the weights that are replaced now would stay in the histories
        initialize(model, config)
        if config.model.compile:
            compile_layers(model)
        half = Float16Module(megatron, model) if megatron.bf16 else model
        # Of a later chunk Megatron makes one group of all buckets, which Muon and AdamW would both gather or neither.
        in_one_group = index > 0 and not is_muon
        layouts = {"full_param_layout": layout(half, ddp, one_bucket=rank + index > 0)} if is_muon else {}
        chunks.append(DistributedDataParallel(megatron, ddp, half, disable_bucketing=in_one_group, **layouts))
    hooks = get_model_config(chunks[0])
    assert all(get_model_config(chunk) is hooks for chunk in chunks), (
        "every chunk must share the config that holds the hooks"
    )
    hooks.finalize_model_grads_func = finalize_gradients
    if ddp.overlap_grad_reduce:  # the schedules reduce nothing before the last microbatch
        hooks.no_sync_func = [chunk.no_sync for chunk in chunks] if num_chunks > 1 else chunks[0].no_sync
    if overlap_gather and num_chunks > 1:  # the schedule asks for a chunk's weights while another one computes
        hooks.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    if config.model.fused_gradient_accumulation:
        for chunk in chunks:
            _fuse_gradient_accumulation(chunk)
    return chunks


def initialize(model: GPTModel, config: RunConfig) -> None:
    """Give a chunk the initial weights of the config's seed."""
    initialize_weights(
        model, seed=config.run.seed, init_std=config.model.init_std, width_multiplier=config.width_multiplier
    )


def finalize_gradients(chunks: Chunks, num_tokens: Tensor | None, **settings: Any) -> None:
    """Megatron's ``finalize_model_grads``, which in 0.16 reads the number of tokens on the host, once a chunk.

    Args:
        num_tokens: of this rank on the last stage, int32 []; the gradients are divided by those of the global batch.
    """
    finalize_model_grads(chunks, None, **settings)
    if num_tokens is None:
        return
    groups = settings["pg_collection"]
    dist.broadcast(num_tokens, parallel_state.get_pipeline_model_parallel_last_rank(), group=groups.pp)
    dist.all_reduce(num_tokens, group=groups.dp_cp)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / num_tokens)


def _fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Let the linear layers that have a kernel for it add to their weights' gradients.

    Not by Megatron's config: with that its output layer, which has no other kernel, insists on Apex's.
    """
    has_kernel = adds_gradients()
    module: Any
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # TransformerEngine's
        elif has_kernel and hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True  # Megatron's


def initialize_userbuffers(config: RunConfig) -> None:
    """Allocate the buffers through which TransformerEngine's layers overlap tensor-parallel communication."""
    from transformer_engine.pytorch.module import base

    if not hasattr(base, "UserBufferQuantizationMode"):
        raise ValueError(
            "parallel.tp_comm_overlap=true needs TransformerEngine 2.7 or later, and this one is older: upgrade it, or "
            "set parallel.tp_comm_overlap=false"
        )
    modes, precision = base.UserBufferQuantizationMode, config.precision
    has_bf16 = precision.fp8 is None or precision.bf16_first_layers or precision.bf16_last_layers
    base.initialize_ub(
        shape=[
            config.data.sequence_length * config.train.micro_batch_size // config.parallel.context,
            config.model.hidden_size,
        ],
        tp_size=config.parallel.tensor,
        quantization_modes=[modes.FP8] * (precision.fp8 is not None) + [modes.NONE] * bool(has_bf16),
        bootstrap_backend="nccl",
    )


def finish_param_gather(chunks: Chunks) -> None:
    """Wait until the weights are whole on every rank; call on all ranks before they are read outside of a forward."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in reversed(chunk.bucket_groups):  # in the order of forward
                group.finish_param_sync()


def build_optimizer(config: RunConfig, chunks: Chunks) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over all chunks (Megatron's distributed optimizer), or Muon with it, and the schedule of both."""
    settings = config.optimizer
    bf16 = config.precision.dtype == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    kind = muon_fields(settings, dtype) if settings.name == "muon" else {"optimizer": "adam", "bf16": bf16}
    megatron = OptimizerConfig(
        **kind,
        lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.grad_clip,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=bool(config.parallel.overlap_param_gather),
        **optimizer_fields(config.precision),
    )
    # Megatron's own keep weight decay off one-dimensional parameters: the norms.
    overrides: dict[ParamKey, Any] = get_standard_config_overrides(megatron)
    if settings.mup:
        scaled = ParamWithNamePredicate("mup", lambda parameter, name: has_scaled_rate(name, parameter))
        overrides[ParamKey(with_name_predicate=scaled)] = mup_settings(config)
    optimizer = get_megatron_optimizer(megatron, chunks, overrides, use_gloo_process_groups=False)
    for adam in torch_adams(optimizer):
        for group in adam.param_groups:
            group["fused"] = True  # one pass over weights and moments in place of ten; Megatron has no setting for it
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    return optimizer, build_schedule(config, optimizer)


def mup_settings(config: RunConfig) -> dict[str, float]:
    """What the parameter groups with muP's learning rate have in place of the others' settings."""
    settings, width = config.optimizer, config.width_multiplier
    rate = settings.lr / width
    # Schedules read the two rates; by the multiplier Megatron distinguishes the groups of a checkpoint.
    return {
        "max_lr": rate,
        "min_lr": rate * settings.min_lr_ratio,
        "lr_mult": 1.0 / width,
        "eps": settings.eps / width,
    }


def torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The inner optimizers that are torch's own; others keep their step in the parameter group."""
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]


def build_schedule(config: RunConfig, optimizer: MegatronOptimizer | torch.optim.Optimizer) -> OptimizerParamScheduler:
    """Megatron's schedule over the parameter groups of ``optimizer``, which counts what `schedule_of` says."""
    settings, parts = config.optimizer, schedule_of(config)
    return OptimizerParamScheduler(
        optimizer,  # it touches nothing but the parameter groups
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=parts.warmup,
        lr_decay_steps=parts.length,
        lr_decay_style={"wsd": "WSD", "inverse_sqrt": "inverse-square-root"}.get(settings.schedule, settings.schedule),
        wsd_decay_steps=parts.decay,
        lr_wsd_decay_style=settings.decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=parts.length,
        wd_incr_style="constant",
        # A resumed run follows its own config, not that of the run that saved the checkpoint.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


# ---- delayed FP8 scaling


class Fp8State:
    """Scales and histories of the TransformerEngine layers in ``models`` that are scaled with delay, if any.

    Every pass leaves the largest entries that it met in its layers' histories, from which later scales come. What is no
    part of the training must leave no trace there: an evaluation, a step that is not finite, weights that were replaced
    before they were used. Under the other recipes layers remember nothing.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._layers: list[Any] = [m for model in models for m in model.modules() if hasattr(m, "fp8_meta")]
        self._kept: list[list[Tensor]] = [[] for _ in self._layers]

    def keep(self) -> None:
        """Remember the state as it is now; a layer has none before its first pass."""
        live = [_tensors(layer) for layer in self._layers]
        if list(map(len, live)) == list(map(len, self._kept)):
            _copy(live, self._kept)
        else:
            self._kept = [[tensor.clone() for tensor in tensors] for tensors in live]

    def restore(self) -> None:
        """Bring back what `keep` found, in place: TransformerEngine refers to these tensors elsewhere as well."""
        live = [_tensors(layer) for layer in self._layers]
        for layer, now, before in zip(self._layers, live, self._kept, strict=True):
            if now and not before:
                layer.reset_fp8_meta_tensors()
        had_some = [index for index, before in enumerate(self._kept) if before]
        _copy([self._kept[index] for index in had_some], [live[index] for index in had_some])

    def reset(self) -> None:
        """Scales of one and empty histories, as before anything was cast."""
        for layer in self._layers:
            if _tensors(layer):
                layer.reset_fp8_meta_tensors()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """A context whose passes leave no trace."""
        self.keep()
        yield
        self.restore()


def _tensors(layer: Any) -> list[Tensor]:
    states = [layer.fp8_meta.get(way) for way in ("scaling_fwd", "scaling_bwd")]
    return [x for state in states if hasattr(state, "amax_history") for x in (state.scale, state.amax_history)]


@torch.no_grad()
def _copy(sources: Sequence[list[Tensor]], targets: Sequence[list[Tensor]]) -> None:
    """One launch for hundreds of small tensors."""
    if any(sources):
        torch._foreach_copy_(list(chain.from_iterable(targets)), list(chain.from_iterable(sources)))
