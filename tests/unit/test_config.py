"""The config's surface, its layering, its errors, and every YAML that ships."""

import re
from pathlib import Path

import pytest

from megatron_depthattn.config import (
    RunConfig,
    StreamConfig,
    config_keys,
    config_reference,
    from_dict,
    load_config,
    save_config,
    to_dict,
    validate,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"quickstart": 2, "410m": 8, "360m": 32, "500m": 32, "710m": 32, "1.5b": 64, "3b": 64}
"""Name: ranks of a plausible run."""
NO_OVERLAYS = (CONFIGS, CONFIGS / "lm_eval", CONFIGS / "studies")
OVERLAYS = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent not in NO_OVERLAYS)

# Growing the surface is a decision: it shows up as a change of this list.
KEYS = {
    "run": "dir seed",
    "engine": "name zero_stage offload_optimizer",
    "model": (
        "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size "
        "vocab_size max_position_embeddings rotary_base norm_epsilon init_std tie_embeddings num_loops "
        "spec compile fused_swiglu fused_cross_entropy fused_gradient_accumulation method"
    ),
    "model.depth_attention": "enabled stride recent_window loop_sources weights mixes op",
    "model.denseformer": "period dilation",
    "model.attnres": "block_size",
    "model.mhc": "num_streams",
    "parallel": (
        "tensor pipeline virtual_pipeline first_stage_layers last_stage_layers pipeline_layout context "
        "sequence overlap_grad_reduce overlap_param_gather tp_comm_overlap"
    ),
    "precision": "dtype fp8 fp8_params fp8_attention bf16_first_layers bf16_last_layers",
    "recompute": "granularity method num_layers",
    "data": (
        "path stages cache cache_limit predownload sequence_length document_mask shuffle num_workers log_samples "
        "skip_samples streams held_out"
    ),
    "train": (
        "steps global_batch_size batch_ramp micro_batch_size stop_after eval_interval eval_batches "
        "log_interval depth_interval on_non_finite max_skipped_in_a_row hang_timeout "
        "max_restarts_without_progress"
    ),
    "optimizer": (
        "name lr min_lr_ratio warmup_ratio schedule decay_ratio decay_style weight_decay beta1 beta2 eps grad_clip mup"
    ),
    "optimizer.muon": "momentum nesterov ns_steps coefficients scale_mode extra_scale_factor",
    "checkpoint": "dir interval keep keep_steps load start_from start_optimizer async_save",
    "preflight": "enabled on_problem timeout",
    "log.wandb": "project name entity mode",
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def base(tmp_path):
    """A config of defaults that validates on one rank."""
    return write(tmp_path / "base.yaml", "run: {dir: out}\ndata: {path: shards}\n")


# ---------------------------------------------------------------------------------------------- surface


def test_surface_is_frozen():
    assert sorted(config_keys()) == sorted(f"{section}.{key}" for section in KEYS for key in KEYS[section].split())


def test_reference_has_every_key_with_a_meaning():
    keys = config_reference()
    assert [key.name for key in keys] == list(config_keys())
    assert all(key.meaning.endswith((".", "null: null.")) and key.type for key in keys)
    (fp8,) = (key for key in keys if key.name == "precision.fp8")
    assert (fp8.type, fp8.default) == ("one of delayed, tensorwise, blockwise, mxfp8 or null", None)


# --------------------------------------------------------------------------------------------- layering


def test_later_layers_win(tmp_path):
    write(tmp_path / "a.yaml", "train: {steps: 1, micro_batch_size: 1, global_batch_size: 1}")
    write(tmp_path / "sub" / "b.yaml", "base: [../a.yaml]\ntrain: {micro_batch_size: 2, global_batch_size: 2}")
    overlay = write(tmp_path / "c.yaml", "train: {global_batch_size: 3}")
    config = load_config(tmp_path / "sub" / "b.yaml", ["train.log_interval=4", str(overlay)])
    assert config.train.steps == 1
    assert config.train.micro_batch_size == 2
    assert config.train.global_batch_size == 3
    assert config.train.log_interval == 4
    assert load_config(tmp_path / "sub" / "b.yaml", ["train.steps=9", str(overlay)]).train.steps == 9
    assert config.train.eval_batches == RunConfig().train.eval_batches


def test_command_line_wins_over_an_overlay_named_after_it(tmp_path, base):
    overlay = write(tmp_path / "c.yaml", "train: {steps: 3}")
    assert load_config(base, ["train.steps=9", str(overlay)]).train.steps == 9


def test_splits_by_name_are_replaced_and_not_merged(tmp_path, base):
    write(tmp_path / "a.yaml", "base: base.yaml\ndata: {held_out: {code: ~/code, math: y}}\n")
    config = load_config(tmp_path / "a.yaml")
    assert config.data.held_out == {"code": str(Path("~/code").expanduser()), "math": "y"}
    assert {"data.path": "shards", "data.held_out.math": "y"}.items() <= config.data.paths.items()
    save_config(config, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml") == config
    assert load_config(tmp_path / "a.yaml", ["data.held_out={web: z}"]).data.held_out == {"web": "z"}
    assert load_config(tmp_path / "a.yaml", ["data.held_out=null"]).data.held_out is None


def test_a_single_base_is_a_plain_path(tmp_path, base):
    child = write(tmp_path / "child.yaml", "base: base.yaml\nmodel:\n")  # an empty section sets nothing
    assert load_config(child) == load_config(base)


def test_base_cycle_is_rejected(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml includes itself .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_missing_files_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    child = write(tmp_path / "child.yaml", "base: gone.yaml")
    with pytest.raises(ValueError, match=r"gone\.yaml \(named under 'base' in .*child\.yaml\) does not exist"):
        load_config(child)


@pytest.mark.parametrize("text", ["train: {steps: 1", "train: {steps: 1}\ntrain: {steps: 2}", "- 1", "base: 3"])
def test_malformed_files_are_rejected(tmp_path, text):
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_config(write(tmp_path / "bad.yaml", text))


def test_a_run_folder_may_contain_an_equals_sign(tmp_path, base):
    overlay = write(tmp_path / "lr=1e-3" / "config.yaml", "train: {steps: 3}")
    assert load_config(base, [str(overlay)]).train.steps == 3
    assert load_config(base, ["data.path=odd.yaml"]).data.path == "odd.yaml"


@pytest.mark.parametrize(
    "text", ["${run.dirs}/saved", "s3://b/${oc.env:DEPTHATTN_SECRET,x}", "${", "a${}", "\\${a}", "$${"]
)
def test_text_with_a_dollar_is_literal(tmp_path, base, monkeypatch, text):
    """A config from elsewhere could otherwise send an environment variable to a bucket, or into a folder's name."""
    monkeypatch.setenv("DEPTHATTN_SECRET", "hunter2")
    overlay = write(tmp_path / "overlay.yaml", f"checkpoint: {{dir: '{text}'}}")
    for given in ([str(overlay)], [f"checkpoint.dir={text}"]):
        config = load_config(base, [*given, "data.path=", f"data.streams=[{{path: '{text}', proportion: 1}}]"])
        assert config.checkpoint.dir == text
        assert config.data.streams == [StreamConfig(path=text, proportion=1.0)]
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config


def test_merge_keys_of_yaml(tmp_path):
    path = write(tmp_path / "a.yaml", "data: {streams: [&a {path: x, proportion: 0.5}, {<<: *a, path: y}]}")
    assert [(stream.path, stream.proportion) for stream in load_config(path).data.sources] == [("x", 0.5), ("y", 0.5)]


def test_a_saved_config_of_an_earlier_version_has_its_keys():
    assert from_dict({"train": {"max_fruitless_starts": 7}}, "a checkpoint").train.max_restarts_without_progress == 7


def test_a_reference_to_a_key_is_an_error(base):
    """As text it would be one folder for all seeds."""
    with pytest.raises(ValueError, match=r"run\.dir is 'runs/\$\{run\.seed\}' .*write what it stands for"):
        load_config(base, ["run.dir=runs/${run.seed}"])


@pytest.mark.parametrize("text", ["???", "${train.batches}", "yes"])
@pytest.mark.parametrize("key", ["train.steps", "data.shuffle", "model.spec"])
def test_what_omegaconf_would_take(tmp_path, base, key, text):
    """Nothing is silently the default, another key's value, or true."""
    overlay = write(tmp_path / "overlay.yaml", f"{key}: '{text}'")
    for given, source in ((str(overlay), str(overlay)), (f"{key}={text}", "the command line")):
        with pytest.raises(ValueError, match=re.escape(f"{key} is string '{text}' (from {source}); expected")):
            load_config(base, [given])


def test_tilde_is_the_home_folder(tmp_path, base, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    overlay = write(
        tmp_path / "home.yaml", "run: {dir: ~/runs}\ndata: {path: '', streams: [{path: ~/a, proportion: 1}]}"
    )
    config = load_config(base, [str(overlay), "checkpoint.dir=~/x", "data.cache=~"])
    assert (config.run.dir, config.checkpoint.dir, config.data.cache) == (
        "/home/someone/runs",
        "/home/someone/x",
        "/home/someone",
    )
    assert config.data.sources[0].path == "/home/someone/a"
    assert load_config(base, ["data.cache=null"]).data.cache is load_config(base, ["data.cache="]).data.cache is None
    assert load_config(base, ["run.seed=007"]).run.seed == 7


def test_checkpoint_dir_defaults_below_the_run(base):
    assert load_config(base).checkpoint_dir == "out/checkpoints"
    assert load_config(base, ["checkpoint.dir=elsewhere"]).checkpoint_dir == "elsewhere"


def test_round_trip(tmp_path):
    odd = ["run.dir=0E0", "data.cache=12e03", "data.path=???"]
    config = load_config(CONFIGS / "3b.yaml", ["optimizer.eps=1e-9", "model.depth_attention.stride=null", *odd])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert to_dict(config)["model"]["depth_attention"]["stride"] is None


# ---------------------------------------------------------------------------------------- keys and types


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.num_layer", "model.num_layers"),
        ("model.depth_atention.stride", "model.depth_attention.stride"),
        ("train.lr", "optimizer.lr"),
        ("paralel.tensor", "parallel.tensor"),
    ],
)
def test_unknown_key_names_source_and_nearest(tmp_path, base, key, nearest):
    message = "unknown key '{}' in {}; the nearest valid key is '{}'"
    with pytest.raises(ValueError) as raised:
        load_config(base, [f"{key}=1"])
    assert str(raised.value) == message.format(key, "the command line", nearest)
    nested = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(key.split(".")))
    overlay = write(tmp_path / "typo.yaml", nested.rstrip("\n") + " 1")
    with pytest.raises(ValueError) as raised:
        load_config(base, [str(overlay)])
    assert str(raised.value) == message.format(key, overlay, nearest)


def test_a_section_takes_no_value(base):
    with pytest.raises(ValueError, match=r"'precision' in the command line is a section .*precision\.dtype"):
        load_config(base, ["precision=bf16"])


@pytest.mark.parametrize("argument", ["train.steps", "=3", "--steps", "data.streams={", "train.steps=[1,"])
def test_malformed_arguments_are_rejected(base, argument):
    with pytest.raises(ValueError, match=re.escape(f"argument '{argument}'")):
        load_config(base, [argument])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.steps=many", "train.steps is string 'many' (from the command line); expected an integer"),
        ("train.steps=1.5", "train.steps is number 1.5 (from the command line); expected an integer"),
        ("train.steps=true", "train.steps is true (from the command line); expected an integer"),
        ("train.steps=null", "train.steps is null (from the command line); expected an integer"),
        ("train.steps=[1]", "train.steps is list [1] (from the command line); expected an integer"),
        ("optimizer.lr=fast", "optimizer.lr is string 'fast' (from the command line); expected a number"),
        ("data.shuffle=1", "data.shuffle is integer 1 (from the command line); expected true or false"),
        ("engine.name=jax", "engine.name is string 'jax' (from the command line); expected one of megatron, "
         "deepspeed"),
        ("precision.fp8=e4m3", "precision.fp8 is string 'e4m3' (from the command line); expected one of "
         "delayed, tensorwise, blockwise, mxfp8 or null"),
        ("model.spec=null", "model.spec is null (from the command line); expected one of auto, local, te"),
        ("train.steps=10 #1", "train.steps is string '10 #1' (from the command line); expected an integer"),
        ("train.steps=1:30", "train.steps is string '1:30' (from the command line); expected an integer"),
        ("train.steps=", "train.steps is null (from the command line); expected an integer"),
        ("run.seed=18446744073709551616", "run.seed is an integer of 65 bits (from the command line); set one below "
         "2^63"),
        ("train.steps.count=1", "unknown key 'train.steps.count' in the command line; the nearest valid key is "
         "'train.steps'"),
        ("data.streams=[{pth: a}]", "unknown key 'data.streams.pth' in the command line; the nearest valid key is "
         "'data.streams.path'"),
        ("data.streams=[{path: a}]", "data.streams[0].proportion is missing (in the command line); set it"),
        ("data.held_out=x", "data.held_out is string 'x' (from the command line); expected {name: a string} or null"),
        ("data.held_out={a: [x]}", "data.held_out is section {'a': ['x']} (from the command line); expected "
         "{name: a string} or null"),
        ("run.dir=a\nb", "run.dir is 'a\\nb' (from the command line), which has a control character or is not UTF-8; "
         "leave it out"),
        ("run.dir=a\udcff", "run.dir is 'a\\udcff' (from the command line), which has a control character or is not "
         "UTF-8; leave it out"),
        ("data.path=" + "x" * 4097, "data.path (from the command line) has 4097 characters; set at most 4096"),
    ],
)  # fmt: skip
def test_wrong_types_are_rejected(base, argument, message):
    with pytest.raises(ValueError) as raised:
        load_config(base, [argument])
    assert str(raised.value) == message


