"""The curves of a run beside its record: TensorBoard and Weights & Biases get the same numbers by the same names.

Neither is a reason for a run to stop. TensorBoard's files are written here; Weights & Biases has a process of its own
(`wandb_mirror`), which reads the run's record and which no step waits for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from megatron_depthattn.config import WandbConfig
from megatron_depthattn.config.load import load_record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVALUATIONS = "evaluations.jsonl"
EVALUATION = "evaluation"
"""What the names of an evaluation's curves begin with."""
FINISH_SECONDS = 30.0
"""How long what is still on its way to Weights & Biases is waited for at the end of a run."""
STILL_SENDING = "much is still on its way; this process ends by itself"
"""What the mirror says if that was not enough for a record of which nothing was there."""


def run_curves(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by the names of their curves; what is null has none."""
    rest = {key: value for key, value in record.items() if key not in ("step", "depth", "held_out")}
    named = _numbers(record.get("held_out") or {}, "eval_loss/")
    return {**dict(_numbers(rest)), **dict(named), **depth_curves(record.get("depth"))}


def evaluation_curves(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of evaluations.jsonl, its ``values``, by the names of their curves."""
    return dict(_numbers(record.get("values", {}), f"{EVALUATION}/{record.get('name')}/"))


def depth_curves(depth: Mapping[str, Any] | None) -> dict[str, float]:
    """A record's weights over depth by the names of their curves."""
    curves: dict[str, float] = {}
    for layer, layer_record in (depth or {"layers": {}})["layers"].items():
        folder = f"depth/layer_{int(layer):03d}"
        names = [*(f"source_{source:03d}" for source in layer_record["sources"]), "self"]
        curves |= {f"{folder}/{name}": weight for name, weight in zip(names, layer_record["weights"], strict=True)}
        curves |= {f"{folder}/{name}": layer_record[name] for name in ("entropy", "collapsed")}
    return curves


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def log_evaluation(run_dir: Path, step: int, values: Mapping[str, Any]) -> str | None:
    """Add an evaluation to a run's curves, while it trains or afterwards, from any process; raises nothing.

    TensorBoard has it as the run `evaluations` beside the training's. Weights & Biases gets whatever line of
    evaluations.jsonl it has not got yet: from the training process's mirror, or where none is running from one that is
    started here and waited for.

    Args:
        values: the line that was added to evaluations.jsonl before; its numbers are drawn.

    Returns:
        Why it is missing in one of them; None: it is not.
    """
    try:
        board = TensorBoard(run_dir / "tensorboard" / "evaluations", evaluation_curves)
        board.draw({**values, "step": step})
        board.close()
        if is_mirrored(load_record(run_dir / "config.yaml").log.wandb):
            process = subprocess.Popen(
                [*_mirror(run_dir), "--once"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            said, _ = process.communicate(b".", timeout=10 * FINISH_SECONDS)  # longer ones end alone
            if process.returncode:
                lines = said.decode(errors="replace").strip().splitlines()
                return f"Weights & Biases: exit code {process.returncode}, {lines[-1] if lines else 'no word'}"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return str(error)
    return None


class Report(Protocol):
    """Where a run's lines go."""

    def lines(self, texts: Iterable[str]) -> None:
        """Lines for people."""

    def warn(self, texts: Iterable[str]) -> None:
        """Lines that nobody should miss."""


class TensorBoard:
    """Writes event files.

    Args:
        folder: where they lie.
        curves: the numbers of a record by the names of their curves.
        purge_step: from which step on TensorBoard is to forget what is there.
    """

    def __init__(
        self,
        folder: Path,
        curves: Callable[[Mapping[str, Any]], dict[str, float]] = run_curves,
        purge_step: int | None = None,
    ) -> None:
        self._folder, self._curves = folder, curves
        self._writer: SummaryWriter | None = self._open(purge_step)

    def draw(self, record: Mapping[str, Any]) -> None:
        """Add a record's numbers."""
        try:
            self._writer = self._writer or self._open()
            for name, value in self._curves(record).items():
                self._writer.add_scalar(name, value, record["step"])
        except OSError:  # a full disk ends the writer's thread: the next step opens another file
            self._writer = None

    def close(self) -> None:
        """Flush and close."""
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step)


def is_mirrored(wandb: WandbConfig) -> bool:
    """Whether a run's curves go to Weights & Biases, as far as the config says."""
    return wandb.project is not None and wandb.mode != "disabled"


def check_wandb(wandb: WandbConfig) -> None:
    """Raise ValueError if a run is to log to Weights & Biases and the packages for that are not installed."""
    specs = {name: importlib.util.find_spec(name) for name in ("wandb", "matplotlib")}
    missing = [name for name, spec in specs.items() if not (spec and spec.origin)]  # a folder ./wandb has no origin
    if is_mirrored(wandb) and missing:
        raise ValueError(
            f"log.wandb.project={wandb.project}, but {' and '.join(missing)} cannot be imported: pip install "
            "'megatron-depthattn[wandb]', or set log.wandb.project=null"
        )


class WandbMirror:
    """The process that brings a run's record to Weights & Biases, as the training process sees it.

    It lives until the pipe to it closes: by `close`, or because the training process has ended in whatever way.
    """

    def __init__(self, run_dir: Path, report: Report) -> None:
        self._report, self._last = report, ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            (run_dir / "wandb").mkdir(exist_ok=True)
            with (run_dir / "wandb" / "mirror.log").open("ab") as log:
                self._process = subprocess.Popen(
                    _mirror(run_dir),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    start_new_session=True,  # signals are for the training process
                )
            assert self._process.stdout
            os.set_blocking(self._process.stdout.fileno(), False)
        except OSError as error:
            self._warn(str(error))

    def draw(self, record: Mapping[str, Any]) -> None:
        """Nothing: the record is a file. Pass on what the process says, once it is lost."""
        if self._process and not self._pass_on() and self._process.poll() is not None:
            self._end()

    def close(self) -> None:
        """Let the process bring the rest and end, and wait for that, up to `FINISH_SECONDS`; if it is sending without
        a pause it may end later, alone."""
        if self._process is None:
            return
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.write(b".")
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(FINISH_SECONDS + 5)
        self._end()

    def _pass_on(self) -> str:
        """Log what the process said since the last time, and return it."""
        assert self._process and self._process.stdout
        said = (self._process.stdout.read(1 << 16) or b"").decode(errors="replace")
        self._report.lines(f"Weights & Biases: {line}" for line in said.splitlines())
        self._last = (said.splitlines() or [self._last])[-1]
        return said

    def _end(self) -> None:
        assert self._process
        self._pass_on()
        if self._process.poll() is None and self._last != STILL_SENDING:
            end_tree(psutil.Process(self._process.pid))
            self._warn("its process hangs")
        elif self._process.returncode:
            self._warn(f"exit code {self._process.returncode}, {self._last or 'no word'}")
        self._process = None

    def _warn(self, reason: str) -> None:
        self._report.warn(
            [f"Weights & Biases is out ({reason}); the run is not affected, and its next start sends what is missing"]
        )


def end_tree(process: psutil.Process) -> None:
    """Kill the processes below one, and it."""
    with contextlib.suppress(psutil.Error):
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait(5)


def _mirror(run_dir: Path) -> list[str]:
    words = ["-m", "megatron_depthattn.train.wandb_mirror", str(run_dir.resolve())]
    return [sys.executable, *words, "--finish-seconds", str(FINISH_SECONDS)]
