"""The training command in one rank of a world, with what the host waits for counted by step.

    python -m tests.cuda.worker FOLDER FAULTS ARGUMENTS ...

FAULTS is JSON: what ranks do wrong on purpose, see `Planted`. Each rank leaves ``FOLDER/RANK.json``: its device, what
each step waited for, what the rehearsal objected to, and what was given to which group. On the CPU runtime it trains
and leaves nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.cuda.budget import count_steps
from tests.cuda.planted import Planted, planted


def main() -> int:
    folder, faults, *sys.argv[1:] = sys.argv[1:]
    from megatron_depthattn.train.__main__ import main as command

    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)  # the rehearsal's attention is torch's plain one as well
        return command()
    from tests.cuda.ledger import FAULTS
    from tests.cuda.messages import Recorder

    rank, steps = int(os.environ["RANK"]), count_steps()
    own = [fault for fields in json.loads(faults) if (fault := Planted(*fields)).rank in (-1, rank)]
    with planted(*own), Recorder() as recorder:
        code = command()
    left = {"device": torch.cuda.current_device(), "steps": steps, "objections": FAULTS, "messages": recorder.messages}
    Path(folder, f"{rank}.json").write_text(json.dumps(left))
    return code


if __name__ == "__main__":
    from megatron_depthattn.train.errors import leave_at_once

    leave_at_once(main())