def test_numbers_as_people_write_them(tmp_path, base):
    overlay = write(tmp_path / "lr.yaml", "optimizer: {lr: 1e-3, eps: 1E-8, grad_clip: 1}\nmodel.rotary_base: 5e5")
    config = load_config(base, [str(overlay), "optimizer.weight_decay=1e-1"])
    assert config.optimizer.lr == 0.001
    assert config.optimizer.eps == 1e-8
    assert type(config.optimizer.grad_clip) is float
    assert config.optimizer.weight_decay == 0.1
    assert config.model.rotary_base == 500000.0


# ---------------------------------------------------------------------------------------------- validate


def test_sizes(base):
    config = load_config(base, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2",
                                "train.global_batch_size=32"])  # fmt: skip
    sizes = validate(config, 8)
    assert (sizes.data_parallel_size, sizes.num_microbatches, sizes.chunk_layers) == (2, 4, (2, 2, 2, 2))


UNSUPPORTED = [
    (1, "model.num_layers=0", "model.num_layers is 0; set 1 to 65536"),
    (1, "train.stop_after=0", "train.stop_after is 0; set 1 to 2147483647"),
    (1, "optimizer.lr=-1", "optimizer.lr is -1.0; set a number of 0 or more"),
    (1, "model.norm_epsilon=0", "model.norm_epsilon is 0.0; set a number above 0"),
    (1, "optimizer.lr=.nan", "optimizer.lr is nan; set a number of 0 or more"),
    (1, "optimizer.lr=.inf", "optimizer.lr is inf; set a number of 0 or more"),
    (1, "train.hang_timeout=.inf", "train.hang_timeout is inf; set seconds above 0, up to 2678400"),
    (1, "train.steps=100000000", "train.steps is 100000000; set 1 to 99999999"),
    (1, "model.num_layers=1000000000", "model.num_layers is 1000000000; set 1 to 65536"),
    (1, "optimizer.mup=64 optimizer.name=muon", "set optimizer.mup=null, or optimizer.name=adamw"),
    (1, "optimizer.mup=0", "optimizer.mup is 0; set 1 to 2147483647"),
    (1, "model.hidden_size=4294967296", "model.hidden_size is 4294967296; set 1 to 2147483647"),
    (1, "data.num_workers=100000", "data.num_workers is 100000; set 0 to 1024"),
    (1, "data.skip_samples=-1", "data.skip_samples is -1; set 0 to 10^15"),
    (1, "data.predownload=-1", "data.predownload is -1; set 0 to 10000000"),
    (1, "data.cache_limit=200", "data.cache_limit=200 with data.cache=null: there is no cache that it could limit"),
    *(
        (1, f"data.cache_limit={size}", f"data.cache_limit is {size}; set a number of bytes, or one with kb")
        for size in ("0", "-5", "200gbs", "gb", "1e3", "0.1", "9" * 18 + "0gb")
    ),
    (1, "checkpoint.load=a/step_00000001 checkpoint.start_from=b", "set checkpoint.load=latest or null, or"),
    (1, "checkpoint.load=latest checkpoint.start_optimizer=true", "set checkpoint.start_from to a step folder, or ch"),
    (1, "checkpoint.keep_steps=[7,201]", "checkpoint.keep_steps holds 201; set steps from 1 to train.steps=200"),
    (3, "parallel.tensor=3 model.num_query_groups=3 model.ffn_hidden_size=513",
     "set model.vocab_size=4224, or parallel.tensor to what this model allows: 1"),
    (1, "optimizer.beta2=1", "optimizer.beta2 is 1.0; set a number from 0 to 1, 1 excluded"),
    (1, "optimizer.warmup_ratio=1.5", "optimizer.warmup_ratio is 1.5; set a number from 0 to 1"),
    (1, "optimizer.decay_ratio=0", "optimizer.decay_ratio is 0.0; set a number above 0, up to 1"),
    (1, "optimizer.schedule=wsd optimizer.warmup_ratio=0.5 optimizer.decay_ratio=0.6",
     "optimizer.warmup_ratio=0.5 and optimizer.decay_ratio=0.6: the decay would begin before the warm-up has ended"),
    (1, "optimizer.schedule=inverse_sqrt optimizer.warmup_ratio=0.002",
     "warmup_ratio=0.002 of train.steps=200: the learning rate is lr * sqrt(warm-up / step), so it would fall from the "
     "first step on; set a larger optimizer.warmup_ratio, or another optimizer.schedule"),
    *((1, f"train.batch_ramp={ramp}", "; set [start, increment, samples], three integers from 1 to 2147483647, or null")
      for ramp in ("[]", "[4,4]", "[4,4,64,1]", "[0,4,64]", "[4,4,0]", "[4,0,64]", "[4,-4,64]", "[4,4,2147483648]")),
    (1, "train.batch_ramp=[16,4,64]", "train.batch_ramp is [16, 4, 64], which does not lead to "
     "train.global_batch_size=16: the increment is added to the start until the batch is full; set a start below it, "
     "and an increment that divides the difference (0)"),
    (1, "train.batch_ramp=[4,8,64]", "an increment that divides the difference (12)"),
    (2, "train.batch_ramp=[4,4,64]", "train.batch_ramp is [4, 4, 64], of which a batch size is not a multiple of 8 "
     "(train.micro_batch_size=4 times 2 data-parallel replicas, with parallel.virtual_pipeline=1 times "
     "parallel.pipeline=1): every step is split as the full batch is; set a start of 8, and an increment of a multiple "
     "of 8"),
    (1, "train.batch_ramp=[1,1,64] train.micro_batch_size=2 train.global_batch_size=2147483646",
     "set a start of 2, 4, 6, ..., 2147483644, and an increment of a multiple of 2"),
    (2, "train.batch_ramp=[4,4,64] parallel.pipeline=2 parallel.virtual_pipeline=2", "set a start of 8, and an incr"),
    (4, "train.batch_ramp=[4,4,64]", "set a start of none, and an increment of a multiple of 16"),
    (1, "engine.zero_stage=1", "set engine.zero_stage=0 (its optimizer's state"),
    (1, "engine.offload_optimizer=true", "engine.name=megatron: its optimizer stays on its device; set"),
    (1, "engine.name=deepspeed engine.zero_stage=4", "engine.zero_stage is 4; set one of"),
    (2, "engine.name=deepspeed parallel.pipeline=2", "parallel.pipeline is 2 with engine.name=deepspeed"),
    (2, "engine.name=deepspeed parallel.pipeline=2 parallel.virtual_pipeline=2", "set parallel.virtual_pipeline=1"),
    (1, "engine.name=deepspeed engine.offload_optimizer=true", "set engine.zero_stage=1 or more, or engine.offload"),
    (1, "engine.name=deepspeed precision.dtype=bf16", "DeepSpeed would sum gradients in bf16; set engine.zero_stage=1"),
    (1, "optimizer.muon.momentum=1", "optimizer.muon.momentum is 1.0; set a number from 0 to 1, 1 excluded"),
    (1, "optimizer.muon.ns_steps=0", "optimizer.muon.ns_steps is 0; set 1 to 100"),
    (1, "optimizer.muon.extra_scale_factor=0", "optimizer.muon.extra_scale_factor is 0.0; set a number above 0"),
    (1, "optimizer.name=muon engine.name=deepspeed", "set optimizer.name=adamw, or engine.name=megatron"),
    (1, "optimizer.name=muon precision.fp8=delayed precision.dtype=bf16 model.spec=te precision.fp8_params=true",
     "set precision.fp8_params=false, or optimizer.name=adamw"),
    (6, "optimizer.name=muon parallel.tensor=6 model.vocab_size=4098 model.ffn_hidden_size=516",
     "set parallel.tensor=2 or less, or optimizer.name=adamw"),
    (1, "model.mhc.num_streams=1", "model.mhc.num_streams is 1; with one stream nothing is connected"),
    (1, "model.method=denseformer model.denseformer.period=0", "model.denseformer.period is 0; it counts blocks"),
    (1, "model.method=attnres model.attnres.block_size=0", "model.attnres.block_size is 0; it counts sublayers"),
    (1, "model.compile=true model.spec=te precision.dtype=bf16", "set model.compile=false, or model.spec=local"),
    (1, "model.compile=true engine.name=deepspeed", "set model.compile=false, or engine.name=megatron"),
    (1, "model.num_loops=2 engine.name=deepspeed", "set model.num_loops=1 or engine.name=megatron"),
    (1, "model.num_loops=2 model.method=denseformer", "is not defined for a stack that is run again; set model.num_lo"),
    (1, "model.num_loops=2 model.method=mhc", "model.num_loops is 2 with model.method=mhc"),
    (2, "model.num_loops=2 parallel.pipeline=2", "passes each stage once; set parallel.virtual_pi"),
    (2, "model.num_loops=2 parallel.pipeline=2 parallel.virtual_pipeline=3", "or a multiple of it, or parallel.pip"),
    (2, "model.num_loops=2 parallel.pipeline=2 parallel.virtual_pipeline=6", "set model.num_layers=6 or 12, or other"),
    (1, "model.num_loops=2 parallel.virtual_pipeline=2", "set parallel.virtual_pipeline=1 or parallel.pipeline=2"),
    (3, "model.num_loops=2 parallel.pipeline=3 parallel.virtual_pipeline=2", "set model.num_layers=6 or 9, or other"),
    (2, "model.num_loops=2 parallel.pipeline=2 parallel.virtual_pipeline=2 recompute.granularity=full "
     "recompute.method=uniform recompute.num_layers=5", "set recompute.num_layers from 1 to 4"),
    (1, "precision.fp8=delayed model.spec=te", "set precision.dtype=bf16"),
    (2, "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=false",
     "set parallel.overlap_grad_reduce=true"),
    (4, "parallel.overlap_grad_reduce=true model.num_loops=2 parallel.pipeline=2 parallel.virtual_pipeline=2",
     "the chunks of a rank use the same weights, whose gradients are finished once for each chunk"),
    (2, "engine.name=deepspeed parallel.overlap_grad_reduce=true", "set parallel.overlap_grad_reduce=null"),
    (1, "engine.name=deepspeed model.fused_gradient_accumulation=true", "set model.fused_gradient_accumulation=null"),
    (1, "model.num_loops=2 model.fused_gradient_accumulation=true", "overwrites a weight's gradient"),
    (1, "model.fused_cross_entropy=true", "rounds the logits' gradient to bf16; set model.fused_cross_entropy=false"),
    (2, "parallel.tp_comm_overlap=true parallel.tensor=2 model.spec=local",
     "set model.spec=te and precision.dtype=bf16 and parallel.sequence=true, or parallel.tp_comm_overlap=false"),
    (1, "train.hang_timeout=0", "train.hang_timeout is 0.0; set seconds above 0"),
    (1, "data.path=", "data.path is not set: the run has nothing to read"),
    (1, "run.dir=", "run.dir is not set: the run has nowhere to write"),
    (1, "data.path=s3://bucket/shards", "set data.cache to a local folder of each node"),
    (1, 'data.held_out={"code":"s3://bucket/code"} train.eval_interval=5',
     "data.held_out.code is the remote s3://bucket/code and data.cache is null"),
    (1, 'data.held_out={"code":"x"}', "nothing is ever evaluated; set train.eval_interval, or data.held_out=null"),
    (1, 'data.held_out={"a/b":"x"} train.eval_interval=5', "data.held_out has a split named 'a/b'"),
    (1, 'data.held_out={"a":""} train.eval_interval=5', "data.held_out.a is empty; set the folder or URL"),
    (1, "log.wandb.project=a/b", "log.wandb.project is a/b; set a name without these characters"),
    (1, "model.num_query_groups=4", "set num_query_groups to one of 1, 2, 3, 6"),
    (1, "model.kv_channels=33", "model.kv_channels is 33: RoPE turns pairs of channels; set an even number"),
    (3, "parallel.tensor=3", "share one evenly; set parallel.tensor to what this model allows: 1, 2"),
    (4, "parallel.tensor=4", "model.num_attention_heads is 6, which parallel.tensor=4 does not divide"),
    (2, "parallel.tensor=2 model.ffn_hidden_size=511", "equal share; set parallel.tensor to what this model allows: 1"),
    (1, "parallel.virtual_pipeline=2", "set parallel.virtual_pipeline=1 or parallel.pipeline=2 or more"),
    (3, "parallel.pipeline=3", "set model.num_layers=6 or 9, or other stages, or parallel.first_stage_layers"),
    (2, "parallel.pipeline=2 parallel.first_stage_layers=0", "parallel.first_stage_layers is 0; set 1 to"),
    (1, "parallel.last_stage_layers=2", "with parallel.pipeline=1: there is one stage, which holds all layers; set"),
    (1, "parallel.pipeline_layout=Et*8L", "set parallel.pipeline_layout=null, or parallel.pipeline=2 or more"),
    (4, "parallel.pipeline=4 parallel.first_stage_layers=3", "parallel.first_stage_layers to one that fits: 2 or 5"),
    (4, "parallel.pipeline=4 parallel.last_stage_layers=8", "set parallel.last_stage_layers to one that fits: 5"),
    (2, "parallel.pipeline=2 parallel.first_stage_layers=3 parallel.last_stage_layers=3",
     "set parallel.first_stage_layers to one that fits: 5"),
    (2, "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.first_stage_layers=3", "that fits: 2 or 4"),
    (2, "parallel.pipeline=2 parallel.virtual_pipeline=3 parallel.first_stage_layers=3",
     "set parallel.first_stage_layers to one that fits: none does with the other settings"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=Et*4|t*4L parallel.first_stage_layers=4",
     "a layout says the layers of every stage; set one of the two to null"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=Et*4|xt*4L", "Et*4|xt*4L has 'x'; set a layout of E (embedding)"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=Et*8|mL", "has 'm', a layer of multi-token prediction"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=((t*65536)*65536)*65536", "has '('; set a layout of"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=Et*4|t*2|t*2L", "set one of 2 parts, or parallel.pipeline_lay"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=E(tt|)*4L", "has 5 parts, and there are 2 chunks"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=E(tt|)*3ttL", "one of 2 parts, or parallel.virtual_pipeline=2"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=Et*4|t*3L", "has 7 layers (t), and the model 8; set one of 8"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=tE|t*7L", "does not begin with its one E and end with its one L"),
    (2, "parallel.pipeline=2 parallel.pipeline_layout=Et*4L|t*4L", "set one like Ett|tt|ttL"),
    (4, "parallel.pipeline=4 parallel.pipeline_layout=Et*4||t*2|t*2L", "leaves part 1 (from 0) empty, through which"),
    (2, "parallel.pipeline=2 parallel.virtual_pipeline=2 model.num_loops=2 parallel.pipeline_layout=Et*8|t|t*4|t*3L",
     "set one in which every 2 parts hold 8 layers as the first 2 do"),
    (2, "parallel.pipeline=2 parallel.first_stage_layers=2 recompute.granularity=full recompute.method=uniform "
     "recompute.num_layers=3", "does not divide the 2 or 6 layers of a pipeline chunk"),
    (2, "parallel.pipeline=2 parallel.first_stage_layers=2 recompute.granularity=full recompute.method=block "
     "recompute.num_layers=7", "set recompute.num_layers from 1 to 6"),
    (2, "parallel.pipeline=2 parallel.first_stage_layers=2 engine.name=deepspeed", "set parallel.pipeline=1"),
    (1, "recompute.method=uniform", "these two belong to full recompute; set both to null"),
    (1, "recompute.granularity=selective recompute.num_layers=1", "recompute.granularity is selective with"),
    (1, "recompute.granularity=full", "set recompute.method=uniform recompute.num_layers=1"),
    (2, "recompute.granularity=full recompute.method=uniform recompute.num_layers=5 parallel.pipeline=2",
     "set recompute.num_layers from 1 to 4"),
    (2, "recompute.granularity=full recompute.method=uniform recompute.num_layers=3 parallel.pipeline=2",
     "set it to one of 1, 2, 4"),
    (3, "parallel.pipeline=2", "start 2 or 4 ranks"),
    (1, "parallel.pipeline=2", "start 2 ranks"),
    (1, "data.sequence_length=4096", "set model.max_position_embeddings=4096 or a shorter"),
    (2, "parallel.context=2 data.sequence_length=254", "set data.sequence_length=252 or 256"),
    (1, "parallel.sequence=true", "set parallel.sequence=false or parallel.tensor=2 or more"),
    (2, "parallel.sequence=true parallel.tensor=2 data.sequence_length=255",
     "set data.sequence_length=254 or 256"),
    (4, "parallel.sequence=true parallel.tensor=2 parallel.context=2 data.sequence_length=252",
     "set data.sequence_length=248 or 256 or parallel.sequence=false"),
    (3, "", "set train.global_batch_size=12 or 24"),
    (4, "train.global_batch_size=8", "set train.global_batch_size=16, or another train.micro_batch_size"),
    (2, "parallel.pipeline=2 parallel.virtual_pipeline=2 train.global_batch_size=12",
     "set train.global_batch_size=8 or 16 or parallel.virtual_pipeline=1"),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "arguments", "message"), UNSUPPORTED)
