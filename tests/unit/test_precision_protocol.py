"""The precision protocol: gaps, cosines and conclusions against arithmetic of their own; settings; what is reported."""

import math
import random

import numpy as np
import pytest
import torch

from megatron_depthattn.benchmarks import command as benchmark
from megatron_depthattn.benchmarks import precision
from megatron_depthattn.benchmarks.precision import ByteStream, parse_setting
from megatron_depthattn.benchmarks.precision_compare import gradient_cosine, over, paired_gap
from megatron_depthattn.benchmarks.result import table
from megatron_depthattn.config import load_config, validate
from megatron_depthattn.config.hardware_checks import Accelerator
from megatron_depthattn.config.precision import RECIPES

WITHIN = {"tolerance": 0.01, "least_cosine": 0.9}


# ---- arithmetic


@pytest.mark.parametrize(("steps", "size", "judged"), [(300, 10, 6), (20, 1, 4), (65, 2, 6), (3, 1, 1)])
def test_gap_against_plain_loops(steps, size, judged):
    draw = random.Random(steps)
    base = [[3 + draw.random() for _ in range(steps)] for _ in range(2)]
    own = [[loss * (1 + 0.02 * (draw.random() - 0.5)) for loss in run] for run in base]
    own[1][2] *= 1.5  # early: not judged, but reported (of 65 steps the first is in no window)

    expected, ends = [], []
    for run, other in zip(own, base, strict=True):
        gaps, last = [], steps
        while last - size >= 0:
            mean, base_mean = (math.fsum(losses[last - size : last]) / size for losses in (run, other))
            gaps.insert(0, mean / base_mean - 1)
            ends = [last, *ends] if len(expected) == 0 else ends
            last -= size
        expected.append(gaps)
    gap = paired_gap(own, base)
    tail = [value for gaps in expected for value in gaps[-judged:]]
    assert gap.mean == pytest.approx(math.fsum(tail) / len(tail))
    assert (gap.low, gap.high) == (pytest.approx(min(tail)), pytest.approx(max(tail)))
    assert gap.worst == pytest.approx(max(map(abs, tail)))
    largest = max((value for gaps in expected for value in gaps), key=abs)
    assert gap.largest == pytest.approx(largest)
    assert gap.largest_step == ends[[*map(abs, expected[1])].index(pytest.approx(abs(largest)))]


def test_cosine_against_numpy():
    draws = np.random.default_rng(0)
    base = {f"layer {i}": draws.normal(size=(5, i + 1)) * 10.0**-i for i in range(4)}
    own = {
        name: value + 0.1 * 10.0**-i * draws.normal(size=value.shape) for i, (name, value) in enumerate(base.items())
    }

    def cosine(x, y):
        return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())

    expected = {name: cosine(own[name], base[name]) for name in base}
    whole = cosine(*(np.concatenate([part.ravel() for part in gradient.values()]) for gradient in (own, base)))
    found = gradient_cosine(*({n: torch.from_numpy(v) for n, v in gradient.items()} for gradient in (own, base)))
    assert found.model == pytest.approx(whole, abs=1e-12)
    assert found.worst == pytest.approx(min(expected.values()), abs=1e-12)
    assert found.worst_parameter == min(expected, key=expected.__getitem__)


def test_cosine_sees_what_is_lost():
    one, zero = torch.ones(3), torch.zeros(3)
    assert gradient_cosine({"a": one, "b": zero}, {"a": one, "b": one}).worst == 0  # b's gradient is gone
    assert gradient_cosine({"a": one, "b": one}, {"a": one, "b": zero}).worst == pytest.approx(1)  # b has none to lose
    assert gradient_cosine({"a": -one}, {"a": one}).model == pytest.approx(-1)
    tiny = torch.full((1000,), 1e-30)  # fp32 sums of squares would be zero
    assert gradient_cosine({"a": tiny}, {"a": tiny}).model == pytest.approx(1)


def test_conclusions():
    base = [[2.0] * 30] * 2
    near, far, early = ([[2.0] * 20 + [2.0 * (1 + more)] * 10] * 2 for more in (0.009, 0.011, 0))
    early[0] = [2.5] * 10 + [2.0] * 20
    assert over(paired_gap(near, base), [0.99], [-0.009], **WITHIN) == []
    assert over(paired_gap(early, base), [0.99], [], **WITHIN) == []
    assert over(paired_gap(far, base), [0.99], [0.0], **WITHIN) == ["loss gap 1.10% over 1.00%"]
    assert over(paired_gap([near[0], far[0]], base), [0.99], [0.0], **WITHIN)  # one seed of two
    assert over(paired_gap(near, base), [0.99, 0.89], [0.0], **WITHIN) == ["gradient cosine 0.8900 under 0.9"]
    assert over(paired_gap(near, base), [0.99], [0.0, 0.02], **WITHIN) == ["exported model +2.00%, over 1.00%"]
    for odd in ({"gap": math.nan}, {"cosine": math.nan}, {"exported": math.nan}):
        losses = [[2.0] * 29 + [odd.get("gap", 2.0)]] * 2
        assert over(paired_gap(losses, base), [odd.get("cosine", 1.0)], [odd.get("exported", 0.0)], **WITHIN), odd


