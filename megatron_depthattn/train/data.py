"""The run's samples on this rank: which ranks read, what they read, and where all agree to continue or to stop."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_depthattn.config import DataConfig, TrainConfig
from megatron_depthattn.config.batch_sizes import BatchSizes
from megatron_depthattn.config.sizes import shown
from megatron_depthattn.config.stages import Stage, own_proportions, stages_of
from megatron_depthattn.data.cache import FETCHES, Counts, counts
from megatron_depthattn.data.corpus import Corpus, check_same_tokenizer
from megatron_depthattn.data.loader import MicroBatch, TokenLoader
from megatron_depthattn.data.order import SLOTS_PER_BLOCK, SampleIds
from megatron_depthattn.data.predownload import check_limit, samples_ahead
from megatron_depthattn.data.stream import MANIFEST_NAME, has_split
from megatron_depthattn.parallel.groups import check_same_on_all_ranks
from megatron_depthattn.train.errors import OtherRankError
from megatron_depthattn.train.step import ON_HOST, Microbatch, RankStatus, exchange
from megatron_depthattn.train.stop_signals import StopSignals

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How long a rank waits for its data before it asks the others whether to stop."""
NOTE_SECONDS = 600.0
"""Between two lines about a cache that is too small."""
MUCH_SMALLER = 0.75
"""A tokenizer with at most this share of model.vocab_size is worth a line."""


