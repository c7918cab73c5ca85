"""One rank of a world: read segments of runs as a training loop does, with the run's record of samples, and no model.

The argument is a JSON file: a list of segments, each with the config's overrides, the first step, the samples of every
step, and the count of consumed samples to resume from.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.config import load_config, validate
from megatron_depthattn.parallel.groups import initialize_distributed, initialize_model_parallel, shut_down
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.train.data import GlobalBatches
from megatron_depthattn.train.reporter import SampleLog


def main() -> None:
    config_file, segments = sys.argv[1:]
    environment = launch_environment()
    device = initialize_distributed(environment)
    layout = None
    for segment in json.loads(Path(segments).read_text()):
        config = load_config(config_file, segment["overrides"])
        validate(config, environment.world_size)
        if config.parallel != layout:
            parallel_state.destroy_model_parallel()
            layout = config.parallel
            initialize_model_parallel(tensor=layout.tensor, pipeline=layout.pipeline)
        batches = GlobalBatches(
            config.data,
            config.train,
            device,
            vocab_size=config.model.vocab_size,
            seed=config.run.seed,
            split="train",
            consumed_samples=segment["consumed_samples"],
        )
        log = SampleLog(Path(config.run.dir), is_on=config.data.log_samples, first_step=segment["first_step"])
        at_once = config.train.micro_batch_size * parallel_state.get_data_parallel_world_size()
        for step, batch_size in enumerate(segment["batch_sizes"], segment["first_step"]):
            microbatches = batches.next()
            # on a rank that reads nothing as well; a run that forgot where it was reads steps of another size
            assert not segment["consumed_samples"] or len(microbatches) * at_once == batch_size
            for batch in filter(None, microbatches):
                # The corpora of this test hold in every token of a sample the sample's own id.
                assert (batch["tokens"] == batch["sample_ids"][:, None]).all()
                assert (batch["loss_mask"].sum(1) < config.data.sequence_length - batch["sample_ids"] % 4 + 1).all()
                assert ("cu_seqlens" in batch) == config.data.document_mask
            log.write(step + 1, microbatches)
        log.close()
        batches.close()
        dist.barrier()  # the next segment's rank 0 reads what all ranks have written
    shut_down()


if __name__ == "__main__":
    main()
