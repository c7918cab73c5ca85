"""The config of a run: every key, its default and its meaning.

The dotted path of a field is its key. `load.py` reads files and command lines into these classes, `checks.py`
holds what they cannot be.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_depthattn.config.batch_sizes import BatchSizes
from megatron_depthattn.config.sizes import parse_bytes
from megatron_depthattn.methods.definitions import effective_method


@dataclass(kw_only=True, frozen=True)
class RunDirConfig:
    dir: str = ""
    """Folder of the run: config.yaml, log.txt, metrics.jsonl, checkpoints/, tensorboard/. Required."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the samples."""


@dataclass(kw_only=True, frozen=True)
class EngineConfig:
    name: Literal["megatron", "deepspeed"] = "megatron"
    """Who owns gradients and optimizer."""
    zero_stage: int = 0
    """DeepSpeed's ZeRO stage, 0 to 3; 0 with the Megatron engine."""
    offload_optimizer: bool = False
    """Keep the optimizer's fp32 weights and moments in host memory and step there; DeepSpeed from ZeRO stage 1."""


@dataclass(kw_only=True, frozen=True)
class DepthConfig:
    enabled: bool = True
    """Mix each layer's value with its sources' values; false: the vanilla model, with the same weights. Read where
    model.method is depth_attention."""
    stride: int | None = None
    """Layers 0, stride, 2·stride, ... are sources of every later layer; null: half the layers (of one loop, or of all
    with loop_sources=unrolled)."""
    recent_window: int = 0
    """This many layers just before a layer are its sources as well."""
    loop_sources: Literal["same_layer", "unrolled"] = "same_layer"
    """Of a looped model. same_layer: sources are earlier layers of the same loop, and the layer itself in every loop
    before; unrolled: stride and recent_window count on through all loops."""
    weights: Literal["softmax", "uniform"] = "softmax"
    """Weights over a layer's sources and itself: softmax of the scores, or uniform (an ablation of the paper)."""
    mixes: Literal["value", "key", "key_value"] = "value"
    """What is mixed with these weights before self-attention reads it (key and key_value: ablations of the paper)."""
    op: Literal["auto", "lean", "triton", "reference"] = "auto"
    """Code of the mix: lean recomputes its intermediates in backward, triton does so in one GPU kernel each way (GPUs
    only), reference is the fp32 definition; auto: triton on GPUs, lean on CPUs (config/resolve.py)."""


@dataclass(kw_only=True, frozen=True)
class DenseFormerConfig:
    period: int = 1
    """Blocks from one average to the next; 1: one after every block."""
    dilation: int = 1
    """An average reads every dilation-th earlier hidden state, counted back from its own; 1: all of them."""


@dataclass(kw_only=True, frozen=True)
class AttnResConfig:
    block_size: int = 12
    """Sublayers, two a layer, from one snapshot of the residual stream to the next."""


@dataclass(kw_only=True, frozen=True)
class MHCConfig:
    num_streams: int = 4
    """Residual streams."""


@dataclass(kw_only=True, frozen=True)
class ModelConfig:
    method: Literal["depth_attention", "vanilla", "denseformer", "attnres", "mhc"] = "depth_attention"
    """What layers share beside the hidden state, see docs/methods.md; vanilla: nothing."""
    num_layers: int = 8
    """Decoder layers that hold weights."""
    hidden_size: int = 192
    """Width of the residual stream."""
    num_attention_heads: int = 6
    """Query heads."""
    num_query_groups: int = 2
    """Key/value heads; divides num_attention_heads."""
    kv_channels: int = 32
    """Size of one head; heads times this need not equal hidden_size."""
    ffn_hidden_size: int = 512
    """Inner width of the SwiGLU block."""
    vocab_size: int = 4096
    """Rows of the embedding and of the output layer; at least the tokenizer's, padding rows included."""
    max_position_embeddings: int = 2048
    """Longest sequence the exported model declares, in tokens."""
    rotary_base: float = 10000.0
    """RoPE theta."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm (q and k norms included; those are always on)."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation, the same at every depth."""
    tie_embeddings: bool = False
    """Use the embedding's weight as the output layer's."""
    num_loops: int = 1
    """Times the stack of layers is run with the same weights."""
    spec: Literal["auto", "local", "te"] = "auto"
    """Layer backend: local (PyTorch, CPU or GPU) or te (TransformerEngine, GPU); auto: te where it can be imported and
    supports the config, else local, once for all ranks at the start of a run (config/resolve.py)."""
    compile: bool = False
    """Compute local layers' norms, SwiGLU and mHC's connectors in kernels that torch.compile builds at first use."""
    fused_swiglu: bool | None = None
    """Compute SwiGLU, and its gradient, in one kernel that torch.compile builds at first use; null: on GPUs, and where
    model.compile is true."""
    fused_cross_entropy: bool | None = None
    """Compute the loss, and its gradient, in kernels that torch.compile builds at first use, where the dtype is bf16;
    null: on GPUs."""
    fused_gradient_accumulation: bool | None = None
    """Let the matrix product of a weight's gradient add to the sum over microbatches; null: where the layers have a
    kernel for it (spec te, Apex's on GPUs, torch's on CPUs). Megatron engine; not for looped models."""
    depth_attention: DepthConfig = field(default_factory=DepthConfig)
    denseformer: DenseFormerConfig = field(default_factory=DenseFormerConfig)
    attnres: AttnResConfig = field(default_factory=AttnResConfig)
    mhc: MHCConfig = field(default_factory=MHCConfig)

    @property
    def effective_method(self) -> str:
        """model.method, where Depth-Attention that is not enabled is vanilla."""
        return effective_method(self.method, self.depth_attention.enabled)


