"""A looped model against one with as many layers and copied weights, and where its weights may be met: once.

The independent fp64 decoder says the same in test_model_against_reference.py, layouts in tests/parallel.
"""

import dataclasses
import json
import re
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.config import from_dict, load_config, to_dict
from megatron_depthattn.config.load import load_record
from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.convert.verify import verify
from megatron_depthattn.estimate.counts import decoder_shape
from megatron_depthattn.model.gpt import build_gpt_model
from megatron_depthattn.model.initialization import initialize_weights
from megatron_depthattn.model.loops import share_weights
from megatron_depthattn.train.build import build_chunk, build_model, build_optimizer, transformer_config
from megatron_depthattn.train.megatron_state import sharded_models
from megatron_depthattn.train.metrics import opening_lines
from megatron_depthattn.train.step import train_step
from megatron_depthattn.train.step_folders import Progress
from tests.checkpoints import load_checkpoint, save_checkpoint
from tests.e2e.small_run import MODEL
from tests.small_models import small_config

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

NUM_LAYERS, NUM_LOOPS, VOCAB, SEQUENCE = 3, 2, 128, 12
DENSE = {"depth_attention_stride": 2, "depth_attention_recent_window": 1}
UNROLLED = DENSE | {"depth_attention_loop_sources": "unrolled"}
MODELS = {"vanilla": {"depth_attention": False}, "unrolled": UNROLLED}
RECOMPUTE = {
    "none": {},
    "each layer": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "pairs": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4},
}
"""Pairs and block reach over the seam between the loops, which have three layers each."""


def build(num_loops: int, **overrides) -> GPTModel:
    config = small_config(NUM_LAYERS * NUM_LOOPS, num_loops=num_loops, **overrides)
    return build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=SEQUENCE)


def first_loops_name(name: str) -> str:
    """The name of a layer's weight in the first loop."""
    return re.sub(r"layers\.(\d+)", lambda match: f"layers.{int(match[1]) % NUM_LAYERS}", name)


def looped_and_unrolled(**overrides) -> tuple[GPTModel, GPTModel]:
    """Two loops of three layers, and six layers that hold copies of the same weights."""
    looped, unrolled = build(NUM_LOOPS, **overrides), build(1, **overrides)
    initialize_weights(looped, seed=3, init_std=0.2)
    weights = dict(looped.named_parameters())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in weights.values():  # norms away from one
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, copy in unrolled.named_parameters():
            copy.copy_(weights[first_loops_name(name)])
    return looped, unrolled