# ---- settings and data


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("bf16", {"precision.dtype=bf16"}),
        ("delayed+attention", {"precision.dtype=bf16", "precision.fp8=delayed", "precision.fp8_attention=true"}),
        ("tensorwise+ends2", {"precision.bf16_first_layers=2", "precision.bf16_last_layers=2"}),
        ("tensorwise+params+recompute", {"precision.fp8_params=true", "recompute.granularity=full"}),
        ("fp32:optimizer.lr=1e-4,run.seed=5", {"precision.dtype=fp32", "optimizer.lr=1e-4", "run.seed=5"}),
    ],
)
def test_a_name_is_keys(text, keys):
    assert keys <= set(parse_setting(text))


@pytest.mark.parametrize(("text", "word"), [("fp8", "'fp8'"), ("bf16+ends", "'ends'"), ("bf16+param", "'param'")])
def test_unknown_names_are_rejected(text, word):
    with pytest.raises(ValueError, match=word):
        parse_setting(text)


def choose(*arguments):
    given = benchmark.build_parser("precision").parse_args(["precision", *arguments])
    return precision.choose(given, "cuda")


def test_what_runs_on_a_gpu_and_what_is_reported(monkeypatch):
    """Here an H100 under a CUDA that is too old for one recipe: the base has TransformerEngine's layers as well."""
    machine = Accelerator("NVIDIA H100", (9, 0), "12.8", "2.20.2")
    monkeypatch.setattr("megatron_depthattn.train.hardware.this_machine", lambda: machine)
    configs, rejected = choose()
    assert list(configs) == ["bf16", "bf16+reference", "delayed", "tensorwise"]
    assert {config.model.spec for config in configs.values()} == {"te"}
    assert [config.precision.fp8 for config in configs.values()] == [None, None, "delayed", "tensorwise"]
    assert sorted(rejected) == ["blockwise", "mxfp8"]
    assert "CUDA 12.9" in rejected["blockwise"]
    configs, rejected = choose("--precisions", "fp32", "bf16")
    assert {config.model.spec for config in configs.values()} == {"local"}
    with pytest.raises(ValueError, match=r"no two settings .*mxfp8: "):
        choose("--precisions", "bf16", "mxfp8")
    with pytest.raises(ValueError, match="no two settings"):
        choose("--precisions", "mxfp8", "bf16", "delayed")  # the base itself
    with pytest.raises(ValueError, match=r"fp8_params=true with precision\.fp8=mxfp8"):
        choose("--precisions", "bf16", "mxfp8+params")


@pytest.mark.parametrize("name", RECIPES)
def test_the_shape_for_gpus_suits_every_recipe(name):
    path = precision.Path(precision.__file__).parent / "precision-cuda.yaml"
    validate(load_config(path, ["model.spec=te", *parse_setting(name)]), 1, needs_data=False)


def test_batches_follow_from_seed_and_step_alone():
    config = load_config(precision.Path(precision.__file__).parent / "precision-cpu.yaml")
    stream, device = ByteStream(), torch.device("cpu")
    (batch,) = stream.batch(config, device, seed=1, step=2)
    (again,) = ByteStream().batch(config, device, seed=1, step=2)
    assert torch.equal(batch["tokens"], again["tokens"])
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    for other in ({"seed": 1, "step": 3}, {"seed": 2, "step": 2}):
        assert not torch.equal(batch["tokens"], stream.batch(config, device, **other)[0]["tokens"])
    held_out = [part["tokens"] for part in stream.held_out(config, device)]
    assert torch.cat(held_out).shape == (16 * 8, 128)
    assert b"".join(bytes(row.tolist()) for row in torch.cat(held_out)).count(b"self") > 10


# ---- what is reported, from figures without a run


def judge(*options, **changes):
    """Whether something is over its bound, and the table with its notes; ``changes`` are to the second run of two."""
    one = {"seed": 0, "losses": [3.0, 2.0, 1.0], "held_out": 1.2, "exported": 1.2, "failure": None}
    one |= {"cosine": {"model": 1.0, "worst": 0.5, "worst_parameter": "decoder.layers.0.x"}}
    runs = {"bf16": [one, one], "delayed": [one, one | changes]}
    given = benchmark.build_parser("precision").parse_args(["precision", "--steps", "3", *options])
    result = precision.judged(given, runs, {"mxfp8": "it needs another GPU", "blockwise": "CUDA is old"})
    return result.is_over, table(result.columns, result.rows) + "\n".join(result.notes)


def test_tolerances_are_given():
    losses = {"losses": [3.0, 2.0, 1.02]}
    assert not judge("--tolerance", "0.03", **losses)[0]
    assert judge("--least-cosine", "1.1")[0]