class GlobalBatches:
    """This rank's microbatches of one global batch after another, from a split of the prepared corpora.

    Only the first pipeline stage embeds tokens and only the last compares with labels; the stages between read
    nothing, unless a document mask is asked for, whose borders every layer's attention needs. All ranks must construct
    it (they compare what they found), and all tensor- and context-parallel ranks of a replica read the same samples.

    Args:
        data, train: the run's sections; of ``train`` the batch sizes.
        vocab_size: of the model: no token may be beyond it.
        seed: of the order of the samples.
        split: the folder below those of the corpora.
        trained_on: None: this is what the run trains on. Else that, for what it is evaluated on: in the order it is
            stored, the same for every seed, and of the same tokenizer.
        consumed_samples: samples of the split that the run has used before; those of ``data.skip_samples`` not counted.
        stages: in which proportions the streams are read; None: as the config says from the run's first step on. What
            the run is evaluated on is always read in the streams' own.

    Raises:
        ValueError: the data cannot be opened, or does not fit the config or what other ranks opened.
    """

    def __init__(
        self,
        data: DataConfig,
        train: TrainConfig,
        device: torch.device,
        *,
        vocab_size: int,
        seed: int,
        split: str = "train",
        trained_on: Corpus | None = None,
        consumed_samples: int = 0,
        stages: Sequence[Stage] | None = None,
    ) -> None:
        self._data, self._train, self._device, self._vocab_size = data, train, device, vocab_size
        self._is_training = trained_on is None
        self._seed = seed if self._is_training else 0
        self._first = data.skip_samples if self._is_training else 0
        last = parallel_state.get_pipeline_model_parallel_world_size() - 1
        self._reads = data.document_mask or parallel_state.get_pipeline_model_parallel_rank() in (0, last)
        self.stages = (stages or stages_of(data, train)) if self._is_training else [Stage(0, 0, own_proportions(data))]
        self.corpus = _open_on_all_ranks(data, vocab_size, split, trained_on, self.stages)
        self._check_cache(self._first + consumed_samples, split)
        self._counts_before = self._counts_noted = self._counts()
        self._noted = time.monotonic()
        self._loader: TokenLoader | None = None
        self._reader: _Reader | None = None
        self.data_seconds = 0.0
        """Seconds that this rank's steps have waited for samples."""
        self.seek(consumed_samples)

    def describe(self, consumed_samples: int, last_sample: int) -> list[str]:
        """One line a stream for people: its share, its samples, its epochs after so many samples and at the end."""
        begin, end = self._first + consumed_samples, self._first + last_sample
        lines = self.corpus.describe(begin, end, seed=self._seed)
        if self._data.cache_bytes is not None and self._data.shuffle and self._is_training:
            at_once = self.corpus.shuffled_bytes
            if self._data.cache_bytes < at_once:
                lines.append(
                    f"data.cache_limit is {self._data.cache_limit}, and the shuffle reads from shards of about "
                    f"{shown(at_once)} at the same time: many will be fetched again and again"
                )
        if len(self.stages) > 1:
            lines += [self._stage_line(number, end) for number in range(len(self.stages))]
        if self._first:
            lines.append(f"data: the first {self._first:,} samples of the order are passed over (data.skip_samples)")
        if self._data.document_mask:
            unmarked = [stream.path for stream in self.corpus.streams if not stream.stores_documents]
            from_eos = f"EOS (corpus of format 3, which stores no borders: {', '.join(unmarked)})"
            lines.append(f"documents: from {from_eos if unmarked else 'the borders in the samples'}")
        given = self._vocab_size
        used = max((stream.manifest or {}).get("vocab_size", given) for stream in self.corpus.streams)
        if used <= given * MUCH_SMALLER:
            lines.append(
                f"vocabulary: the tokenizer of the data has {used:,} tokens and model.vocab_size is {given:,}; the "
                f"other rows of the embedding are never used: model.vocab_size={used} makes the model smaller"
            )
        return lines

    def cache_lines(self) -> list[str]:
        """What has happened in this node's cache since the start, where it has a limit."""
        now = self._counts().since(self._counts_before)
        if self._data.cache_limit is None or not any(now):
            return []
        return [
            f"data.cache of this node, by all runs since the start: {now.made} shards fetched, {now.again} of them "
            f"again; {now.evicted} evicted, {now.too_soon} of them although they were needed soon"
        ]

    def _counts(self) -> Counts:
        return counts(Path(self._data.cache)) if self._data.cache else Counts()

    def _sequence(self) -> SampleIds:
        return self.corpus.sequence(seed=self._seed, shuffle=self._data.shuffle and self._is_training)

    def _check_cache(self, begin: int, split: str) -> None:
        """Raise ValueError, on all ranks, if the cache is too small for them."""
        if (limit := self._data.cache_bytes) is None:
            return
        hosts = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname() if self._reads else "")
        of_rank = max(self._data.num_workers, 1) + (self._train.eval_interval is not None)
        busiest = max(hosts.count(host) for host in {*hosts} - {""})
        fetchers = FETCHES if samples_ahead(self._data.predownload, self.corpus, self._train.global_batch_size) else 0
        soon = np.arange(begin, begin + (self._data.predownload or 0) * self._is_training)
        mistake = None
        try:
            ids = self._sequence().sample_ids(soon)
            check_limit(self.corpus, limit, busiest * of_rank + fetchers, ids)
        except ValueError as error:
            mistake = error
        _raise_on_all_ranks(mistake, split)

    def stage_begins(self, step: int, last_sample: int) -> list[str]:
        """A line for people if a stage begins with this step; ``last_sample`` as for `describe`."""
        end = self._first + last_sample
        return [self._stage_line(number, end) for number, each in enumerate(self.stages) if each.from_step == step]

    def _stage_line(self, number: int, end: int) -> str:
        stage = self.stages[number]
        until = self.stages[number + 1].first_sample if number + 1 < len(self.stages) else max(end, stage.first_sample)
        before, after = (self.corpus.consumed(at, seed=self._seed) for at in (stage.first_sample, until))
        streams = ", ".join(
            f"stream {i} {100 * slots / SLOTS_PER_BLOCK:g} % ({count:,} samples, epochs at its end {epochs:.2f})"
            for i, (slots, count, epochs) in enumerate(
                zip(
                    self.corpus.stages[number][1],
                    (after - before).tolist(),
                    self.corpus.epochs(until, seed=self._seed),
                    strict=True,
                )
            )
        )
        begins = f"from step {stage.from_step} on" if stage.from_step else "at the beginning"
        return f"stage {number}, {begins}: samples {stage.first_sample:,} to {until:,} of the order: {streams}"

    def stream_samples(self, consumed_samples: int) -> dict[str, int] | None:
        """How many of so many samples since the run's first one are of each stream, by its number; None: of one."""
        if len(self.corpus.streams) == 1:
            return None
        before, after = (self.corpus.consumed(self._first + n, seed=self._seed) for n in (0, consumed_samples))
        return {str(stream): count for stream, count in enumerate((after - before).tolist())}

    def seek(self, consumed_samples: int) -> None:
        """Resume from this many samples since the run's first one."""
        self.close()
        full, ramp = self._train.global_batch_size, self._train.batch_ramp if self._is_training else None
        self._batch_sizes = BatchSizes.of(full, ramp).each(consumed_samples)
        if not self._reads:
            return
        self._loader = TokenLoader(
            self.corpus,
            self._sequence(),
            consumed_samples=self._first + consumed_samples,
            vocab_size=self._vocab_size,
            global_batch_size=full,
            batch_sizes=self._batch_sizes,
            document_mask=self._data.document_mask,
            micro_batch_size=self._train.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            num_workers=self._data.num_workers if self._is_training else 0,
            pin_memory=self._device.type == "cuda",
            predownload=samples_ahead(self._data.predownload, self.corpus, full) if self._is_training else 0,
        )
        self._reader = _Reader(self._loader)

    @property
    def has_next(self) -> bool:
        """Whether what `next` returns is here."""
        return self._reader is None or self._reader.request().done()

    def wait(self, seconds: float) -> bool:
        """Whether what `next` returns is here, after up to so many seconds; it is not used up by that."""
        if self._reader is None:
            return True
        started = time.perf_counter()
        done, _ = wait([self._reader.request()], seconds)
        self.data_seconds += time.perf_counter() - started
        return bool(done)

    def next(self) -> list[Microbatch]:
        """This rank's microbatches of the next global batch; empty ones on a stage that reads nothing.

        The one after it is read meanwhile.

        Raises:
            ValueError: a shard is damaged or missing (names the file), or a loader process died.
        """
        if self._reader is None:
            of_all = self._train.micro_batch_size * parallel_state.get_data_parallel_world_size()
            return [{}] * (next(self._batch_sizes) // of_all)
        started = time.perf_counter()
        step = self._reader.take()
        self.data_seconds += time.perf_counter() - started
        self._note_thrash()
        return [
            {
                name: tensor if name in ON_HOST else tensor.to(self._device, non_blocking=True)
                for name, tensor in batch.items()
            }
            for batch in step
        ]

    def _note_thrash(self) -> None:
        """Say now and then that most of what is fetched had been here before."""
        if self._data.cache_limit is None or time.monotonic() < self._noted + NOTE_SECONDS:
            return
        self._noted, before, self._counts_noted = time.monotonic(), self._counts_noted, self._counts()
        lately = self._counts_noted.since(before)
        if 2 * lately.again > lately.made:
            logger.warning("note: %s; a larger data.cache_limit saves them", "".join(self.cache_lines()))

    def close(self) -> None:
        """End the loader's processes."""
        if self._reader and self._loader:
            self._reader.close()
            self._loader.close()
            self._reader = self._loader = None


class StopAgreement:
    """Whether all ranks compute the next global batch; ``stop_signal`` says why they do not.

    In the steady state nothing is sent for it: ranks say in a step's own exchange whether they were asked to stop and
    have their next batch, and where none was and all have it, the next step begins. A signal that comes after that
    exchange is obeyed one step later.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.stop_signal = 0
        self._signals = signals
        self._agreed_on: GlobalBatches | None = None

    def may_continue(self, batches: GlobalBatches) -> bool:
        """Wait for all ranks' next global batch; false if one of them was asked to stop.

        They ask each other again while a rank waits for its data, which may never come.
        """
        agreed_on, self._agreed_on = self._agreed_on, None
        if agreed_on is batches:
            return True
        while not self.stop_signal:
            is_here = batches.wait(0.0 if self._signals.received else LOOK_SECONDS)
            ranks = exchange([self._signals.received, is_here])
            self.stop_signal = round(max(received for received, _ in ranks))
            if not self.stop_signal and all(here for _, here in ranks):
                return True
        return False

    def note(self, statuses: Sequence[Sequence[float]], batches: GlobalBatches) -> None:
        """Take what ranks said in a step's exchange as their answers about the next of ``batches``."""
        ranks = [RankStatus(*status) for status in statuses]
        self._agreed_on = batches if all(rank.has_next_batch and not rank.signal for rank in ranks) else None

    def ask_again(self) -> None:
        """Forget the answers: what came after them took long."""
        self._agreed_on = None


class _Reader:
    """Takes steps from a loader in a thread, so that who waits for one can look up meanwhile.

    A read from a file server that has gone does not return, and nothing in Python ends it.
    """

    def __init__(self, loader: TokenLoader) -> None:
        self._loader, self._requests = loader, SimpleQueue[Future[list[MicroBatch]] | None]()
        self._request: Future[list[MicroBatch]] | None = None
        threading.Thread(target=self._serve, name="data reader", daemon=True).start()

    def request(self) -> Future[list[MicroBatch]]:
        """The next step, once it is read; the same one until it is taken."""
        if self._request is None:
            self._request = Future()
            self._requests.put(self._request)
        return self._request

    def take(self) -> list[MicroBatch]:
        """The next step, once it is read, while the one after it is asked for; raises what the loader raised."""
        request, self._request = self.request(), None
        step = request.result()
        self.request()
        return step

    def close(self) -> None:
        """End the thread, when the loader returns."""
        self._requests.put(None)

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                request.set_result(next(self._loader))
            except BaseException as error:
                request.set_exception(error)


def held_out_splits(data: DataConfig) -> dict[str, tuple[DataConfig, str]]:
    """What a run is evaluated on, by name: the corpora and the split. Its own val split, which may only be absent where
    ``data.held_out`` names others, has the name ''."""
    named = {name: replace(data, path=path, streams=None) for name, path in (data.held_out or {}).items()}
    has_own = not named or all(has_split(source.path, "val") for source in data.sources)
    found = {name: (corpus, "val" if has_split(corpus.path, "val") else "train") for name, corpus in named.items()}
    return ({"": (data, "val")} if has_own else {}) | found


def _raise_on_all_ranks(mistake: Exception | None, split: str) -> None:
    """Raise the mistake of the first rank that made one there, and an error that names this rank elsewhere."""
    mistakes: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake is not None)
    if mistake is not None and mistakes.index(True) == dist.get_rank():
        raise mistake
    if True in mistakes:
        raise OtherRankError(f"rank {mistakes.index(True)} could not open the {split} data; its error says why")


