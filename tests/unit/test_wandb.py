"""Weights & Biases without its packages."""

import sys
from pathlib import Path

import pytest

from megatron_depthattn.config import WandbConfig
from megatron_depthattn.train.curves import check_wandb


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    """A folder `wandb` in the way, as an earlier run of something else leaves it, is no package."""
    asked = WandbConfig(project="ladder")
    check_wandb(asked)
    with monkeypatch.context() as patch:
        (tmp_path / "wandb").mkdir()
        patch.delitem(sys.modules, "wandb", raising=False)
        patch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if not Path(path, "wandb").is_dir())])
        with pytest.raises(ValueError, match=r"wandb.* cannot be imported: pip install"):
            check_wandb(asked)
        check_wandb(WandbConfig())
