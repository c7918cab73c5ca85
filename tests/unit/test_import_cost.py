"""What a process that trains imports: nothing heavy beyond Megatron-Core's own GPT model."""

import subprocess
import sys

HEAVY = (
    *("streaming", "transformers", "sklearn", "torchvision", "tensorboard", "deepspeed", "matplotlib", "scipy"),
    *("pandas", "datasets", "pyarrow", "rich", "jinja2", "accelerate", "PIL", "wandb"),
)
SCRIPT = """
import sys
from megatron.core.models.gpt import GPTModel
theirs = set(sys.modules)
import megatron_depthattn.train.loop
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - theirs}))
"""


def test_the_loop_imports_no_heavy_library_of_its_own():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120
    )
    ours = result.stdout.split()
    assert "megatron_depthattn" in ours
    assert not set(HEAVY) & set(ours)
