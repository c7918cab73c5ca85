"""The run's samples on this rank: which ranks read, and what they read."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_depthattn.config import RunConfig, Sizes
from megatron_depthattn.data.order import SampleSequence
from megatron_depthattn.data.stream import TokenDataset, TokenLoader, build_loader, sample_order
from megatron_depthattn.train.step import Microbatch

SAMPLE_IDS = "sample_ids"
"""Key of a microbatch that says which samples it holds; for logs, not for the device."""


class GlobalBatches:
    """This rank's microbatches of one global batch after another, from a split of the prepared corpus.

    Only the first pipeline stage embeds tokens and only the last compares with labels; the stages between read
    nothing. All ranks must construct it (opening the shards is collective), and all tensor- and context-parallel
    ranks of a replica read the same samples.

    Args:
        config: the run's config.
        sizes: what `validate` returned.
        split: ``train`` or ``val``.
        consumed_samples: samples of the split that were used before.
    """

    def __init__(
        self, config: RunConfig, sizes: Sizes, device: torch.device, *, split: str, consumed_samples: int = 0
    ) -> None:
        dataset = TokenDataset(
            config.data.path, split, sequence_length=config.data.sequence_length, cache=config.data.cache
        )
        _check_vocabulary(dataset, config.model.vocab_size)
        self._dataset, self._config, self._sizes, self._device = dataset, config, sizes, device
        self._is_training = split == "train"
        self._loader: TokenLoader | None = None
        self.seek(consumed_samples)

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return len(self._dataset)

    def seek(self, consumed_samples: int) -> None:
        """Go on from this many samples since the start of the split."""
        self.close()
        config, dataset = self._config, self._dataset
        if parallel_state.get_pipeline_model_parallel_rank() not in (0, config.parallel.pipeline - 1):
            return
        shuffle = config.data.shuffle and self._is_training
        order = SampleSequence(
            len(dataset),
            lambda epoch: sample_order(dataset.samples_per_shard, len(dataset), config.run.seed, epoch, shuffle),
        )
        self._loader = build_loader(
            dataset,
            order,
            consumed_samples=consumed_samples,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=self._sizes.data_parallel_size,
            num_workers=config.data.num_workers if self._is_training else 0,
        )

    @property
    def data_seconds(self) -> float:
        """Seconds that this rank has waited for samples."""
        return self._loader.data_seconds if self._loader else 0.0

    def next(self) -> list[Microbatch]:
        """This rank's microbatches of the next global batch."""
        if self._loader is None:
            return [{}] * self._sizes.num_microbatches
        batches = [next(self._loader) for _ in range(self._sizes.num_microbatches)]
        return [
            {name: tensor.to(self._device) if name != SAMPLE_IDS else tensor for name, tensor in batch.items()}
            for batch in batches
        ]

    def close(self) -> None:
        """End the loader's processes."""
        if self._loader:
            self._loader.close()


def _check_vocabulary(dataset: TokenDataset, vocab_size: int) -> None:
    stored = (dataset.manifest or {}).get("vocab_size")
    if stored is not None and stored > vocab_size:
        raise ValueError(
            f"model.vocab_size is {vocab_size}, but the data was tokenised with {stored} tokens: set "
            f"model.vocab_size={stored} or prepare the data with a smaller tokenizer."
        )
