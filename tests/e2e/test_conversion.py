"""Checkpoints trained under parallel layouts, through the converter's commands and into other layouts."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_depthattn.cli.convert import main
from megatron_depthattn.config import load_config, to_dict
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.verify import megatron_logits
from megatron_depthattn.hf.loading import load_causal_lm
from tests.checkpoints import load_checkpoint, stored
from tests.e2e.commands import must_succeed
from tests.forked import forked
from tests.reference_decoder import decoder_logits

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

BF16_BOUND = 0.05  # of the logits' norm: eight bits of mantissa; the largest single error varies more, with the CPU
STEP = "checkpoints/step_00000002"
SHORT = ["train.steps=2", "train.eval_interval=null", "run.seed=3", "model.init_std=0.3"]  # logits of order one

LAYOUTS = {
    "pp2-tied-looped": (
        2,
        [
            *("parallel.pipeline=2", "parallel.virtual_pipeline=4", "model.num_loops=2", "model.tie_embeddings=true"),
            *("model.vocab_size=391", "model.depth_attention.stride=3"),
        ],
    ),
    "tp2-pp2-bf16": (
        4,
        [
            *("parallel.tensor=2", "parallel.pipeline=2", "parallel.pipeline_layout=Et|t*3L", "precision.dtype=bf16"),
            *("model.vocab_size=397", "model.depth_attention.recent_window=2"),
        ],
    ),
}


class Exported(NamedTuple):
    """A trained step folder and its export."""

    step: Path
    hf: Path
    config: dict[str, Any]


@pytest.fixture(scope="session")
def exported(config_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """Trains under a layout and exports, once for each layout."""
    made: dict[str, Exported] = {}

    def make(layout: str) -> Exported:
        if layout not in made:
            folder = tmp_path_factory.mktemp(layout)
            ranks, settings = LAYOUTS[layout]
            train = ("megatron_depthattn.train", config_file, f"run.dir={folder / 'run'}", *SHORT, *settings)
            must_succeed(forked(ranks, *train))
            step, hf = folder / "run" / STEP, folder / "hf"
            assert convert("to-hf", "--checkpoint", step, "--output", hf) == 0
            made[layout] = Exported(step, hf, json.loads((hf / "config.json").read_text()))
        return made[layout]

    return make


def convert(*arguments: str | Path) -> int:
    """The command's exit code, run in this process: starting Python and Megatron takes longer than converting."""
    return main([str(word) for word in arguments])


def tokens_for(config: dict[str, Any]) -> torch.Tensor:
    return torch.randint(config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(4))


