"""muP: what steps change does not grow with the width, and the steps are those of the published rules."""

import math
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import OptimizerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_depthattn.config import RunConfig, load_config
from megatron_depthattn.train import build
from megatron_depthattn.train.build import build_chunk, build_model, build_optimizer, transformer_config
from megatron_depthattn.train.step import run_microbatches, train_step
from tests.unit.test_trained_methods import QUICKSTART

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")

BASE, WIDTHS, HEAD = 32, (32, 64, 128, 256), 16
SHAPE = (4, 16)
STEPS = 4


def config_of(width: int, *settings: str) -> RunConfig:
    sizes = (f"hidden_size={width}", f"ffn_hidden_size={2 * width}", f"num_attention_heads={width // HEAD}")
    sizes += (f"num_query_groups={width // HEAD // 2}", f"kv_channels={HEAD}", "num_layers=2", "vocab_size=64")
    rest = ("optimizer.lr=0.003", "optimizer.warmup_ratio=0", "parallel.pipeline=1")
    return load_config(QUICKSTART, [*(f"model.{size}" for size in sizes), *rest, *settings])


def batch(step: int) -> list[dict[str, Tensor]]:
    rows = torch.randint(64, (SHAPE[0], SHAPE[1] + 1), generator=torch.Generator().manual_seed(step))
    return [{"tokens": rows[:, :-1], "labels": rows[:, 1:]}]


# ---- the coordinate check


def growth(settings: tuple[str, ...], mup: str) -> dict[str, float]:
    """How the change of what layers compute in four steps grows with the width: 0, not at all; 1, in proportion."""
    changes: dict[str, list[float]] = {}
    for width in WIDTHS:
        config = config_of(width, f"optimizer.mup={mup}", *settings)
        chunks = build_model(config, torch.device("cpu"))
        optimizer, schedule = build_optimizer(config, chunks)
        before = computed(chunks)
        for step in range(1, STEPS + 1):
            schedule.step(1)
            train_step(chunks, optimizer, batch(step), SHAPE)
        for name, value in computed(chunks).items():
            changes.setdefault(name, []).append(float((value - before[name]).abs().mean()))
    for name, sizes in changes.items():  # docs/optimizers.md has them, by `pytest -s`
        print(f"\nmup={mup} {name}, {WIDTHS} wide:", *(f"{size:.4f}" for size in sizes))
    logs = torch.tensor(WIDTHS).log2()
    return {name: slope(logs, torch.tensor(sizes).log2()) for name, sizes in changes.items()}


def slope(x: Tensor, y: Tensor) -> float:
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def computed(chunks: build.Chunks) -> dict[str, Tensor]:
    """Outputs on one batch: of the second layer's attention and MLP, and the logits; and the largest sum of an
    Attention Residuals' query with a hidden state."""
    found: dict[str, Tensor] = {}
    wanted = ("layers.1.self_attention.linear_proj", "layers.1.mlp.linear_fc2", "output_layer")
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output[0].detach().clone()}))
        for name, module in chunks[0].named_modules()
        if name.endswith(wanted)
    ]
    with torch.no_grad():
        run_microbatches(chunks, batch(0), SHAPE, forward_only=True)
    for hook in hooks:
        hook.remove()
    queries = {name: value.detach() * value.numel() for name, value in chunks[0].named_parameters() if "query" in name}
    return {name.rpartition(".")[2]: value for name, value in (found | dict(list(queries.items())[-1:])).items()}


