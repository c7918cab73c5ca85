"""The training run: `Training.__init__` lists its parts, `Training.run` is the table of contents."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import math
import signal
import time
import uuid
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_depthattn.config import RunConfig, config_digest, save_config, to_dict, validate
from megatron_depthattn.config.stages import stages_of
from megatron_depthattn.ops.triton_mix import triton_unsupported
from megatron_depthattn.parallel.groups import COLLECTIVE_TIMEOUT, check_same_on_all_ranks, shut_down
from megatron_depthattn.parallel.launch_env import LaunchEnvironment
from megatron_depthattn.preflight.run import enter_world
from megatron_depthattn.train.build import transformer_config
from megatron_depthattn.train.checkpoint import Loaded
from megatron_depthattn.train.curves import check_wandb
from megatron_depthattn.train.data import GlobalBatches, StopAgreement, held_out_splits
from megatron_depthattn.train.engine import Engine, MegatronEngine
from megatron_depthattn.train.hardware import for_this_machine
from megatron_depthattn.train.history import EndReason, RunHistory, package_digest
from megatron_depthattn.train.metrics import DepthRecord, Meter, opening_lines, peak_memory_gb
from megatron_depthattn.train.parent import check_parent, data_notes
from megatron_depthattn.train.reporter import Reporter, SampleLog
from megatron_depthattn.train.save import RunCheckpoints
from megatron_depthattn.train.start import (
    Start,
    broadcast_from_rank0,
    check_owner,
    claim_checkpoints,
    find_start,
    is_own_checkpoint,
    lock_run,
)
from megatron_depthattn.train.step import NOTHING_PREDICTED, NonFiniteError, RankStatus, SkippedSteps
from megatron_depthattn.train.step_folders import GENERATION, Progress, quarantine_after
from megatron_depthattn.train.stop_signals import EXIT_REQUEUE, StopSignals
from megatron_depthattn.train.watchdog import Watchdog


def train(config: RunConfig, environment: LaunchEnvironment, signals: StopSignals) -> int:
    """Train as ``config`` says, from scratch or from a checkpoint, to the end, to ``train.stop_after`` or to a signal.

    Returns:
        The exit code: 0 at the end or at ``train.stop_after``, `EXIT_REQUEUE` after a signal; its state is saved.

    Raises:
        ValueError: the config cannot run here; says what to set.
        NonFiniteError: loss or gradient stopped being finite; the last checkpoint is untouched.
        CheckpointError: the last state could not be saved.
    """
    training = Training(config, environment, signals)
    try:
        exit_code = training.run()
    except BaseException as error:
        error.add_note(f"(rank {environment.rank}, after step {training.progress.step})")
        raise
    training.close()
    return exit_code


class Training:
    """One process's part of a run: everything between its start and its end.

    Args:
        given: the run's config, as it was given.
        environment: this process's place in the world.
        signals: end this process at once until here, where a start is about to be put on record.
    """

    def __init__(self, given: RunConfig, environment: LaunchEnvironment, signals: StopSignals) -> None:
        resolved = for_this_machine(given, validate(given, environment.world_size))
        config = self.config = resolved.config
        self.run_dir, self.checkpoint_dir = Path(config.run.dir), Path(config.checkpoint_dir)
        check_owner(self.checkpoint_dir, self.run_dir)  # preflight writes there
        # Longer than a hang may last: the watchdog reports more than a collective that gives up.
        hang = config.train.hang_timeout
        timeout = max(COLLECTIVE_TIMEOUT, 2 * timedelta(seconds=hang)) if hang else timedelta(days=1)
        device, preflight = enter_world(resolved, environment, timeout)
        megatron, self.world_size = transformer_config(config), environment.world_size
        if not config.preflight.enabled:
            check_same_on_all_ranks("run configs", f"{config_digest(config)}, {config.model.spec} layers")
        if megatron.shares_over_layers:
            check_same_on_all_ranks("source plans", megatron.source_plan.digest())
        self.start_id = broadcast_from_rank0(self._lock)
        load, start_from = config.checkpoint.load, config.checkpoint.start_from
        with ExitStack() as held:
            start = find_start(load, self.run_dir, self.checkpoint_dir, start_from, held)
            self.engine = build_engine(config, device, environment)
            loaded = Loaded(Progress())
            if start.folder:
                loaded = self.engine.load(start.folder, is_parent=start.is_parent)
                dist.barrier()  # rank 0 holds the lease for all
        if is_own_checkpoint(start.folder, self.checkpoint_dir):
            broadcast_from_rank0(lambda: check_parent(start_from, loaded.parent, self.run_dir))
        self.progress, self.generation, self.parent = loaded.progress, loaded.generation, loaded.parent
        self.last_step = max(config.train.steps, self.progress.step)
        if config.train.stop_after is not None:
            self.last_step = min(config.train.steps, self.progress.step + config.train.stop_after)
        vocab_size, seed = config.model.vocab_size, config.run.seed
        open_data = partial(GlobalBatches, train=config.train, device=device, vocab_size=vocab_size, seed=seed)
        done, consumed = self.progress.step, self.progress.consumed_samples
        stages = stages_of(config.data, config.train, step=done, consumed_samples=consumed, known=loaded.stages)
        self.batches = open_data(config.data, consumed_samples=consumed, stages=stages)
        splits = broadcast_from_rank0(lambda: held_out_splits(config.data)) if config.train.eval_interval else {}
        self.held_out = {
            name: open_data(data, split=split, trained_on=self.batches.corpus) for name, (data, split) in splits.items()
        }
        """What the run is evaluated on, by name; the val split of its own corpora has the name ''."""
        _check_corpus(start, loaded, self.batches)
        self.signals, self.agreement = signals, StopAgreement(signals)
        signals.only_note()
        self.history: RunHistory | None = None
        self.run_id = broadcast_from_rank0(lambda: self._enter_history(start, config_digest(given)))
        self.sample_log = SampleLog(self.run_dir, is_on=config.data.log_samples, first_step=self.progress.step)
        self.meter = Meter(config, self.world_size)
        remaining = partial(config.train.batch_sizes.consumed_after, consumed=self.progress.consumed_samples)
        self.report = Reporter(
            self.run_dir,
            log_interval=config.train.log_interval,
            first_step=self.progress.step,
            last_step=self.last_step,
            wandb=config.log.wandb,
            samples=(self.progress.consumed_samples, remaining(self.last_step - self.progress.step)),
        )
        self.checkpoints = RunCheckpoints(
            config.checkpoint, self.checkpoint_dir, self._state, self.report, lambda: self._heartbeat("checkpoint")
        )
        self.depth = DepthRecord(config.train, megatron, config.data.sequence_length)
        self.skipped = SkippedSteps(config.train.on_non_finite, config.train.max_skipped_in_a_row)
        self.watchdog: Watchdog | None = None
        begins = f"{start.folder}, at step {self.progress.step}" if start.folder else "from initial weights"
        self.last_sample = remaining(max(0, config.train.steps - self.progress.step))
        self.report.lines(preflight)
        self.report.lines(opening_lines(config, megatron, self.world_size, begins))
        self.report.lines(self.engine.describe())
        self.report.lines(self.batches.describe(self.progress.consumed_samples, self.last_sample))
        self.report.lines(f"held-out {name}: {data.path}/{split}" for name, (data, split) in splits.items() if name)
        self.report.lines(loaded.notes)
        if loaded.parent and loaded.common:
            corpus = self.batches.corpus
            digests = corpus.digest, corpus.streams[0].tokenizer
            self.report.warn(data_notes(loaded.parent, loaded.common, to_dict(config), *digests))
        self.report.warn(start.warnings)
        gc.collect()
        gc.freeze()  # what has been built stays: no later collection looks at it again
        atexit.register(gc.unfreeze)

    def run(self) -> int:
        """Step until the last step or a stop signal; returns the exit code."""
        # A store outlives the processes of a start that torchrun repeats: each start has its own place in it.
        store = dist.PrefixStore(self.start_id, dist.distributed_c10d._get_default_store())
        hang, ranks = self.config.train.hang_timeout, {"rank": dist.get_rank(), "world_size": self.world_size}
        with Watchdog(hang, self.run_dir / "stacks", store=store, **ranks) if hang else nullcontext() as self.watchdog:
            self._heartbeat("first step")
            try:
                self._evaluate_first()
                while self.progress.step < self.last_step and self._step():
                    self._save_if_due()
                if self.agreement.stop_signal and not self.signals.nothing_to_save:
                    self.checkpoints.save_last(self.progress)
            except NonFiniteError:
                self.checkpoints.finish()  # one may still be under way
                self._end("not finite")
                raise
        if self.agreement.stop_signal:
            self._end("signal", signal=signal.Signals(self.agreement.stop_signal).name)
            return EXIT_REQUEUE
        self._end("finished" if self.progress.step >= self.config.train.steps else "stop_after")
        return 0

    def close(self) -> None:
        """Leave the world."""
        self.report.lines(self.batches.cache_lines())
        for batches in (self.batches, *self.held_out.values()):
            batches.close()
        self.sample_log.close()
        self.report.close()
        shut_down()

    def _evaluate_first(self) -> None:
        """Before the first step, and the evaluation that a stop has cut off."""
        step = self.progress.step
        if step == 0:
            self._evaluate()
        elif self._is_evaluation_due() and broadcast_from_rank0(lambda: self.report.lacks(step, self.held_out)):
            self.report.add_evaluation(step, self._evaluate())

    def _save_if_due(self) -> None:
        if self.progress.step == self.last_step:
            self.checkpoints.save_last(self.progress)
        elif self._is_save_due():
            self.checkpoints.save(self.progress)
            self.agreement.ask_again()
        self.checkpoints.log_outcome()
        self._heartbeat("step")

    def _is_save_due(self) -> bool:
        checkpoint, step = self.config.checkpoint, self.progress.step
        return _is_due(step, checkpoint.interval) or step in (checkpoint.keep_steps or ())

    def _step(self) -> bool:
        """One optimizer step, on record; false if there was none, because some rank was asked to stop.

        A step's seconds end when its optimizer has been launched; a device may still be at it when the next begins,
        whose seconds then hold the rest.
        """
        step = self.progress.step + 1
        started, waited = time.monotonic(), self.batches.data_seconds
        if not self.agreement.may_continue(self.batches):
            return False
        self.signals.nothing_to_save = False
        batch_size = self.config.train.batch_sizes.at(self.progress.consumed_samples)
        streams = self.batches.stream_samples(self.progress.consumed_samples + batch_size)
        self.report.lines(self.batches.stage_begins(step, self.last_sample))
        self.engine.advance_schedule(batch_size)
        microbatches = self.batches.next()
        waited = self.batches.data_seconds - waited
        with self.depth.recording(step):
            result = self.engine.train_step(
                microbatches, lambda: RankStatus(waited, peak_memory_gb(), self.signals.received, self.batches.has_next)
            )
        seconds = time.monotonic() - started
        self.agreement.note(result.statuses, self.batches)
        self.sample_log.write(step, microbatches, streams)
        if result.skipped:
            self.report.warn(f"step {step} not finite: {line}" for line in result.diagnosis)
        self.skipped.record(step, result)
        self.progress = self.progress.after_step(batch_size, self.config.data.sequence_length, skipped=result.skipped)
        self._heartbeat("step")
        blocked = self.checkpoints.blocking_seconds
        record = self.meter.record(
            self.progress,
            result,
            samples=batch_size,
            lr=self.engine.learning_rate,
            seconds=seconds,
            blocked_seconds=blocked,
        )
        record |= {"depth": self.depth.collect(), "stream_samples": streams}
        if step == self.last_step or self._is_evaluation_due():
            record |= self._evaluate()
        self.report.step(record)
        return True

    def _is_evaluation_due(self) -> bool:
        train, step = self.config.train, self.progress.step
        return step == train.steps or _is_due(step, train.eval_interval)

    def _evaluate(self) -> dict[str, Any]:
        """Mean loss in nats per token over the first ``train.eval_batches`` global batches of each held-out split.

        Returns:
            What is put on record; nothing without an evaluation, or if it was dropped because some rank was asked to
            stop.
        """
        losses = {}
        with self.engine.evaluating() if self.held_out else nullcontext():
            for name, batches in self.held_out.items():
                if (loss := self._held_out_loss(name, batches)) is None:
                    return {}
                losses[name] = loss
        self.meter.add_held_out(self.progress.step, losses)
        return {"eval_loss": losses.pop("", None), "held_out": losses or None}

    def _held_out_loss(self, name: str, batches: GlobalBatches) -> float | None:
        train = self.config.train
        num_batches = max(1, min(train.eval_batches, len(batches.corpus) // train.global_batch_size))
        batches.seek(0)
        losses = []
        for _ in range(num_batches):
            self._heartbeat("evaluation")
            if not self.agreement.may_continue(batches):
                return None
            losses.append(self.engine.loss(batches.next()))
        # By their tokens, as shares of the most: equal ones weigh 1 to the bit.
        if not (most := max(one.tokens for one in losses)):
            raise ValueError(f"held-out {name or 'val'}: {NOTHING_PREDICTED}, or set a larger train.eval_batches")
        weights = [one.tokens / most for one in losses]
        loss = sum(one.mean * weight for one, weight in zip(losses, weights, strict=True)) / sum(weights)
        if not math.isfinite(loss):
            raise NonFiniteError(f"held-out loss {loss} is not finite; the last checkpoint is untouched")
        return loss

    def _heartbeat(self, phase: str) -> None:
        """Send a heartbeat: this rank makes progress, and `phase` begins."""
        if self.watchdog:
            self.watchdog.heartbeat(self.progress.step, phase)

    def _state(self) -> dict[str, Any]:
        corpus = self.batches.corpus
        run: dict[str, Any] = {"run_id": self.run_id, "corpus": corpus.digest, "tokenizer": corpus.streams[0].tokenizer}
        run |= {GENERATION: self.generation, "parent": self.parent and self.parent._asdict()}
        run["stages"] = [list(stage) for stage in self.batches.stages if stage.from_step <= self.progress.step]
        return self.engine.checkpoint_state(**run)

    def _lock(self) -> str:
        """Take the run's folders for this start, until this process ends; returns a name that no other start has."""
        check_wandb(self.config.log.wandb)
        self.lock = lock_run(self.run_dir)
        self.claim = claim_checkpoints(self.checkpoint_dir, self.run_dir)
        return uuid.uuid4().hex

    def _enter_history(self, start: Start, config: str) -> str:
        """On rank 0: the run's history and identity, once it is sure that this start makes sense.

        ``config``: digest of the config as it was given, whatever `auto` became this time.
        """
        step, version = self.progress.step, f"{config}-{package_digest()}"
        history = RunHistory(self.run_dir, self.claim.run_id)
        start.warnings.extend(self.claim.notes)
        history.check_restart_loop(step, version, self.config.train.max_restarts_without_progress)
        if is_own_checkpoint(start.folder, self.checkpoint_dir):
            left = quarantine_after(self.checkpoint_dir, step)
            start.warnings.extend(f"{path} is beyond step {step}, where this run resumes" for path in left)
        save_config(self.config, self.run_dir / "config.yaml")
        parent = {"parent": self.parent._asdict()} if self.parent else {}
        history.start(step, version, self.world_size, self.config.checkpoint.load, **parent)
        self.history = history
        return history.run_id

    def _end(self, outcome: EndReason, **more: Any) -> None:
        if self.history is None:
            return
        more["checkpoint_seconds"] = self.checkpoints.blocking_seconds
        try:
            record = self.history.end(self.progress.step, outcome, **more)
        except OSError as error:
            self.report.warn([f"the end of this run is not on record: {error}"])
            return
        self.report.lines(self.meter.closing_lines(self.progress, record))


