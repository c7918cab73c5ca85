"""torchrun, with the exit codes of a training process: ``python -m megatron_depthattn.launch.torchrun OPTIONS``.

Takes torchrun's own options and hands them on. Rendezvous, lost nodes, restarts and log files are torchrun's (c10d).
On top of it: 75 (stopped by a signal, state saved) and 70 (hung) are returned as the ranks gave them, where torchrun
returns 1; neither a run that was stopped nor one with a mistake in it is restarted; a node that waits says for whom;
the last line is the first failure. What torchrun itself logs goes to ``torchrun.log`` beside the ranks' logs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_depthattn import launch
from megatron_depthattn.config import load_config, validate
from megatron_depthattn.launch import EXIT_DONE, EXIT_ERROR, EXIT_REQUEUE, report
from megatron_depthattn.launch.failures import first_failure
from megatron_depthattn.parallel.launch_env import quiet_torch, set_defaults, variable

CHECKED = ("megatron_depthattn.train", "megatron_depthattn.preflight")
"""The modules whose config is checked before anything is started."""
JOIN_SECONDS = 60
"""How long nodes wait for each other, at first and after a failure (``--rdzv-conf join_timeout=...``)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """torchrun's command line.

    Returns:
        0 done, 75 stopped by a signal with its state saved, 70 hung, 1 an error, whose line is the last on stderr.
    """
    for number in launch.heeded_signals():
        signal.signal(number, _stop_early)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a file shows at once what the ranks print
    try:
        set_environment()
        with quiet_torch():  # a head that is not there yet is no page of C++ frames
            from torch.distributed.run import get_args_parser

        parser = get_args_parser()
        options = parser.parse_args([*_defaults(parser), *(sys.argv[1:] if arguments is None else arguments)])
        if options.nnodes in ("1", "1:1"):
            options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", "run"
        else:  # with its shared store torchrun does not recover from a lost node
            set_defaults(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        return _launch(options)
    except (ValueError, OSError) as error:
        report(f"error: {error}")
        return EXIT_ERROR


def set_environment() -> None:
    """Set for the ranks what ``launch/environment.sh`` sets; what the user has set stays."""
    script = launch.scripts() / "environment.sh"
    command = ["bash", "-c", '. "$0" && env -0', str(script)]
    shown = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=False)
    if shown.returncode:
        raise ValueError(f"{script} does not run here ({shown.stderr.strip()}): it needs bash and an env with -0")
    set_defaults(**dict(line.split("=", 1) for line in shown.stdout.split("\0") if line))


def _stop_early(number: int, _: FrameType | None) -> NoReturn:
    report(f"stopped by {signal.Signals(number).name} before the ranks were started: the same command starts them")
    sys.exit(EXIT_REQUEUE)


def _defaults(parser: ArgumentParser) -> list[str]:
    """Options to put before the user's, those that this version of torch knows."""
    seconds = launch.SHUTDOWN_SECONDS
    signals = ",".join(number.name for number in launch.heeded_signals())
    wanted = ["--rdzv-backend=c10d", "--tee=3", "--local-ranks-filter=0", f"--shutdown-timeout={seconds}"]
    wanted.append(f"--signals-to-handle={signals}")
    known = {name for action in parser._actions for name in action.option_strings}
    return [option for option in wanted if option.partition("=")[0] in known]


def _launch(options: Namespace) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from megatron_depthattn.launch.agent import Agent, handle_signals

    logs = _check_run(options, torchrun.determine_local_world_size)
    if logs is not None and options.log_dir is None:
        folder = logs / f"{time.strftime('%Y%m%dT%H%M%S')}_{socket.gethostname()}"
        folder.mkdir(parents=True, exist_ok=True)
        options.log_dir = str(folder)
        _log_to(folder / "torchrun.log")
        set_defaults(TORCH_FR_DUMP_TEMP_FILE=str(folder / "flight_recorder_"))
    config, command, command_arguments = torchrun.config_from_args(options)
    _set_rendezvous(config, options)
    if not config.log_line_prefix_template:  # torchrun's own is [default0]: on one node one that renders as nothing
        config.role = "" if config.max_nodes == 1 else config.role
        config.log_line_prefix_template = "${role_name}" if config.max_nodes == 1 else "[rank ${rank}] "
    problem, agent = "", None
    handle_signals()
    try:
        agent = Agent(config, command, command_arguments)
        codes = agent.run_until_end()
    except SignalException as error:
        codes = (agent.exit_codes() if agent else set()) or {-error.sigval}
    except RendezvousError as error:
        codes = agent.exit_codes() if agent else set()
        if not only_the_head_has_gone(error, codes):
            codes, problem = {EXIT_ERROR}, _join_failure(error, config, agent)
    # What has been recovered from is not the failure; a rank that was killed at once is dated a second back.
    return _end(codes, problem, logs, agent.started - 2.0 if agent and agent.started else time.time())


