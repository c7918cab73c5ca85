"""Shards made ahead of need, by a process beside the loader's.

It knows the order of the samples as the loader does, so what to fetch next is a computation: the shards of the steps
that begin within so many samples, in the order of need. Processes of a node take turns (`ShardCache.turn`), and a shard
that one of them makes the others leave to it. Nothing depends on this process: what it could not fetch, the reader
fetches, and meets the error. Like a loader process it ignores a scheduler's signals and ends with its parent.
"""

import logging
import mmap
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress

import numpy as np

from megatron_depthattn.config.sizes import shown
from megatron_depthattn.data.cache import FETCHES, LOOK_SECONDS, Needs, NoRoomError
from megatron_depthattn.data.corpus import Corpus
from megatron_depthattn.data.order import Ids
from megatron_depthattn.data.shard_files import is_remote

BATCHES_AHEAD = 8
SHARDS_AHEAD = 4
MOST_SAMPLES_AHEAD = 1 << 16
STEPS_AT_A_TIME = 64
"""Steps whose ids are drawn between two looks at the fetches."""
SECONDS_TO_END = 5.0
NO_ROOM_SECONDS = 1.0
Shard = tuple[int, int]

logger = logging.getLogger(__name__)


def samples_ahead(setting: int | None, corpus: Corpus, global_batch_size: int) -> int:
    """What ``data.predownload`` stands for; null: with a remote stream 8 global batches or the samples of 4 shards,
    whichever is more, but no more than 65536; else 0."""
    remote = [stream for stream in corpus.streams if is_remote(stream.path)]
    if setting is not None or not remote:
        return setting or 0
    of_shards = SHARDS_AHEAD * max(int(stream.samples_per_shard.max()) for stream in remote)
    return min(max(BATCHES_AHEAD * global_batch_size, of_shards), MOST_SAMPLES_AHEAD)


def check_limit(corpus: Corpus, limit: int, processes: int, soon: Ids) -> None:
    """Raise ValueError if a node's cache has no room for what must be in it at the same time.

    Args:
        processes: of the node, that read, or fetch ahead of need.
        soon: the samples of the first ``data.predownload``, where it is set.
    """
    shards = [stream.bytes_of(shard) for stream in corpus.streams for shard in range(len(stream.samples_per_shard))]
    largest = max(while_made for _, while_made in shards)
    ahead = sum(corpus.streams[stream].bytes_of(shard)[0] for stream, shard in corpus.shards_of(soon))
    least = processes * largest + ahead
    if limit < least:
        more = f", and {shown(ahead)} for those of the next {len(soon)} samples (data.predownload)" if ahead else ""
        raise ValueError(
            f"data.cache_limit is {shown(limit)}, and what must be there at the same time takes {shown(least)}: up to "
            f"{shown(largest)} for a shard of each of {processes} processes of a node that read or fetch{more}; set "
            f"data.cache_limit={shown(least)} or more, or a smaller data.{'predownload' if ahead else 'num_workers'}"
        )


class Predownloader:
    """The process; it must be started before anything has been taken of ``steps``, of which it has a copy.

    Args:
        steps: sample ids of this data-parallel rank's steps.
        ahead: samples of all ranks.
        begin: what the process does first.
    """

    def __init__(
        self, corpus: Corpus, steps: Iterator[Ids], *, ahead: int, data_parallel_size: int, begin: Callable[[], None]
    ) -> None:
        self._counts = np.frombuffer(mmap.mmap(-1, 16), np.int64)  # shared with the process that is forked here
        self._each = data_parallel_size
        arguments = (corpus, steps, ahead, data_parallel_size, self._counts, begin)
        self._process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        self._is_missed = False

    def note(self, *, asked: int = 0, taken: int = 0) -> None:
        """Count samples of this rank that a loader process was asked for, or that the run has taken."""
        self._counts += np.array([asked, taken]) * self._each
        if taken and not self._is_missed and not self._process.is_alive():
            self._is_missed = True
            logger.warning("note: the process that fetches shards ahead of need has died; each is fetched when needed")

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self._is_missed = True
        self._process.terminate()
        self._process.join(SECONDS_TO_END)


def _serve(corpus: Corpus, steps: Iterator[Ids], ahead: int, each: int, counts: Ids, begin: Callable[[], None]) -> None:
    begin()
    window: deque[tuple[int, list[Shard]]] = deque()
    wanted: list[Shard] = []
    fetches: dict[Future[bool], Shard] = {}
    failed: set[Shard] = set()
    needs = {stream.cache.root: Needs(stream.cache.root) for stream in corpus.streams if stream.cache}
    end, paused_until = 0, 0.0
    with ThreadPoolExecutor(FETCHES) as pool:
        while True:
            asked, taken = counts.tolist()
            while window and window[0][0] <= taken:
                window.popleft()
            for _ in range(STEPS_AT_A_TIME):
                if end >= asked + ahead or (ids := next(steps, None)) is None:
                    break
                end += ids.size * each
                window.append((end, corpus.shards_of(ids.ravel())))
            before, wanted = wanted, [*dict.fromkeys(shard for _, shards in window for shard in shards)]
            if wanted != before:
                paused_until = 0.0
                failed.intersection_update(wanted)
                places = [corpus.streams[stream].place(shard) for stream, shard in wanted]
                for own in needs.values():
                    with suppress(OSError):  # the readers say what is wrong with the folder
                        own.publish([f"{place.parent.name}/{place.name}" for place in places])
            under_way = {*failed, *fetches.values()}
            for shard in wanted if time.monotonic() >= paused_until else ():
                if len(fetches) == FETCHES:
                    break
                if shard not in under_way and not corpus.streams[shard[0]].place(shard[1]).exists():
                    fetches[pool.submit(corpus.streams[shard[0]].fetch, shard[1])] = shard
            is_idle = not fetches
            for fetch in wait(fetches, LOOK_SECONDS, FIRST_COMPLETED).done:
                shard = fetches.pop(fetch)
                try:
                    is_idle |= not fetch.result()
                except NoRoomError:
                    paused_until = time.monotonic() + NO_ROOM_SECONDS
                except (ValueError, OSError):
                    failed.add(shard)  # its reader says why
            if is_idle:
                time.sleep(LOOK_SECONDS)
