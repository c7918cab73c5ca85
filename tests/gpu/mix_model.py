"""A small Megatron model whose mix runs as a Triton kernel, against the same model with the lean mix."""

import torch
from torch import Tensor

from megatron_depthattn.model.gpt import build_gpt_model, qwen3_style_config
from megatron_depthattn.model.initialization import initialize_weights

VOCAB, SEQUENCE, BATCH = 128, 9, 2
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def loss_and_gradients(device: str, op: str, **more) -> dict[str, Tensor]:
    config = qwen3_style_config(
        num_layers=6,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        ffn_hidden_size=48,
        depth_attention_op=op,
        **more,
    )
    model = build_gpt_model(config, vocab_size=VOCAB, max_sequence_length=SEQUENCE).to(device)
    initialize_weights(model, seed=3, init_std=0.2)
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1)).to(device)
    positions = torch.arange(SEQUENCE, device=device).expand_as(tokens)
    loss = model.train()(tokens, positions, None, labels=tokens.roll(-1, dims=1)).mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of any tensor, relative to its norm."""
    return max(float((found[name] - x).norm() / x.norm()) for name, x in expected.items())


def check_model(device: str) -> dict[str, float]:
    """Differences between the ops: up to 2 sources (arguments) and up to 5 (a table). Returns the largest."""
    found = {}
    for stride in (2, 1):
        lean = loss_and_gradients(device, "lean", depth_attention_stride=stride)
        triton = loss_and_gradients(device, "triton", depth_attention_stride=stride)
        found[f"stride {stride}"] = difference(triton, lean)
        again = loss_and_gradients(device, "triton", depth_attention_stride=stride, **FULL_RECOMPUTE)
        # On CPU to the bit; on a GPU the sums of other modules may come in another order.
        assert difference(again, triton) <= (0 if device == "cpu" else 1e-6), "recompute repeats the same numbers"
        vanilla = loss_and_gradients(device, "lean", depth_attention=False)
        assert difference(vanilla, lean) > 0.1, "control: without the mix it is another function"
    assert max(found.values()) < 1e-5, found
    return found