def logits_and_gradients(model: GPTModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one random batch; gradients summed under the names of the first loop."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=generator)
    logits = model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    gradients: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[first_loops_name(name)] = gradients[first_loops_name(name)] + parameter.grad
    return logits.detach(), dict(gradients)


def worst_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert gradients.keys() == expected.keys()
    return max(float((gradients[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("mixing", MODELS)
def test_loops_compute_what_as_many_layers_with_the_same_weights_do(mixing, recompute, record_property):
    looped, unrolled = looped_and_unrolled(**MODELS[mixing], **RECOMPUTE[recompute])
    logits, gradients = logits_and_gradients(looped)
    expected, sums = logits_and_gradients(unrolled)
    error = worst_error(gradients, sums)
    record_property("gradient_error", error)
    assert torch.equal(logits, expected)
    assert error < 1e-6


@pytest.mark.parametrize("mistake", ["one weight is not shared", "a loop's gradient is dropped"])
def test_control_a_mistake_in_sharing_is_noticed(mistake):
    looped, unrolled = looped_and_unrolled(**UNROLLED)
    borrower = looped.decoder.layers[NUM_LAYERS + 1].mlp.linear_fc2
    wrong = borrower.weight.detach()
    if mistake == "one weight is not shared":
        with torch.no_grad():
            wrong = wrong.clone() * 1.01
    vars(borrower)["weight"] = wrong
    logits, gradients = logits_and_gradients(looped)
    expected, sums = logits_and_gradients(unrolled)
    assert torch.equal(logits, expected) == (mistake == "a loop's gradient is dropped")
    assert worst_error(gradients, sums) > 1e-2


DEPTH = "model.depth_attention"


def run_config(more=None, /, **model):
    values = {"model": MODEL | model, "data": {"path": "unused"}, "precision": {"dtype": "bf16"}}
    return from_dict(values | (more or {}), "a test")


def test_every_weight_is_met_once():
    """By data parallel, optimizer and checkpoint, initialised as without loops; Megatron's bf16 wrapper included."""
    config = run_config(num_loops=3)
    chunks = build_model(config, torch.device("cpu"))
    optimizer, _ = build_optimizer(config, chunks)
    (looped,), (once,) = unwrap_model(chunks), unwrap_model(build_model(run_config(), torch.device("cpu")))
    parameters, expected = (dict(model.named_parameters()) for model in (looped, once))
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    num_weights = decoder_shape(config).parameters
    assert num_weights == sum(parameter.numel() for parameter in parameters.values())
    assert num_weights == sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    (buffer,) = chunks[0].buffers
    assert len(buffer.params) == len(parameters) and {*map(id, buffer.params)} == {*map(id, parameters.values())}
    stored, expected = (stored_weights(sharded_models([model])["model0"]) for model in (looped, once))
    assert stored == expected and len(stored) == len(parameters)


def stored_weights(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a sharded state's weights, without the modules' extra state."""
    return {one.key: tuple(one.data.shape) for one in state.values() if not isinstance(one, ShardedObject)}


def test_weights_alone_start_a_run_with_another_number_of_loops(tmp_path):
    once, twice = run_config(), run_config(num_loops=2)
    source, target = (build_model(config, torch.device("cpu")) for config in (once, twice))
    with torch.no_grad():
        for number, parameter in enumerate(source[0].parameters()):
            parameter.fill_(number)
    folder = save_checkpoint(tmp_path, Progress(), source, None, None, config=to_dict(once))
    loaded = load_checkpoint(folder, target, *build_optimizer(twice, target), config=to_dict(twice))
    assert "note: model.num_loops is 2; the weights were trained with 1" in loaded.notes
    assert [parameter.unique().tolist() for parameter in target[0].parameters()] == [
        [number] for number in range(len([*source[0].parameters()]))
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        # and no key that had no meaning before
        ({"model.num_loops": 2}, r"other settings: model\.num_loops \(was 1, is 2\)\. Set"),
        ({f"{DEPTH}.weights": "uniform"}, r"attention\.weights \(was softmax, is uniform\)\. Set them as they were"),
        ({f"{DEPTH}.mixes": "key"}, r"Set them as they were \(model.depth_attention.mixes=value\), or start"),
        ({f"{DEPTH}.loop_sources": "unrolled"}, ""),  # of one loop it says nothing
        ({"data.document_mask": True}, r"data\.document_mask \(was False, is True\)\. Set them as they were, or start"),
        ({"optimizer.mup": 32}, r"optimizer\.mup \(was None, is 32\)\. Set them as they were, or start"),
    ],
)
def test_a_run_that_continues_keeps_what_it_computes(changed, message, tmp_path):
    """The weights are the same, by name and shape."""
    saved, now = run_config(), run_config(changed)
    chunks = build_model(saved, torch.device("cpu"))
    optimizer, scheduler = build_optimizer(saved, chunks)
    optimizer.step()
    folder = save_checkpoint(tmp_path, Progress(1, 8, 8), chunks, optimizer, scheduler, config=to_dict(saved))
    chunks = build_model(now, torch.device("cpu"))
    parts, given = (chunks, *build_optimizer(now, chunks)), to_dict(now)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        load_checkpoint(folder, *parts, config=given)
    given["checkpoint"] |= {"start_from": str(folder), "start_optimizer": True}
    notes = load_checkpoint(folder, *parts, config=given, is_parent=True).notes
    mixes_otherwise = bool(message) and any(key.startswith("model.") for key in changed)
    assert any(note.startswith("note: model.") for note in notes) is mixes_otherwise, "a branch may, and is said to"
    given["optimizer"]["name"] = "another"
    with pytest.raises(ValueError, match=r"optimizer\.name \(was adamw, is another\).*start_optimizer=false"):
        load_checkpoint(folder, *parts, config=given, is_parent=True)


def test_a_run_older_than_the_rule_resumes_unrolled_or_not_at_all(tmp_path):
    """Its record lacks the keys; resumed, its losses are those of the run that was not interrupted."""
    unrolled = run_config(num_loops=2, depth_attention={"loop_sources": "unrolled"})
    now = run_config(num_loops=2, depth_attention={})
    older = to_dict(unrolled)
    for key in ("loop_sources", "weights", "mixes"):
        del older["model"]["depth_attention"][key]

    def steps(numbers, chunks, optimizer, scheduler):
        losses = []
        for step in numbers:
            rows = torch.randint(384, (2, 17), generator=torch.Generator().manual_seed(step))
            scheduler.step(1)
            batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
            losses.append(train_step(chunks, optimizer, [batch], (2, 16)).loss)
        return losses

    chunks = build_model(unrolled, torch.device("cpu"))
    parts = chunks, *build_optimizer(unrolled, chunks)
    steps([0], *parts)
    folder = save_checkpoint(tmp_path, Progress(1, 8, 8), *parts, config=older)
    expected = steps([1, 2], *parts)
    rule = "model.depth_attention.loop_sources"
    for config in (now, unrolled):
        chunks = build_model(config, torch.device("cpu"))
        parts = chunks, *build_optimizer(config, chunks)
        if config is unrolled:
            load_checkpoint(folder, *parts, config=to_dict(config))
            assert steps([1, 2], *parts) == expected
        else:
            with pytest.raises(ValueError, match=rf"{rule} \(was unrolled, is same_layer\).*\({rule}=unrolled"):
                load_checkpoint(folder, *parts, config=to_dict(config))
            load_checkpoint(folder, *parts)
            assert steps([1, 2], *parts) != expected  # control
    export(MegatronCheckpoint(folder), tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["depth_attention_loop_sources"] == "unrolled"
    assert all(check.passed for check in verify(MegatronCheckpoint(folder), tmp_path / "hf"))


def test_tools_that_read_a_record_know_what_is_older(tmp_path):
    file, rules = tmp_path / "config.yaml", []
    for model in ("num_loops: 1", "num_loops: 2, method: vanilla", "num_loops: 2"):
        file.write_text(f"model: {{{model}}}")
        rules.append([load(file).model.depth_attention.loop_sources for load in (load_config, load_record)])
    assert rules == [["same_layer"] * 2, ["same_layer"] * 2, ["same_layer", "unrolled"]]


def test_sharing_outlives_moves():
    """What keeps the parameters needs nothing; what replaces them needs `share_weights` once more."""
    for move in (lambda model: model.bfloat16(), lambda model: model.to("cpu", torch.float64)):
        model = build(NUM_LOOPS)
        move(model)
        assert_shared(model)
    with torch.device("meta"):
        model = build(NUM_LOOPS)
    assert_shared(model)
    model.to_empty(device="cpu")
    share_weights([model], num_loops=NUM_LOOPS)
    assert_shared(model)


def assert_shared(model: GPTModel) -> None:
    layers = model.decoder.layers
    for number in range(NUM_LAYERS, NUM_LAYERS * NUM_LOOPS):
        assert not list(layers[number].parameters())
        for path, module in layers[number - NUM_LAYERS].named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                assert getattr(layers[number].get_submodule(path), name) is parameter


def test_the_opening_lines_tell_of_loops():
    config = run_config(num_loops=3)
    megatron = transformer_config(config)
    assert megatron.num_layers == 3 * MODEL["num_layers"] == len(build_chunk(config, megatron).decoder.layers)
    lines = opening_lines(config, megatron, 1, "step 0")
    assert f"{MODEL['num_layers']} layers run 3 times x {MODEL['hidden_size']}" in lines[0]
    assert lines[1].endswith("arithmetic; loop_sources same_layer")
    once = dataclasses.replace(config, model=dataclasses.replace(config.model, num_loops=1))
    assert "times" not in opening_lines(once, transformer_config(once), 1, "step 0")[0]
    ablation = dataclasses.replace(once.model.depth_attention, weights="uniform", mixes="key")
    once = dataclasses.replace(once, model=dataclasses.replace(once.model, depth_attention=ablation))
    depth_line = opening_lines(once, transformer_config(once), 1, "step 0")[1]
    assert "depth attention: uniform weights, mixes key, stride" in depth_line and "weights" not in lines[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 6, "num_loops": 0}, "num_loops is 0 and num_layers is 6"),
        ({"num_layers": 6, "num_loops": 4}, "set num_loops to 1 or more, and num_layers to a multiple of it"),
        ({"num_loops": 2, "pipeline_model_parallel_size": 2}, "Set virtual_pipeline_model_parallel_size to 2 or a"),
        (
            {"num_loops": 4, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "Set virtual_pipeline_model_parallel_size to 4 or a multiple of it, num_layers to a multiple of 8",
        ),
        (
            {"num_loops": 2, "pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|tt|t|tttL"},
            "or an uneven layout that repeats itself with every loop",
        ),
    ],
)
@pytest.mark.parametrize("depth_attention", [True, False])
def test_rejected_configs(fields, message, depth_attention):
    given = {"num_layers": 8, "pipeline_dtype": torch.float32, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    with pytest.raises(ValueError, match=message):
        small_config(**(given | fields), depth_attention=depth_attention)


@pytest.mark.parametrize(("chunks", "stage"), [(2, 1), (4, 3)])
def test_a_later_chunk_needs_its_ranks_earlier_ones(chunks, stage):
    config = small_config(
        num_layers=8,
        num_loops=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=chunks,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    with pytest.raises(ValueError, match="0 were given: build those before, and give them as earlier_chunks"):
        build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=SEQUENCE, vp_stage=stage)