def test_errors_say_what_to_set(base, world_size, arguments, message):
    config = load_config(base, arguments.split())
    with pytest.raises(ValueError) as raised:
        validate(config, world_size)
    assert message in str(raised.value)


def test_an_empty_parent_is_no_fresh_start(base, tmp_path):
    """As a template writes it whose variable is not set; on a command line an empty value is null."""
    overlay = write(tmp_path / "branch.yaml", "checkpoint: {start_from: ''}\n")
    with pytest.raises(ValueError, match=r"^checkpoint\.start_from is empty; set a step folder, or null"):
        validate(load_config(base, [str(overlay)]), 1)


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (1, ""),
        (1, "model.spec=te precision.dtype=bf16"),
        (1, "recompute.granularity=full recompute.method=block recompute.num_layers=8"),
        (
            6,
            "parallel.tensor=6 model.vocab_size=4098 model.ffn_hidden_size=516",
        ),  # three ranks share a KV head
        (1, "data.path=s3://bucket/shards data.cache=cache"),
        (1, "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true model.num_loops=2"),
        (
            2,
            "parallel.tp_comm_overlap=true parallel.tensor=2 parallel.sequence=true model.spec=te precision.dtype=bf16",
        ),
        (1, "model.num_loops=3 recompute.granularity=full recompute.method=uniform recompute.num_layers=24"),
        (1, "model.num_loops=2 model.method=vanilla model.spec=te precision.dtype=bf16 precision.fp8=tensorwise"),
        (4, "parallel.pipeline=4 parallel.first_stage_layers=1 parallel.last_stage_layers=1"),
        (3, "parallel.pipeline=3 parallel.first_stage_layers=2 train.global_batch_size=12"),
        (4, "parallel.pipeline=4 parallel.pipeline_layout=E|(t*4|)*2L"),
        (2, "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.first_stage_layers=6 model.num_loops=2"),
        (
            2,
            "parallel.pipeline=2 parallel.pipeline_layout=Et*2|t*6L recompute.granularity=full "
            "recompute.method=block recompute.num_layers=6",
        ),
        # 4 layers a stage, 12 runs of them
        (2, "model.num_loops=3 parallel.pipeline=2 parallel.virtual_pipeline=3"),
        (2, "model.num_loops=2 parallel.pipeline=2 parallel.virtual_pipeline=8"),
        (4, "model.num_loops=2 parallel.sequence=true parallel.tensor=2 parallel.context=2"),
        (4, "parallel.sequence=true parallel.tensor=2 parallel.context=2"),
    ],
)
def test_controls_pass(base, world_size, arguments):
    validate(load_config(base, arguments.split()), world_size)


