"""A folder as `tools/convert_checkpoint.py to-hf` leaves it, of a small random model; and errors of a verb's `main`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_depthattn.hf import configuration_depthattn, modeling_depthattn
from megatron_depthattn.hf.configuration_depthattn import DepthAttnConfig
from megatron_depthattn.hf.model_config import AUTO_MAP
from megatron_depthattn.hf.modeling_depthattn import DepthAttnForCausalLM


def export(folder: Path, tokenizer: PreTrainedTokenizerBase | None, **settings: Any) -> DepthAttnForCausalLM:
    """Write the folder and return its model. The weights are large, so that no two tokens are nearly as likely."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "depth_attention_stride": 2,
        "depth_attention_recent_window": 1,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    model = DepthAttnForCausalLM(DepthAttnConfig(**shape | settings)).eval()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for module in (configuration_depthattn, modeling_depthattn):
        shutil.copy(module.__file__, folder)
    edit_json(folder / "config.json", auto_map=AUTO_MAP["depthattn"])
    return model


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def error_of(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What a tool's `main` says when it rejects: one line on stderr, nothing on stdout."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err
