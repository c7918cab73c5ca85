"""Kernels that torch.compile builds compute what plain operations do (`make test-compiled`; needs g++ or a GPU)."""

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_depthattn.config import from_dict
from megatron_depthattn.methods.definitions import DEFINITIONS
from megatron_depthattn.model.compiled import compile_layers
from megatron_depthattn.switches import Kernels, resolved_switches
from megatron_depthattn.train.build import build_chunk, transformer_config

FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}


@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize(
    ("key", "dtype", "bound", "settings"),
    [
        *(
            ("compile", "fp32", 1e-5, {"model": {"method": name}})
            for name in ("vanilla", "depth_attention", *DEFINITIONS)
        ),
        ("compile", "fp32", 1e-5, {"recompute": FULL}),
        ("compile", "fp32", 1e-5, {"model": {"num_loops": 2}, "recompute": FULL}),  # the loops share compiled norms
        ("compile", "bf16", 3e-2, {}),
        ("fused_swiglu", "fp32", 1e-6, {}),
        ("fused_swiglu", "bf16", 3e-2, {}),  # a fused kernel keeps in fp32 what plain operations round in between
        ("fused_cross_entropy", "bf16", 1e-6, {}),
    ],
)
def test_compiled_kernels_compute_the_same(key, dtype, bound, settings):
    runs = []
    for fused in (False, True):
        torch.compiler.reset()  # what was compiled for other cases counts towards torch's limit
        model = {"num_layers": 4, "vocab_size": 256, key: fused} | settings.get("model", {})
        config = from_dict(settings | {"model": model, "precision": {"dtype": dtype}}, "the test")
        config = resolved_switches(config, 1, Kernels(False, None, adds_gradients=False))
        model = build_chunk(config, transformer_config(config)).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        names = [*model.state_dict()]
        if config.model.compile:
            compile_layers(model)
            assert [*model.state_dict()] == names
        tokens = torch.randint(0, 256, (2, 65), generator=generator)
        counters.clear()
        loss = model(tokens[:, :-1], None, None, labels=tokens[:, 1:]).float().mean()
        loss.backward()
        with torch.no_grad():
            assert model.eval()(tokens[:, :-1], None, None, labels=tokens[:, 1:]).float().mean() == pytest.approx(
                float(loss), rel=bound
            )
        assert bool(counters["frames"]["ok"]) == fused
        runs.append((float(loss), [parameter.grad.float() for parameter in model.parameters()]))
    (loss, gradients), (fused_loss, fused_gradients) = runs
    floor = 1e-3 * max(float(g.norm()) for g in gradients)  # some gradients are little but rounding
    pairs = zip(fused_gradients, gradients, strict=True)
    errors = [float((f - g).norm()) / max(floor, float(g.norm())) for f, g in pairs]
    print(f"{key} {dtype} {settings}: loss {abs(fused_loss / loss - 1):.1e}, worst gradient {max(errors):.1e}")
    assert fused_loss == pytest.approx(loss, rel=bound)
    assert max(errors) < bound