def only_the_head_has_gone(error: Exception, codes: set[int]) -> bool:
    """Whether all ranks of this node ended well, and the node of the rendezvous had just before.

    A closed rendezvous is another node's failure, which may have stopped ranks here before there was anything to save.
    """
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

    return bool(codes) and codes <= {EXIT_DONE, EXIT_REQUEUE} and not isinstance(error, RendezvousClosedError)


def _end(codes: set[int], problem: str, logs: Path | None, started: float) -> int:
    """Say how it ended; returns the exit code."""
    code = launch.exit_code(codes)
    if code == EXIT_REQUEUE:
        saved = "saved" if EXIT_REQUEUE in codes else "before there was anything to save"
        report(f"stopped by a signal, {saved}: start the same command again")
    elif code != EXIT_DONE:
        failure = first_failure(logs, started) if logs else None
        lines = [f"error: {problem}"] if problem else []
        if logs and failure:
            lines.append(f"all logs: {logs}, shown by: launch/logs {logs.parent}")
            if variable("REPORT_FAILURE") != "0":  # the batch script does, after Slurm's own last lines
                lines.append(failure.text)
        report("\n".join(lines) or f"error: exit code {code}; the ranks' own lines say why")
    return code


def _check_run(options: Namespace, local_world_size: Any) -> Path | None:
    """Check the config for the world that is asked for, before anything is started; returns the folder of logs."""
    from torch import cuda

    if options.nproc_per_node == "gpu" and not cuda.is_available():
        raise ValueError("there is no GPU to count: set NPROC_PER_NODE (--nproc-per-node) to a number")
    words = options.training_script_args
    if options.training_script not in CHECKED or not words or {"-h", "--help"} & set(words):
        return None
    config = load_config(words[0], words[1:])
    nodes, processes = int(str(options.nnodes).split(":")[-1]), local_world_size(options.nproc_per_node)
    try:
        validate(config, nodes * processes)
    except ValueError as error:
        raise ValueError(f"with {nodes} x {processes} processes: {error}") from error
    return Path(config.run.dir) / "logs"


def _set_rendezvous(config: Any, options: Namespace) -> None:
    """Timeouts, and the address by which this node is called: its own name may be a loopback address."""
    conf = config.rdzv_configs
    conf.setdefault("join_timeout", str(JOIN_SECONDS))
    conf.setdefault("read_timeout", conf["join_timeout"])
    if config.max_nodes == 1:
        config.local_addr = config.local_addr or "127.0.0.1"
        return
    host, _, port = options.rdzv_endpoint.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--rdzv-endpoint is {options.rdzv_endpoint!r}: set it to the head's HOST:PORT, on every node")
    if config.local_addr is None:
        is_head = str(conf.get("is_host", "")).lower() in ("1", "true")
        config.local_addr = host if is_head else _address_towards(host, int(port))
    interface = _interface_of(config.local_addr)
    if interface and interface != "lo":  # gloo would take the address of the host's name
        set_defaults(GLOO_SOCKET_IFNAME=interface)


def _join_failure(error: Exception, config: Any, agent: Any) -> str:
    """One line for a rendezvous that failed."""
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError

    endpoint, within = config.rdzv_endpoint, f"within {config.rdzv_configs['join_timeout']} s (JOIN_TIMEOUT)"
    if agent and isinstance(error, RendezvousTimeoutError):
        return f"not all nodes came {within}: {agent.joined()}"
    if agent:
        lost = f"the head at {endpoint}" if isinstance(error, RendezvousConnectionError) else "another node"
        return f"{lost} has ended the run, or is lost; {agent.joined()}"
    reason = "whose name cannot be resolved here"
    with contextlib.suppress(OSError):
        reason = f"which is {socket.gethostbyname(endpoint.rpartition(':')[0])} here"
    return f"no rendezvous at {endpoint} {within}; {reason}. Check that the head (NODE_RANK=0) runs, and the port"


def _address_towards(host: str, port: int) -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return str(probe.getsockname()[0])
    return None


def _interface_of(name: str | None) -> str | None:
    import psutil

    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name or "")
        for interface, addresses in psutil.net_if_addrs().items():
            if address in (each.address for each in addresses):
                return interface
    return None


def _log_to(path: Path) -> None:
    """Let torchrun's loggers write to a file instead of the console."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.")]
    for logger in map(logging.getLogger, names):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