def test_sizing_needs_no_paths():
    validate(load_config(CONFIGS / "3b.yaml"), 64, needs_data=False)
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        validate(load_config(CONFIGS / "3b.yaml"), 64)


# ------------------------------------------------------------------------------------------ shipped YAMLs


def test_every_size_is_listed():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SIZES)
    assert len(OVERLAYS) >= 10


@pytest.mark.parametrize("name", SIZES)
def test_sizes_load_and_validate(name):
    sizes = validate(load_config(CONFIGS / f"{name}.yaml", ["data.path=shards"]), SIZES[name])
    assert sizes.num_microbatches >= 1


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("name", ["410m", "3b"])
def test_overlays_load_and_validate(name, overlay):
    plain = load_config(CONFIGS / f"{name}.yaml", ["data.path=shards", "precision.dtype=fp32"])
    config = load_config(CONFIGS / f"{name}.yaml", [str(overlay), "data.path=shards"])
    assert to_dict(config) != to_dict(plain), "the overlay changes nothing"
    assert overlay.parent.name != "methods" or config.model.effective_method == overlay.stem
    assert validate(config, 64).data_parallel_size >= 8


def test_vanilla_changes_one_key():
    plain, vanilla = (
        to_dict(load_config(CONFIGS / "3b.yaml", overlays))
        for overlays in ([], [str(CONFIGS / "methods/vanilla.yaml")])
    )
    plain["model"]["depth_attention"]["enabled"] = False
    assert plain == vanilla
