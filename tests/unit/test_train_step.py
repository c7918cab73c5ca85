"""A training step's norm, clipping, optimizer and collectives are those of others."""

from collections.abc import Sequence
from unittest.mock import MagicMock, patch

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_depthattn.config import RunConfig, TrainConfig
from megatron_depthattn.train import loop, step
from megatron_depthattn.train.build import build_model, build_optimizer, torch_adams
from tests.unit.test_trained_methods import SHAPE, config_of

pytestmark = pytest.mark.usefixtures("megatron_world_of_one")
NUM_MICROBATCHES = 3


class Run:
    def __init__(self, *settings: str) -> None:
        self.config = config_of("vanilla", "optimizer.warmup_ratio=0", *settings)
        self.chunks = build_model(self.config, torch.device("cpu"))
        self.optimizer, self.schedule = build_optimizer(self.config, self.chunks)
        self.number = 0

    def batches(self) -> list[dict[str, torch.Tensor]]:
        self.number += 1
        rows = torch.randint(200, (NUM_MICROBATCHES, 2, 17), generator=torch.Generator().manual_seed(self.number))
        return [{"tokens": one[:, :-1], "labels": one[:, 1:]} for one in rows]

    def step(self) -> step.StepResult:
        self.schedule.step(1)
        return step.train_step(self.chunks, self.optimizer, self.batches(), SHAPE)

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.optimizer.get_parameters()]

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.optimizer.get_parameters()]


def test_norm_and_clipping_are_megatrons_to_the_bit():
    run = Run()
    with patch.object(step, "step_if_finite", lambda attempt, *_: step.StepResult(*attempt()[:2])):
        attempt = step.train_step(run.chunks, run.optimizer, run.batches(), SHAPE)
    assert attempt.grad_norm == run.optimizer.get_grad_norm() > 0
    before = [gradient.clone() for gradient in run.gradients()]
    for largest in (0.0, 2 * attempt.grad_norm):
        step.clip(run.gradients(), attempt.grad_norm, largest)
        assert equal(run.gradients(), before)
    step.clip(run.gradients(), attempt.grad_norm, attempt.grad_norm / 3)
    ours = [gradient.clone() for gradient in run.gradients()]
    for gradient, old in zip(run.gradients(), before, strict=True):
        gradient.copy_(old)
    clip_grad_by_total_norm_fp32(run.optimizer.get_parameters(), attempt.grad_norm / 3, attempt.grad_norm)
    assert equal(run.gradients(), ours)
    assert not equal(before, ours)


def test_the_fused_optimizer_is_torchs_plain_one():
    """Within fp32's rounding. In pieces as ranks hold them, from multiples of 64, it is the same to the bit."""
    run = Run()
    (adam,) = torch_adams(run.optimizer)
    plain = torch.optim.AdamW(
        [{**group, "params": run_copies(group["params"]), "fused": False} for group in adam.param_groups], foreach=False
    )
    for _ in range(4):
        run.step()
        for group, plain_group in zip(adam.param_groups, plain.param_groups, strict=True):
            assert group["fused"]
            plain_group["lr"] = group["lr"]
            for mine, other in zip(group["params"], plain_group["params"], strict=True):
                other.grad = mine.grad.clone()
        plain.step()
    others = [parameter for group in plain.param_groups for parameter in group["params"]]
    for mine, other in zip(run.weights(), others, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-7)

    whole, *pieces = torch.randn(999), *([64, 512], [128, 192, 896])
    updated = [updated_in_pieces(whole, cuts) for cuts in ([], *pieces)]
    assert equal(updated[:1] * 2, updated[1:])


def test_a_global_batch_without_a_token_to_predict_is_one_error_and_no_nan():
    """With one token it is a step whose loss is that token's."""
    run = Run()
    before, batches = run.weights(), run.batches()
    masks = torch.zeros(NUM_MICROBATCHES, *SHAPE, dtype=torch.bool)
    masked = [batch | {"loss_mask": mask} for batch, mask in zip(batches, masks, strict=True)]
    with pytest.raises(ValueError, match="no token of the global batch is predicted"):
        step.train_step(run.chunks, run.optimizer, masked, SHAPE)
    assert step.evaluate(run.chunks, masked, SHAPE) == (0.0, 0)
    assert equal(run.weights(), before)
    masks[1, 0, 3] = True
    with torch.no_grad():
        losses = run.chunks[0](batches[1]["tokens"], None, None, labels=batches[1]["labels"])
    assert step.evaluate(run.chunks, masked, SHAPE) == (pytest.approx(float(losses[0, 3]), rel=1e-6), 1)
    result = step.train_step(run.chunks, run.optimizer, masked, SHAPE)
    assert (result.loss, result.tokens, result.skipped) == (pytest.approx(float(losses[0, 3]), rel=1e-6), 1, False)


def test_a_held_out_loss_is_one_over_all_its_tokens():
    found = iter([step.BatchLoss(0.0, 0), step.BatchLoss(1.0, 10), step.BatchLoss(3.0, 30), step.BatchLoss(0.0, 0)])
    batches = MagicMock(corpus=range(96))
    run = MagicMock(config=RunConfig(train=TrainConfig(eval_batches=3, global_batch_size=32)))
    run.engine.loss = lambda _: next(found)
    assert loop.Training._held_out_loss(run, "", batches) == pytest.approx((1.0 * 10 + 3.0 * 30) / 40, rel=1e-12)
    run.config = RunConfig(train=TrainConfig(eval_batches=1, global_batch_size=32))
    with pytest.raises(ValueError, match=r"held-out code: no token .* set a larger train\.eval_batches"):
        loop.Training._held_out_loss(run, "code", batches)


def run_copies(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]


def updated_in_pieces(weight: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    parameters = run_copies(weight.tensor_split(cuts))
    adam = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True)
    for number in range(3):
        gradient = torch.randn(len(weight), generator=torch.Generator().manual_seed(number))
        for parameter, piece in zip(parameters, gradient.tensor_split(cuts), strict=True):
            parameter.grad = piece.clone()
        adam.step()
    return torch.cat([parameter.detach() for parameter in parameters])


def test_a_group_of_one_needs_no_collective():
    """What the CPU runtime leaves out on gloo: the same weights to the bit with the collectives."""
    names = ("dist_all_gather_func", "dist_reduce_scatter_func")
    trained = []
    for is_whole in (False, True):
        functions = {name: getattr(param_and_grad_buffer, name) for name in names}
        own = {name: function.__wrapped__ if is_whole else function for name, function in functions.items()}
        run = Run()
        with patch.multiple(param_and_grad_buffer, **own):
            norms = [run.step().grad_norm for _ in range(2)]
        trained.append((norms, run.weights()))
    (norms, weights), (other_norms, other_weights) = trained
    assert norms == other_norms and equal(weights, other_weights)


def equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(map(torch.equal, some, others))
