"""Under torchrun: the sample ids that every rank reads, for a list of layouts, written by rank 0 as JSON."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.config import load_config, validate
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.data import GlobalBatches

NUM_BATCHES = 30


def main() -> None:
    config_file, output, *layouts = sys.argv[1:]
    environment = launch_environment()
    device = initialize_distributed(environment)
    seen = {}
    for layout in layouts:
        config = load_config(config_file, ["run.dir=unused", *layout.split()])
        sizes = validate(config, environment.world_size)
        initialize_model_parallel(tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
        batches = GlobalBatches(config, sizes, device, split="train")
        mine = [[batch["sample_ids"].tolist() for batch in batches.next()] for _ in range(NUM_BATCHES)]
        place = (parallel_state.get_data_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
        everyone: list = [None] * environment.world_size
        dist.all_gather_object(everyone, (place, mine))
        seen[layout] = everyone
        batches.close()
        parallel_state.destroy_model_parallel()
    if environment.rank == 0:
        Path(output).write_text(json.dumps(seen))
    dist.barrier()
    shut_down()


if __name__ == "__main__":
    main()