def _check_corpus(start: Start, loaded: Loaded, batches: GlobalBatches) -> None:
    if loaded.corpus not in (None, batches.corpus.digest):
        raise ValueError(
            f"{start.folder} was trained on other data than data.path or data.streams hold now (another digest): "
            "give the same corpora in the same order, wherever they lie, or start a new run: another run.dir with "
            "checkpoint.load=null."
        )


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def build_engine(config: RunConfig, device: torch.device, environment: LaunchEnvironment) -> Engine:
    """The engine that ``engine.name`` names, with initial weights; call after the process groups are there.

    Raises:
        ValueError: DeepSpeed is not installed, no launcher started this process, or the mix's op cannot run on this
            device.
    """
    mixes = config.model.effective_method == "depth_attention"
    if mixes and config.model.depth_attention.op == "triton" and (reason := triton_unsupported(device)):
        raise ValueError(f"model.depth_attention.op=triton {reason}")
    if config.engine.name == "megatron":
        return MegatronEngine(config, device)
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "engine.name=deepspeed, but DeepSpeed is not installed: pip install 'megatron-depthattn[deepspeed]', or "
            "set engine.name=megatron"
        )
    if not environment.launched:
        raise ValueError(
            "engine.name=deepspeed in a process that no launcher started: DeepSpeed reads the launcher's LOCAL_RANK; "
            "start it with torchrun --standalone --nproc_per_node 1 -m megatron_depthattn.train ..."
        )
    from megatron_depthattn.train.deepspeed_engine.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, device)
