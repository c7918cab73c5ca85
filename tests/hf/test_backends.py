"""Attention functions of transformers and of others, and what vLLM's Transformers backend asks of a model."""

import fnmatch

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.e2e.commands import must_succeed
from tests.forked import forked
from tests.hf.models import (
    DENSE,
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    SEQUENCE,
    largest,
    make_model,
    make_tokens,
    make_vanilla,
)

TOLERANCE = 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("num_loops", [1, 2])
@torch.no_grad()
def test_attention_functions_agree(attention, num_loops, record_property):
    settings, tokens = DENSE | {"num_loops": num_loops}, make_tokens()
    eager = make_model(attention="eager", **settings)(tokens).logits
    with torch.compiler.set_stance("force_eager"):  # transformers compiles flex_attention, for a quarter of a minute
        error = largest(make_model(attention=attention, **settings)(tokens).logits - eager)
    record_property("attention_error", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("num_loops", [1, 2])
@torch.no_grad()
def test_attention_weights_of_the_eager_function(num_loops):
    model, tokens = make_model(attention="eager", **DENSE, num_loops=num_loops), make_tokens()
    output = model(tokens, output_attentions=True)
    assert len(output.attentions) == num_loops * NUM_LAYERS
    future = torch.ones(SEQUENCE, SEQUENCE).triu(diagonal=1).bool()
    for weights in output.attentions:
        assert weights.shape == (len(tokens), NUM_HEADS, SEQUENCE, SEQUENCE)
        assert largest(weights.sum(dim=-1) - 1) < 1e-6
        assert not weights[..., future].any()
    assert model(tokens).attentions is None


@torch.no_grad()
def test_attention_weights_of_the_vanilla_decoder_are_qwen3s():
    tokens = make_tokens()
    ours, theirs = (
        model(tokens, output_attentions=True).attentions
        for model in (make_model(attention="eager", use_depth_attention=False), make_vanilla(attention="eager"))
    )
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_attention_weights_are_rejected_where_there_are_none():
    message = "'sdpa' attention gives no weights; only depthattn does, with attn_implementation='eager'"
    with pytest.raises(ValueError, match=message):
        make_model()(make_tokens(), output_attentions=True)


@pytest.mark.parametrize("num_loops", [1, 2])
@torch.no_grad()
def test_any_attention_function_receives_any_argument(num_loops):
    """vLLM registers its own, which finds its cache by the module's layer_idx in an argument of its own, and calls the
    base model so: no cache of transformers, positions given, a tuple back."""
    calls = []

    def attend(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
        calls.append((module.layer_idx, attention_instances, query.shape, key.shape, value.shape, kwargs))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("tests_recorder", attend)
    settings, tokens = DENSE | {"num_loops": num_loops}, make_tokens(1)
    model = make_model(attention="tests_recorder", **settings).model
    instances = {i: object() for i in range(NUM_LAYERS)}
    (hidden_states,) = model(
        input_ids=tokens,
        inputs_embeds=None,
        use_cache=False,
        position_ids=torch.arange(SEQUENCE)[None],
        attention_instances=instances,
        return_dict=False,
    )
    assert torch.equal(hidden_states, make_model(**settings).model(tokens).last_hidden_state)
    assert [layer for layer, *_ in calls] == [*range(NUM_LAYERS)] * num_loops
    for _, received, query, key, value, kwargs in calls:
        assert received is instances
        assert query == (1, NUM_HEADS, SEQUENCE, HEAD_DIM) and key == value == (1, 2, SEQUENCE, HEAD_DIM)
        assert kwargs["scaling"] == HEAD_DIM**-0.5 and kwargs["dropout"] == 0.0


def test_model_is_compatible_with_other_programs_attention():
    model = make_model()
    assert model._supports_attention_backend
    assert model.is_backend_compatible() and model.model.is_backend_compatible()
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [*range(NUM_LAYERS)]


def test_layers_are_the_only_module_list():
    """vLLM takes the one list of a model for its layers."""
    lists = [name for name, module in make_model().model.named_modules() if isinstance(module, nn.ModuleList)]
    assert lists == ["layers"]


def test_tensor_parallel_plan_names_every_linear_layer_and_nothing_else():
    model = make_model()
    plan = model.config.base_model_tp_plan
    names = {name: module for name, module in model.model.named_modules() if name}
    matches = {pattern: fnmatch.filter(names, pattern) for pattern in plan}
    assert all(len(matched) == NUM_LAYERS for matched in matches.values()), matches
    covered = {
        name for pattern, matched in matches.items() if plan[pattern] in ("colwise", "rowwise") for name in matched
    }
    assert covered == {name for name, module in names.items() if isinstance(module, nn.Linear)}
    vanilla = make_vanilla()
    assert model._tp_plan == vanilla._tp_plan
    assert type(model)._tp_plan == type(vanilla)._tp_plan  # of the output layer


def test_no_pipeline_plan():
    """A plan would hand on hidden states alone; sources cross from any layer to any later one. Qwen3 has one."""
    model, vanilla = make_model(), make_vanilla()
    assert model.config.base_model_pp_plan is None and vanilla.config.base_model_pp_plan
    assert not model._pp_plan and not model.model._pp_plan and vanilla._pp_plan


@torch.no_grad()
def test_tensor_parallel_through_transformers_equals_one_process(tmp_path):
    pytest.importorskip(
        "accelerate", reason="transformers loads with tp_plan='auto' only where accelerate is installed"
    )
    model, tokens = make_model(**DENSE, num_loops=2), make_tokens()
    model.save_pretrained(tmp_path / "model")
    must_succeed(forked(2, "tests.hf.tensor_parallel_worker", tmp_path / "model", tmp_path / "result.pt"))
    result = torch.load(tmp_path / "result.pt")
    assert result["local_query_rows"] == NUM_HEADS * HEAD_DIM // 2
    assert largest(result["logits"] - model(tokens).logits) < TOLERANCE
    assert torch.equal(result["generated"], model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0))