METHODS = {
    "depth_attention": ("model.depth_attention.stride=1",),
    "tied": ("model.tie_embeddings=true",),
    "denseformer": ("model.method=denseformer",),
    "attnres": ("model.method=attnres", "model.attnres.block_size=2"),
    "mhc": ("model.method=mhc",),
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_what_steps_change_does_not_grow_with_the_width(settings):
    grown = growth(settings, str(BASE))
    assert len(grown) >= 3 and max(map(abs, grown.values())) < 0.25, grown


def test_control_without_it_changes_grow_with_the_width():
    grown = growth(METHODS["depth_attention"], "null")
    assert len(grown) == 3 and min(grown.values()) > 0.8, grown


# ---- its steps are those of the rules as they are published, with a multiplier of the logits


def trained(config: RunConfig) -> tuple[build.Chunks, list[float]]:
    """The model after its steps, and their losses."""
    chunks = build_model(config, torch.device("cpu"))
    optimizer, schedule = build_optimizer(config, chunks)
    losses = []
    for step in range(STEPS):
        schedule.step(1)
        losses.append(train_step(chunks, optimizer, batch(step), SHAPE).loss)
    return chunks, losses


def rules_by_name(name: str, multiplier: float) -> dict[str, float]:
    """Adam's column of Table 8 of Tensor Programs V, for this model."""
    is_hidden = name.endswith(("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"))
    scale = 1 / multiplier if is_hidden else 1.0
    return {"rate": scale, "eps": scale, "std": scale**0.5}


def megatrons_rules(parameter: Tensor, name: str, multiplier: float) -> dict[str, float]:
    """What Megatron-Core's `use_mup` says, for lr and eps of 1."""
    of_one = OptimizerConfig(optimizer="adam", lr=1.0, min_lr=0.0, adam_eps=1.0)
    overrides = megatron_optimizer.get_mup_config_overrides(of_one, multiplier)
    given: dict[str, Any] = next((given for key, given in overrides.items() if key.matches(parameter, name)), {})
    return {"rate": given.get("max_lr", 1.0), "eps": given.get("eps", 1.0)}


@pytest.mark.parametrize("tied", ["false", "true"])
def test_steps_are_those_of_the_published_rules(tied, monkeypatch):
    width = 128
    multiplier = width / BASE
    settings = ("model.method=vanilla", f"model.tie_embeddings={tied}", "train.steps=5", "optimizer.grad_clip=0")
    config = config_of(width, *settings, f"optimizer.mup={BASE}")
    chunks, losses = trained(config)

    has_megatrons = hasattr(megatron_optimizer, "get_mup_config_overrides")
    if has_megatrons:  # its own multiplier of the logits
        own = {"use_mup": True, "mup_base_hidden_size": BASE, "mup_base_head_dim": HEAD}
        plain = build.qwen3_style_config
        monkeypatch.setattr(build, "qwen3_style_config", lambda **fields: plain(**fields, **own))
    model = build_chunk(config, transformer_config(config))
    if not has_megatrons:
        model.output_layer.register_forward_hook(lambda _, __, output: (output[0] / multiplier, output[1]))
    groups = []
    fresh = dict(unwrap_model(build_model(config, torch.device("cpu")))[0].named_parameters())
    for name, parameter in model.named_parameters():
        rules = rules_by_name(name, multiplier)
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.copy_(fresh[name])
            assert float(parameter.std()) == pytest.approx(config.model.init_std * rules.pop("std"), rel=0.05), name
        if has_megatrons:
            assert megatrons_rules(parameter, name, multiplier).items() <= rules.items(), name
        decay = config.optimizer.weight_decay * (parameter.dim() > 1)
        groups.append(
            {
                "params": [parameter],
                "weight_decay": decay,
                "eps": config.optimizer.eps * rules["eps"],
                "rate": rules["rate"],
            }
        )
    adam = torch.optim.AdamW(groups, betas=(config.optimizer.beta1, config.optimizer.beta2))
    expected = []
    for step in range(STEPS):
        for group in adam.param_groups:
            group["lr"] = group["rate"] * cosine(config, step + 1)
        (given,) = batch(step)
        loss = model(given["tokens"], torch.arange(SHAPE[1]).expand(SHAPE), None, labels=given["labels"]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in unwrap_model(chunks)[0].named_parameters():
        value = parameter * multiplier if name == "decoder.final_layernorm.weight" else parameter
        torch.testing.assert_close(value, dict(model.named_parameters())[name], rtol=1e-3, atol=1e-4)
    _, without = trained(config_of(width, *settings))
    assert max(abs(a - b) for a, b in zip(without, expected, strict=True)) > 0.01  # control


def cosine(config: RunConfig, step: int) -> float:
    low = config.optimizer.lr * config.optimizer.min_lr_ratio
    return low + (config.optimizer.lr - low) * (1 + math.cos(math.pi * step / config.train.steps)) / 2


def test_at_the_base_width_it_changes_nothing():
    (chunks, _), (others, _) = (trained(config_of(64, f"optimizer.mup={mup}")) for mup in (64, "null"))
    for mine, other in zip(chunks[0].parameters(), others[0].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)  # the same up to where Adam's loops begin
