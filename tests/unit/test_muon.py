"""Muon against its definition in fp64 and against torch's, over steps of a whole model."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_depthattn.config import OptimizerConfig, RunConfig, hardware_checks, load_config, to_dict
from megatron_depthattn.config.check import first_unsupported
from megatron_depthattn.config.hardware_checks import PACKAGE_CHECKS, muon_lacks
from megatron_depthattn.estimate.counts import checkpoint_bytes, rank_weights
from megatron_depthattn.estimate.memory import rank_memory
from megatron_depthattn.estimate.muon import shares
from megatron_depthattn.train.build import build_model, build_optimizer
from megatron_depthattn.train.megatron_state import MASTER, _allocate_state, _ranges
from megatron_depthattn.train.step import train_step
from megatron_depthattn.train.step_folders import Progress
from tests.checkpoints import load_checkpoint, save_checkpoint
from tests.unit.test_trained_methods import QUICKSTART, SHAPE, SMALL

here = pytest.mark.skipif(bool(muon_lacks()), reason=f"Muon needs what is missing here: {muon_lacks()}")
STEPS = 3
MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
SIMPLE = [(3.4445, -4.7750, 2.0315)]
# Numbers of https://leloykun.github.io/ponder/muon-opt-coeffs, and of modded-nanogpt
QUINTIC = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046)]
QUINTIC += [(2.8366, -3.0525, 1.2012)]

# The first three of arXiv 2505.16932, each with the paper's factor of safety of 1.01
POLAR = [(8.28721201814563, -23.595886519098837, 17.300387312530933)]
POLAR += [(4.107059111542203, -2.9478499167379106, 0.5448431082926601)]
POLAR += [(3.9486908534822946, -2.908902115962949, 0.5518191394370137)]
POLAR_EXPRESS = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR]


def config_of(*settings: str) -> RunConfig:
    given = ["optimizer.name=muon", "model.num_layers=2", "optimizer.warmup_ratio=0.02", *settings]
    return load_config(QUICKSTART, [*SMALL, *given])


class Run:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
        (self.chunk,) = self.chunks = build_model(config, torch.device("cpu"))
        self.optimizer, self.schedule = build_optimizer(config, self.chunks)
        self.named = {name.rpartition("module.")[2]: p for name, p in self.chunk.named_parameters()}
        self.number = 0

    def step(self, **change) -> bool:
        """Whether the step was taken."""
        rows = torch.randint(200, (2, 17), generator=torch.Generator().manual_seed(self.number))
        self.schedule.step(1)
        self.number += 1
        batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
        return not train_step(self.chunks, self.optimizer, [batch], SHAPE).skipped

    def states(self) -> dict[str, Tensor]:
        """What Muon and AdamW hold, whole on this rank; flat, by name."""
        _allocate_state(self.optimizer)
        names = {id(parameter): name for name, parameter in self.named.items()}
        return {
            f"{k}.{names[id(p)]}": t.clone() for p, _, tensors in _ranges(self.optimizer) for k, t in tensors.items()
        }

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights that are stepped."""
        return {k.removeprefix(f"{MASTER}."): t for k, t in self.states().items() if k.startswith(MASTER)}