def reference(exported: Exported) -> torch.Tensor:
    config = exported.config
    return decoder_logits(
        load_file(exported.hf / "model.safetensors"),
        tokens_for(config),
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        stride=config["depth_attention_stride"],
        window=config["depth_attention_recent_window"],
        tied=config["tie_word_embeddings"],
        num_loops=config["num_loops"],
        unrolled=config["depth_attention_loop_sources"] == "unrolled",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_hf_and_reference_agree(exported, layout: str):
    made = exported(layout)
    tokens, expected = tokens_for(made.config), reference(made)
    largest = expected.abs().max().item()
    assert largest > 0.5, "logits near zero would agree by themselves"
    with torch.no_grad():
        ours = load_causal_lm(made.hf, dtype=torch.float32)(tokens).logits
        rounded = load_causal_lm(made.hf, dtype=torch.bfloat16)(tokens).logits
    megatron = megatron_logits(MegatronCheckpoint(made.step), tokens)
    errors = [(logits - expected).abs().max().item() for logits in (ours, megatron)]
    in_bf16 = ((rounded - expected).norm() / expected.norm()).item()
    print(f"{layout}: HF {errors[0]:.1e}, Megatron {errors[1]:.1e}, HF bf16 {in_bf16:.1%}, largest {largest:.1f}")
    assert errors[0] <= 1e-4
    assert errors[1] <= 1e-4
    assert in_bf16 <= BF16_BOUND


@pytest.mark.parametrize(
    ("damage", "failing"),
    [
        ("swapped keys", ["weights, name by name"]),
        ("another stride", ["config", "logits, Megatron and Hugging Face"]),
        ("other code", ["model files"]),
    ],
)
def test_verify_fails_for_another_model(
    exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, failing: list[str]
):
    made = exported("pp2-tied-looped")
    folder = tmp_path / "hf"
    shutil.copytree(made.hf, folder)
    tensors, config = load_file(made.hf / "model.safetensors"), dict(made.config)
    if damage == "swapped keys":
        names = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (1, 2)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    elif damage == "another stride":
        config["depth_attention_stride"] = 1
    else:
        (folder / "modeling_depthattn.py").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert convert("verify", "--checkpoint", made.step, "--model", folder) == 1
    failed = [line.split("\u2502")[1].strip() for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed == failing


def test_an_import_trains_under_another_layout_from_the_same_bits(exported, config_file: Path, tmp_path: Path):
    """tp2 x pp2 -> Hugging Face -> pp2: a step too small to change a bit shows what pp2 had loaded."""
    made = exported("tp2-pp2-bf16")
    imported, source = tmp_path / "imported", tmp_path / "hf"
    shutil.copytree(made.hf, source)
    generation = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    assert convert("from-hf", "--model", source, "--output", imported) == 0
    model = yaml.safe_load((imported / "model.yaml").read_text())["model"]
    depth = {"enabled": True, "stride": 2, "recent_window": 2, "loop_sources": "same_layer"}
    assert model["depth_attention"] == depth | {"weights": "softmax", "mixes": "value"}
    settings = ["parallel.pipeline=2", "precision.dtype=bf16", "optimizer.lr=1e-30", f"run.dir={tmp_path / 'run'}"]
    train = ("megatron_depthattn.train", config_file, imported / "model.yaml", f"checkpoint.start_from={imported}")
    output = must_succeed(forked(2, *train, *settings, "train.steps=1", "train.eval_interval=null", "run.seed=8"))
    assert f"start: {imported}, at step 0" in output.stdout
    before, after = MegatronCheckpoint(made.step), MegatronCheckpoint(tmp_path / "run/checkpoints")
    assert before.weights.keys() == after.weights.keys()
    for name in before.weights:
        rows = 397 if "word_embeddings" in name or "output_layer" in name else None
        assert torch.equal(before.read(name)[:rows], after.read(name)[:rows]), name
    assert convert("to-hf", "--checkpoint", tmp_path / "run/checkpoints", "--output", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == generation


def test_an_import_of_another_shape_is_rejected(exported, config_file: Path, tmp_path: Path):
    made = exported("pp2-tied-looped")
    imported = tmp_path / "imported"
    assert convert("from-hf", "--model", made.hf, "--output", imported) == 0
    other = to_dict(load_config(config_file, ["model.rotary_base=77", "model.tie_embeddings=true"]))
    with pytest.raises(ValueError, match=r"rotary_base \(was 10000.0, is 77.0\)") as error:
        load_checkpoint(imported, [], config=other)
    assert "model.vocab_size (was 391, is 384)" in str(error.value)
    other["checkpoint"] |= {"start_from": str(imported), "start_optimizer": True}
    with pytest.raises(ValueError, match=r"holds weights alone .* set checkpoint\.start_optimizer=false"):
        load_checkpoint(imported, [], config=other, is_parent=True)


def test_model_card_tells_what_the_run_recorded(exported):
    made = exported("pp2-tied-looped")
    card = (made.hf / "README.md").read_text()
    metrics = [json.loads(line) for line in (made.step.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert f"\nloss, nats per token:\n  step: 2\n  value: {round(metrics[1]['loss'], 4)}\n" in card
    assert f"\ntokens seen: {2 * 8 * 32}\n" in card
    parameters = sum(tensor.numel() for tensor in load_file(made.hf / "model.safetensors").values())
    assert f"\nparameters: {parameters}\n" in card


def test_an_average_is_of_the_masters_whatever_layout_saved_them(config_file: Path, tmp_path: Path, capsys):
    """Of a bf16 run in three starts under three layouts: numpy's in fp64. It exports, and a run starts from it."""
    run_dir, made, hf = tmp_path / "run", tmp_path / "averages/step_00000009", tmp_path / "hf"
    common = ("megatron_depthattn.train", config_file, f"run.dir={run_dir}", "checkpoint.load=latest")
    common = (*common, "checkpoint.keep=null", "precision.dtype=bf16", "train.eval_interval=null", "train.stop_after=3")
    pipeline = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    for layout in ((), pipeline, ("parallel.tensor=2", "parallel.sequence=true")):
        must_succeed(forked(2, *common, *layout))
    capsys.readouterr()
    assert convert("average", "--checkpoints", run_dir, "--decay", "0.6", "--output", made) == 0
    assert "note: averaged: the optimizer's fp32 weights; average = the first; then" in capsys.readouterr().err
    steps = [stored(run_dir / f"checkpoints/step_{step:08d}") for step in (3, 6, 9)]
    masters = [
        {name: each[f"optimizer.state.param.{name}"].double().numpy() for name in stored(made)} for each in steps
    ]
    differs = False
    for name, tensor in stored(made).items():
        first, second, third = (each[name] for each in masters)
        expected = 0.4 * third + 0.6 * (0.4 * second + 0.6 * first)
        assert torch.equal(tensor, torch.from_numpy(expected).bfloat16()), name
        plain = [each[name].double() for each in steps]
        differs |= not torch.equal(tensor, (0.4 * plain[2] + 0.24 * plain[1] + 0.36 * plain[0]).bfloat16())
    assert differs, "control: the bf16 weights have another average"
    record = json.loads((made / "average.json").read_text())
    assert [(each["step"], each["weight"]) for each in record["checkpoints"]] == [
        (step, pytest.approx(weight)) for step, weight in ((3, 0.36), (6, 0.24), (9, 0.4))
    ]
    assert convert("to-hf", "--checkpoint", made, "--output", hf) == 0
    assert convert("verify", "--checkpoint", made, "--model", hf) == 0
    assert (
        "average: 'of these steps; the optimizer''s fp32 weights; average = the first;"
        in (hf / "README.md").read_text()
    )
    begun = must_succeed(forked(0, *common, f"run.dir={tmp_path / 'begun'}", f"checkpoint.load={made}"))
    assert f"{made}, at step 0" in begun.stdout