def _open_on_all_ranks(
    data: DataConfig, vocab_size: int, split: str, trained_on: Corpus | None, stages: Sequence[Stage]
) -> Corpus:
    """Open the data on every rank and compare: all ranks continue with the same data, or all of them stop.

    Raises:
        ValueError: on all ranks; the first rank that met an error raises it, the others name that rank.
    """
    corpus, mistake = None, None  # type: Corpus | None, Exception | None
    paths = [source.path for source in data.sources]
    shares, *later = ((stage.first_sample, stage.proportions) for stage in stages)
    try:
        cache: dict[str, Any] = {"cache": data.cache, "cache_limit": data.cache_bytes}
        corpus = Corpus(paths, shares[1], split, later=later, sequence_length=data.sequence_length, **cache)
        for stream in corpus.streams:
            check_same_tokenizer(stream, (trained_on or corpus).streams[0])
            stored = (stream.manifest or {}).get("vocab_size")
            if stored is not None and stored > vocab_size:
                raise ValueError(
                    f"model.vocab_size is {vocab_size}, but the data in {stream.path} was tokenised with {stored} "
                    f"tokens: set model.vocab_size={stored} or prepare the data with a smaller tokenizer."
                )
            if data.document_mask and not stream.stores_documents and "eos_token_id" not in (stream.manifest or {}):
                raise ValueError(
                    f"data.document_mask=true, but {stream.path} has neither borders of documents in its samples nor "
                    f"an eos_token_id in a {MANIFEST_NAME}: prepare it with depthattn prepare, or set "
                    "data.document_mask=false"
                )
    except (ValueError, OSError) as error:
        mistake = error
    _raise_on_all_ranks(mistake, split)
    assert corpus is not None
    check_same_on_all_ranks(f"{split} data in {', '.join(paths)} (copy the same corpus to every node)", corpus.digest)
    return corpus