def orthogonal(matrix: Tensor, steps: int, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """Newton-Schulz by its definition: an odd polynomial of the singular values, step by step."""
    x = matrix / matrix.norm()
    for step in range(steps):
        a, b, c = coefficients[step % len(coefficients)]
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def parts_of(name: str, config: RunConfig, split: str) -> list[Tensor] | None:
    """Rows of the matrices that a fused weight consists of."""
    model = config.model
    if name.endswith("linear_qkv.weight") and split != "nothing":
        heads, size = model.num_attention_heads // model.num_query_groups, model.kv_channels
        rows = torch.arange((heads + 2) * size * model.num_query_groups).view(model.num_query_groups, -1, size)
        return [rows[:, :heads].flatten(), rows[:, heads].flatten(), rows[:, heads + 1].flatten()]
    if name.endswith("linear_fc1.weight") and split == "gate and up as well":
        return list(torch.arange(2 * model.ffn_hidden_size).chunk(2))
    return None


class Oracle:
    """The definitions in fp64: Muon for matrices, AdamW for the rest."""

    def __init__(self, run: Run, coefficients: list[tuple[float, float, float]], split: str = "query, key, value"):
        self.run, self.coefficients, self.split = run, coefficients, split
        self.weights = {name: value.double().view(run.named[name].shape) for name, value in run.masters().items()}
        self.first = {name: value.clone() for name, value in self.weights.items()}
        self.means = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.squares = {name: torch.zeros_like(value) for name, value in self.weights.items()}

    def step(self, lr: float) -> None:
        settings = self.run.config.optimizer
        for name, weight in self.weights.items():
            gradient = self.run.named[name].main_grad.double()
            weight *= 1 - lr * settings.weight_decay * (weight.dim() > 1)
            if name.endswith(MATRICES):
                weight -= lr * self.update(name, gradient)
                continue
            self.means[name] += (1 - settings.beta1) * (gradient - self.means[name])
            self.squares[name] += (1 - settings.beta2) * (gradient**2 - self.squares[name])
            mean = self.means[name] / (1 - settings.beta1**self.run.number)
            square = self.squares[name] / (1 - settings.beta2**self.run.number)
            weight -= lr * mean / (square.sqrt() + settings.eps)

    def update(self, name: str, gradient: Tensor) -> Tensor:
        muon, update = self.run.config.optimizer.muon, torch.zeros_like(gradient)
        self.means[name] = muon.momentum * self.means[name] + (1 - muon.momentum) * gradient
        momentum = self.means[name]
        if muon.nesterov:
            momentum = muon.momentum * momentum + (1 - muon.momentum) * gradient
        for rows in parts_of(name, self.run.config, self.split) or [torch.arange(len(gradient))]:
            height, width = momentum[rows].shape
            scale = {
                "spectral": max(height, width) ** 0.5,
                "unit_rms_norm": (height / width) ** 0.5,
                "shape_scaling": max(1.0, height / width) ** 0.5,
            }[muon.scale_mode]
            update[rows] = (
                scale * muon.extra_scale_factor * orthogonal(momentum[rows], muon.ns_steps, self.coefficients)
            )
        return update

    def worst(self) -> float:
        """The largest relative error of what the steps changed, over weights."""
        found = self.run.masters()
        return max(
            float((found[name].view(weight.shape) - weight).norm() / (weight - self.first[name]).norm())
            for name, weight in self.weights.items()
        )


def followed(config: RunConfig, **oracle) -> tuple[Run, float]:
    run = Run(config)
    definition = Oracle(run, **{"coefficients": QUINTIC} | oracle)
    for _ in range(STEPS):
        assert run.step()
        rates = {group["lr"] for group in run.optimizer.param_groups}
        assert len(rates) == 1  # the schedule's, for both
        definition.step(rates.pop())
    return run, definition.worst()


@here
@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize(
    ("settings", "coefficients"),
    [
        ("", QUINTIC),
        ("optimizer.muon.nesterov=false optimizer.muon.ns_steps=7 model.tie_embeddings=true", QUINTIC),
        ("optimizer.muon.coefficients=simple optimizer.muon.scale_mode=unit_rms_norm optimizer.grad_clip=0", SIMPLE),
        ("optimizer.muon.scale_mode=shape_scaling optimizer.muon.momentum=0.5 optimizer.weight_decay=0", QUINTIC),
        ("model.method=mhc optimizer.muon.extra_scale_factor=1", QUINTIC),
        ("optimizer.muon.coefficients=polar_express optimizer.muon.ns_steps=3", POLAR_EXPRESS),
    ],
)
def test_steps_are_the_definitions(settings, coefficients):
    """Gradients are Megatron's, clipped; everything after is not."""
    assert followed(config_of(*settings.split()), coefficients=coefficients)[1] < 1e-3


@here
@pytest.mark.usefixtures("megatron_world_of_one")
def test_bf16_steps_fp32_copies():
    run, worst = followed(config_of("precision.dtype=bf16"))
    assert 1e-3 < worst < 0.05  # Newton-Schulz in bf16
    for name, master in run.masters().items():
        assert torch.equal(run.named[name].view(-1), master.bfloat16()), name


@here
@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize("mistake", [{"split": "nothing"}, {"split": "gate and up as well"}, {"coefficients": SIMPLE}])
def test_control_another_definition_is_noticed(mistake):
    assert followed(config_of(), **mistake)[1] > 0.02


@here
@pytest.mark.usefixtures("megatron_world_of_one")
def test_steps_are_those_of_torchs_muon():
    """Of the matrices that are one: torch's Newton-Schulz is in bf16."""
    run = Run(config_of("optimizer.muon.coefficients=simple"))
    settings = run.config.optimizer
    names = [name for name in run.named if name.endswith(MATRICES[1:])]
    copies = [torch.nn.Parameter(run.named[name].detach().clone()) for name in names]
    first = [copy.detach().clone() for copy in copies]
    theirs = torch.optim.Muon(
        copies, lr=1.0, weight_decay=settings.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(STEPS):
        assert run.step()
        theirs.param_groups[0]["lr"] = run.optimizer.param_groups[0]["lr"]
        for copy, name in zip(copies, names, strict=True):
            copy.grad = run.named[name].main_grad.clone()
        theirs.step()
    for copy, name, before in zip(copies, names, first, strict=True):
        change = (copy - before).norm()
        assert float((copy - run.named[name]).norm() / change) < 0.06, name
        assert float(change) > 0


@here
@pytest.mark.usefixtures("megatron_world_of_one")
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(monkeypatch):
    run = Run(config_of())
    run.step()
    before = run.states()
    hook = run.chunk.register_forward_hook(lambda _, __, output: output * float("inf"))
    assert not run.step()
    hook.remove()
    after = run.states()
    assert all(torch.equal(before[name], after[name]) for name in before) and len(before) > 30


@here
@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_continues_bit_by_bit_and_only_with_its_optimizer(tmp_path, dtype):
    run = Run(config_of(f"precision.dtype={dtype}"))
    run.step()
    saved = save_checkpoint(
        tmp_path, Progress(1, 2, 32), run.chunks, run.optimizer, run.schedule, config=to_dict(run.config)
    )
    again = Run(run.config)
    load_checkpoint(saved, again.chunks, again.optimizer, again.schedule, config=to_dict(run.config))
    again.number = 1
    assert run.step() and again.step()
    mine, theirs = run.states(), again.states()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = dataclasses.replace(run.config, optimizer=dataclasses.replace(run.config.optimizer, name="adamw"))
    adamw = Run(other)
    with pytest.raises(ValueError, match=r"optimizer\.name \(was muon, is adamw\)"):
        load_checkpoint(saved, adamw.chunks, adamw.optimizer, adamw.schedule, config=to_dict(other))


@here
@pytest.mark.usefixtures("megatron_world_of_one")
def test_weights_alone_begin_a_run(tmp_path):
    """Those of a run with AdamW, from which nothing else is taken."""
    plain = config_of("optimizer.name=adamw", "precision.dtype=bf16")
    adamw, muon = Run(plain), Run(config_of("precision.dtype=bf16", "run.seed=2"))
    adamw.step()
    saved = save_checkpoint(tmp_path, Progress(), adamw.chunks, None, None, config=to_dict(plain))
    load_checkpoint(saved, muon.chunks, muon.optimizer, muon.schedule, config=to_dict(muon.config))
    for name, master in muon.masters().items():
        assert torch.equal(master.bfloat16(), adamw.named[name].view(-1)), name


@here
@pytest.mark.usefixtures("megatron_world_of_one")
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_the_planner_counts_whole_matrices(ranks):
    """As Megatron lays them out for so many ranks, but for 64-element gaps; and what a rank holds, in bytes."""
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer as LayerWise

    run = Run(config_of("model.num_layers=3", "precision.dtype=bf16"))
    layout = LayerWise.compute_full_param_layout(list(run.chunk.parameters()), None, ranks, run.chunk.ddp_config)
    (matrices,) = (one for key, one in layout.layouts.items() if key.is_managed_by_layer_wise_optimizer)
    own = shares(run.config, rank_weights(run.config, 0), ranks)
    assert own.muon == pytest.approx(matrices.bucket_indices[-1][1] / ranks, abs=64 * 12)
    if ranks == 1:
        states = sum(value.nbytes for value in run.states().values())
        assert states == rank_memory(run.config, 1, pipeline_rank=0).optimizer
        adamw = dataclasses.replace(run.config, optimizer=OptimizerConfig())
        assert checkpoint_bytes(adamw) - checkpoint_bytes(run.config) == 4 * own.muon


@pytest.mark.parametrize(
    ("python", "versions", "lacks"),
    [
        ("3.12.3", {"megatron-core": "0.19.2", "emerging-optimizers": "0.3.1"}, ""),
        ("3.11.7", {"megatron-core": "0.16.1"}, "Python 3.11.7, megatron-core 0.16.1, no emerging-optimizers"),
        ("3.13.0", {"megatron-core": "0.19.0", "emerging-optimizers": "999.9.9"}, "emerging-optimizers 999.9.9"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, python, versions, lacks):
    def version(name: str) -> str:
        if name not in versions:
            raise hardware_checks.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(hardware_checks, "version", version)
    monkeypatch.setattr(hardware_checks, "python_version", lambda: python)
    message = first_unsupported(PACKAGE_CHECKS, config_of())
    assert muon_lacks() == lacks
    assert message is None if not lacks else f"here is {lacks}; pip install 'megatron-depthattn[muon]'" in message
    assert first_unsupported(PACKAGE_CHECKS, config_of("optimizer.name=adamw")) is None
