"""One of several processes that share a model: MODEL_FOLDER RESULT_FILE."""

import sys

import torch

from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM
from tests.hf.models import make_tokens


@torch.no_grad()
def main(folder: str, result: str) -> None:
    model = DepthAttnForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    tokens = make_tokens()
    computed = {
        "logits": model(tokens).logits,
        "generated": model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0),
        "local_query_rows": len(model.model.layers[0].self_attn.q_proj.weight.to_local()),
    }
    if torch.distributed.get_rank() == 0:
        torch.save(computed, result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
