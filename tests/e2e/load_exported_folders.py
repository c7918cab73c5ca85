"""Load exported folders with transformers alone, and print what came of it: CACHE_FOLDER MODEL_FOLDER...

Run by ``test_clean_environments.py`` with an interpreter that knows nothing of this project: no import from it here.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any


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
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    stored = {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in stored.items())
    tokens = torch.arange(3, 14)[None]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    classifier.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        return {
            "logits": model(tokens).logits.tolist(),
            "generated": model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist(),
            "tokens": tokenizer("a few words")["input_ids"],
            "as_on_the_card": as_on_the_card(folder),
            "batched": batched(model, tokens[0].tolist()),
            "classifier": type(classifier).__name__,
            "is_same_decoder": torch.equal(classifier.model(tokens)[0], model.model(tokens)[0]),
            "class": f"{type(model).__module__}.{type(model).__name__}",
        }


def as_on_the_card(folder: str) -> str:
    """What the model card's own lines of Python print."""
    (code,) = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), flags=re.DOTALL)
    printed = io.StringIO()
    os.chdir(folder)
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


def batched(model: Any, tokens: list[int]) -> list[int] | str | None:
    """New tokens of continuous batching, or why not; None before transformers 5, where it needs a GPU."""
    import transformers

    if transformers.__version__.startswith("4."):
        return None
    sizes = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    settings = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    try:
        (output,) = model.generate_batch(
            [tokens], generation_config=settings, continuous_batching_config=sizes, progress_bar=False
        ).values()
    except ValueError as error:
        return str(error)
    return output.generated_tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