@dataclass(kw_only=True, frozen=True)
class ParallelConfig:
    tensor: int = 1
    """Ranks that share each layer's matrices."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Chunks of layers held by each stage (interleaved schedule); 1: the plain 1F1B schedule."""
    first_stage_layers: int | None = None
    """Effective layers of the first stage, all its chunks together; null: as many as the stages between."""
    last_stage_layers: int | None = None
    """Those of the last stage; null: as many as the stages between."""
    pipeline_layout: str | None = None
    """What every chunk holds, in model order, as Megatron-Core writes it: E the embedding, t a layer, L the loss, |
    between chunks, such as Et*3|(tt|)*2tL; null: the layers are cut evenly, but for the two keys above."""
    context: int = 1
    """Ranks that share each sequence."""
    sequence: bool = False
    """Sequence parallel: norms and residuals keep 1/tensor of the positions."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients bucket by bucket while backward computes the next; null: on GPUs, where several ranks hold the
    same weights. Megatron engine; not for looped models in several pipeline chunks."""
    overlap_param_gather: bool | None = None
    """Gather updated weights bucket by bucket while the next forward pass runs; null: as overlap_grad_reduce, which it
    needs."""
    tp_comm_overlap: bool = False
    """Overlap the collectives of tensor-parallel ranks with the matrix products that they feed, through
    TransformerEngine's userbuffers; needs model.spec=te, bf16, tensor above 1 and sequence."""


@dataclass(kw_only=True, frozen=True)
class PrecisionConfig:
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations in forward and backward; the optimizer keeps fp32 copies."""
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """FP8 recipe of the linear layers (config/precision.py); null: none. Needs bf16 and TransformerEngine's layers."""
    fp8_params: bool = False
    """Keep the linear layers' weights in FP8 between steps as well; the optimizer's copy stays fp32."""
    fp8_attention: bool = False
    """Run core attention in FP8 as well; the mix, which comes before it, never is."""
    bf16_first_layers: int = 0
    """This many layers at the bottom stay in bf16."""
    bf16_last_layers: int = 0
    """This many layers at the top stay in bf16."""


@dataclass(kw_only=True, frozen=True)
class RecomputeConfig:
    granularity: Literal["selective", "full"] | None = None
    """Recomputed in backward: selective, core attention; full, whole layers; null, nothing."""
    method: Literal["uniform", "block"] | None = None
    """With full: every group of num_layers layers (uniform) or the first num_layers of a chunk (block)."""
    num_layers: int | None = None
    """With full: layers of a group (uniform) or recomputed layers of a chunk (block)."""


@dataclass(kw_only=True, frozen=True)
class StreamConfig:
    path: str
    """Folder with train/ and val/ MDS shards, local or a remote URL."""
    proportion: float
    """Share of the samples that come from here, relative to the other streams' proportions."""


@dataclass(kw_only=True, frozen=True)
class StageConfig:
    from_step: int
    """The first step of the run, counted from 1, that reads in these proportions."""
    proportions: list[float]
    """One for each of data.streams, in their order; 0: the stream rests."""


