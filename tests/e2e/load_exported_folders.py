"""Load exported folders with transformers alone, and print what came of it: CACHE_FOLDER MODEL_FOLDER...

Run by ``test_clean_environments.py`` with an interpreter that knows nothing of this project: no import from it here.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


def main(cache: str, *folders: str) -> None:
    # Read when transformers is imported. What it downloads or copies stays in the test's folder.
    os.environ |= {"HF_HOME": cache, "HF_MODULES_CACHE": f"{cache}/modules", "HF_HUB_OFFLINE": "1"}
    import transformers

    for module in ("megatron", "megatron_depthattn", "tests"):
        assert importlib.util.find_spec(module) is None, f"{module} can be imported here"
    print(json.dumps({"transformers": transformers.__version__, "models": [result_of(folder) for folder in folders]}))


def result_of(folder: str) -> dict[str, object]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    stored = {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in stored.items())
    tokens = torch.arange(3, 14)[None]
    with torch.no_grad():
        return {
            "logits": model(tokens).logits.tolist(),
            "generated": model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist(),
            "tokens": AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a few words")["input_ids"],
            "class": f"{type(model).__module__}.{type(model).__name__}",
        }


if __name__ == "__main__":
    main(*sys.argv[1:])
