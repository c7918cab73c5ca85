"""From the run's config to Megatron objects: the one place where our keys become Megatron's fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config, unwrap_model

from megatron_depthattn.config import RunConfig
from megatron_depthattn.config.precision import data_parallel_fields, optimizer_fields, transformer_fields
from megatron_depthattn.config.resolve import GPU, resolve
from megatron_depthattn.methods.definitions import DEFINITIONS
from megatron_depthattn.model.compiled import compile_layers
from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.initialization import initialize_weights
from megatron_depthattn.model.transformer_config import DepthAttentionConfig
from megatron_depthattn.parallel.schedule import INTERLEAVED_WAITS_FOR_SENDS
from megatron_depthattn.train.fp8_state import Fp8State
from megatron_depthattn.train.hardware import adds_gradients, resolve_here

Chunks = list[DistributedDataParallel]


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
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=model.ffn_hidden_size,
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        method=model.effective_method,
        method_settings=dataclasses.asdict(getattr(model, model.method)) if model.method in DEFINITIONS else {},
        depth_attention_stride=depth.stride,
        depth_attention_recent_window=depth.recent_window,
        depth_attention_op=depth.op,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=config.precision.dtype == "bf16",
        **transformer_fields(config.precision),
        # Of q and k one by one, so v is there to be mixed.
        apply_rope_fusion=model.spec == "te" and not only_counted,
        recompute_granularity=config.recompute.granularity,
        recompute_method=config.recompute.method,
        recompute_num_layers=config.recompute.num_layers,
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


def build_chunk(
    config: RunConfig,
    megatron: DepthAttentionConfig,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    first_chunk: GPTModel | None = None,
) -> GPTModel:
    """One pipeline chunk, its weights not set yet; by default the whole model. Arguments as `build_gpt_model`."""
    return build_gpt_model(
        megatron,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        rotary_base=config.model.rotary_base,
        tie_embeddings=config.model.tie_embeddings,
        backend=resolve_here(config).config.model.spec,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        first_chunk=first_chunk,
    )


def build_model(config: RunConfig, device: torch.device, *, bucket_size: int | None = None) -> Chunks:
    """This rank's pipeline chunks, initialised, in data-parallel wrappers.

    ``bucket_size``: elements of a bucket where communication is overlapped; None: Megatron's, 40 million or more.
    """
    megatron = transformer_config(config)
    if megatron.tp_comm_overlap:
        initialize_userbuffers(config)
    num_chunks = config.parallel.virtual_pipeline
    overlap_gather = bool(config.parallel.overlap_param_gather)
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
            first_chunk=unwrap_model(chunks[0]) if chunks else None,
        ).to(device)
        Fp8State([model]).reset()  # else the weights that are replaced now would stay in the histories
        initialize_weights(model, seed=config.run.seed, init_std=config.model.init_std)
        if config.model.compile:
            compile_layers(model)
        half = Float16Module(megatron, model) if megatron.bf16 else model
        chunks.append(DistributedDataParallel(megatron, ddp, half, disable_bucketing=index > 0))
    hooks = get_model_config(chunks[0])
    assert all(get_model_config(chunk) is hooks for chunk in chunks), (
        "every chunk must share the config that holds the hooks"
    )
    hooks.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:  # the schedules reduce nothing before the last microbatch
        hooks.no_sync_func = [chunk.no_sync for chunk in chunks] if num_chunks > 1 else chunks[0].no_sync
    if overlap_gather and num_chunks > 1:  # the schedule asks for a chunk's weights while another one computes
        hooks.param_sync_func = [chunk.start_param_sync for chunk in chunks]
    if config.model.fused_gradient_accumulation:
        for chunk in chunks:
            _fuse_gradient_accumulation(chunk)
    return chunks


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
    """AdamW over all chunks (Megatron's distributed optimizer) and its cosine schedule, counted in steps."""
    settings = config.optimizer
    bf16 = config.precision.dtype == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.lr * settings.min_lr_ratio,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.grad_clip,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=bool(config.parallel.overlap_param_gather),
            **optimizer_fields(config.precision),
        ),
        chunks,  # Megatron's default overrides keep weight decay off one-dimensional parameters: the norms
    )
    for adam in torch_adams(optimizer):
        for group in adam.param_groups:
            group["fused"] = True  # one pass over weights and moments in place of ten; Megatron has no setting for it
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    return optimizer, build_schedule(config, optimizer)


def torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The inner optimizers that are torch's own; others keep their step in the parameter group."""
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [adam for adam in inner if isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]


def build_schedule(config: RunConfig, optimizer: MegatronOptimizer | torch.optim.Optimizer) -> OptimizerParamScheduler:
    """Megatron's cosine schedule over the parameter groups of ``optimizer``, counted in steps."""
    settings, steps = config.optimizer, config.train.steps
    return OptimizerParamScheduler(
        optimizer,  # it touches nothing but the parameter groups
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=min(round(settings.warmup_ratio * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # A resumed run follows its own config, not that of the run that saved the checkpoint.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