@dataclass(kw_only=True, frozen=True)
class DataConfig:
    path: str = ""
    """Folder with train/ and val/ MDS shards, local or a remote URL. This or streams is required to train."""
    streams: list[StreamConfig] | None = None
    """Several such folders, mixed: a list of {path, proportion}; null: data.path alone."""
    stages: list[StageConfig] | None = None
    """Other proportions of the streams from some steps of the run on: a list of {from_step, proportions}, one number a
    stream; until the first of them the streams' own hold, null: always (docs/streaming.md)."""
    held_out: dict[str, str] | None = None
    """Further held-out text by name, {name: folder or URL}: its val/ split (train/ where it has no other) is evaluated
    whenever the val split of data.path is."""
    cache: str | None = None
    """Local folder of each node for downloaded and expanded shards; null: none, for local paths."""
    cache_limit: int | str | None = None
    """Size of data.cache, in bytes or as 200gb (also kb, mb, tb), beyond which the least needed shards leave it; null:
    none do (docs/streaming.md)."""
    predownload: int | None = None
    """Shards of the samples that come within so many of the order are fetched before they are needed; null: with a
    remote corpus 8 global batches or the samples of 4 shards, whichever is more, up to 65536; 0: none."""
    sequence_length: int = 256
    """Tokens of a sample that the model reads."""
    document_mask: bool = False
    """Attention stays inside a document, positions begin anew with each, and nothing is predicted across a border
    (docs/streaming.md); false: a sample is one text, its documents parted by EOS alone."""
    shuffle: bool = True
    """Visit the samples in an order drawn from run.seed; false: in the order they are stored."""
    num_workers: int = 1
    """Loader processes of each rank that reads data; 0: read in the training process."""
    skip_samples: int = 0
    """Samples of the shuffled order that are passed over at the start: those that a run which this one starts from has
    read. metrics.jsonl counts what this run itself has read."""
    log_samples: bool = False
    """Write the ids of the samples of every step to <run.dir>/samples/."""

    @property
    def cache_bytes(self) -> int | None:
        """What data.cache_limit stands for."""
        return None if self.cache_limit is None else parse_bytes(self.cache_limit)

    @property
    def sources(self) -> list[StreamConfig]:
        """The streams to read, or data.path as the only one."""
        return self.streams or [StreamConfig(path=self.path, proportion=1.0)]

    @property
    def paths(self) -> dict[str, str]:
        """Every corpus that a run reads, by its key."""
        streams = {f"data.streams[{number}].path": stream.path for number, stream in enumerate(self.streams or [])}
        held_out = {f"data.held_out.{name}": path for name, path in (self.held_out or {}).items()}
        return (streams or {"data.path": self.path}) | held_out


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    steps: int = 200
    """Optimizer steps of the whole run; the learning rate's schedule is laid out over them."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all ranks, and of one batch of an evaluation; with batch_ramp, of the steps
    at its end."""
    batch_ramp: list[int] | None = None
    """[start, increment, samples]: the first steps have start sequences, and over this many samples it becomes
    global_batch_size, increment by increment (docs/schedules.md). The learning rate's schedule then counts samples;
    null: every step has global_batch_size."""
    micro_batch_size: int = 4
    """Sequences of one forward pass of one model replica."""
    stop_after: int | None = None
    """Save and stop after this many steps of this process; null: run to train.steps."""
    eval_interval: int | None = None
    """Steps between evaluations on the val split; null: never."""
    eval_batches: int = 8
    """Global batches of one evaluation."""
    log_interval: int = 10
    """Steps between lines on the console; metrics.jsonl has every step."""
    depth_interval: int | None = 100
    """Steps between records of Depth-Attention's weights; the first step and the last have one, too; null: never."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """When loss or gradient is not finite: stop the run, or leave the step's update out and go on."""
    max_skipped_in_a_row: int = 10
    """With skip: stop when this many steps in a row were not finite."""
    hang_timeout: float | None = 600.0
    """Seconds without a finished step, evaluation batch or tensor of a checkpoint after which a rank counts as hung:
    the stacks of all ranks are written to <run.dir>/stacks and the job ends with exit code 70; null: wait for ever."""
    max_restarts_without_progress: int | None = 5
    """Starts from one step with the same config and code, after which the next one fails; null: no limit."""

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of each step."""
        return BatchSizes.of(self.global_batch_size, self.batch_ramp)


@dataclass(kw_only=True, frozen=True)
class MuonConfig:
    momentum: float = 0.95
    """Decay of the mean of the gradients."""
    nesterov: bool = True
    """Update by the mean with the newest gradient counted once more."""
    ns_steps: int = 5
    """Newton-Schulz steps of an update."""
    coefficients: Literal["quintic", "simple", "polar_express"] = "quintic"
    """Of these steps' polynomials, by the names of the emerging-optimizers package: each of quintic's five steps has
    its own, simple has one for all (Muon's first, and torch.optim.Muon's), polar_express is of arXiv 2505.16932."""
    scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """An orthogonal update is multiplied by sqrt(max(rows, columns)) (spectral), sqrt(rows / columns) (unit_rms_norm)
    or that, but at least 1 (shape_scaling); the last two need a learning rate of their own."""
    extra_scale_factor: float = 0.2
    """And by this; 0.2 with spectral matches AdamW's updates, so that its learning rate and decay carry over."""


@dataclass(kw_only=True, frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers and AdamW for the rest, see docs/optimizers.md; needs Python 3.12,
    Megatron-Core 0.19 and the emerging-optimizers package."""
    lr: float = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr_ratio: float = 0.1
    """Lowest learning rate after the warm-up, as a fraction of lr: that of the last step, and inverse_sqrt's floor;
    constant does not read it."""
    warmup_ratio: float = 0.02
    """Fraction of train.steps (with train.batch_ramp of all samples) over which the learning rate rises from 0 to lr,
    under every schedule."""
    schedule: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    """The learning rate after the warm-up (docs/schedules.md): a cosine or a line down to the last step; wsd, constant
    and then a decay; constant; or lr * sqrt(warm-up / step)."""
    decay_ratio: float = 0.2
    """With wsd: the last fraction of train.steps (with train.batch_ramp of all samples), over which the learning rate
    falls; 1: from the first step on."""
    decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """With wsd: how it falls, from 1 to 0 of what is above min_lr_ratio, over the share x of the decay: 1 - x,
    (1 + cos(pi x)) / 2, 2^(1 - x) - 1, or 1 - sqrt(x)."""
    weight_decay: float = 0.1
    """Decoupled decay, Muon's as well; norm weights are excluded."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    eps: float = 1e-8
    """AdamW's addend to the denominator."""
    grad_clip: float = 1.0
    """Largest L2 norm of the whole gradient; 0: no clipping."""
    mup: int | None = None
    """muP's base width, the model.hidden_size at which lr and model.init_std were tuned; null: no muP."""
    muon: MuonConfig = field(default_factory=MuonConfig)


@dataclass(kw_only=True, frozen=True)
class CheckpointConfig:
    dir: str | None = None
    """Folder of the step folders; null: <run.dir>/checkpoints."""
    interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int | None = 2
    """Newest complete checkpoints kept, at least 2 if a damaged one is to have one to fall back to; null: all."""
    keep_steps: list[int] | None = None
    """Steps whose checkpoints are saved beside those of interval and stay, whatever keep says; null: none."""
    load: str | None = None
    """null: start fresh; latest: the run's newest complete one, fresh if there is none; or a step folder."""
    start_from: str | None = None
    """Begin a new run, at step 0, with the weights of a step folder, or of the newest one of a run's folder. Whoever
    starts it again resumes its own checkpoint, as if it had begun from initial weights. null: initial weights."""
    start_optimizer: bool = False
    """Take the optimizer's state (fp32 weights, moments, Adam's count of steps) from there as well."""
    async_save: bool = False
    """Write in the background while training continues; needs host memory for a copy of what the rank writes."""


@dataclass(kw_only=True, frozen=True)
class PreflightConfig:
    enabled: bool = True
    """Compare the machines of all ranks before the model is built."""
    on_problem: Literal["stop", "warn"] = "stop"
    """What to do where ranks differ, or something is missing: stop, or log a warning and continue."""
    timeout: float = 45.0
    """Seconds that a rank may stay silent before the others give up and name it; more where imports are slower. With
    0.1 s for each rank of the world also the limit of each stage of joining."""


@dataclass(kw_only=True, frozen=True)
class WandbConfig:
    project: str | None = None
    """Weights & Biases project that gets the run's curves, config and evaluations; null: none. Needs the extra
    `[wandb]`."""
    name: str | None = None
    """Name of the run there; null: WANDB_NAME, or that of run.dir; in a study its id, in an array with its task."""
    entity: str | None = None
    """User or team; null: WANDB_ENTITY, or the account's default."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline: write below run.dir only, for `wandb sync`; disabled: none at all; null: WANDB_MODE, or online."""


@dataclass(kw_only=True, frozen=True)
class LogConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(kw_only=True, frozen=True)
class RunConfig:
    """All settings of a run. Frozen: derive a variant with `dataclasses.replace`."""

    run: RunDirConfig = field(default_factory=RunDirConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def width_multiplier(self) -> float:
        """Width over muP's base width; 1 without muP."""
        return self.model.hidden_size / (self.optimizer.mup or self.model.hidden_size)

    @property
    def checkpoint_dir(self) -> str:
        """`checkpoint.dir`, or its default below the run's folder."""
        return self.checkpoint.dir or str(Path(self.run.dir) / "checkpoints")
