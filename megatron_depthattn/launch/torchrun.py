"""torchrun, with the exit codes of a training process: ``python -m megatron_depthattn.launch.torchrun OPTIONS``.

Takes torchrun's own options and hands them on. Rendezvous, lost nodes, restarts and log files are torchrun's (c10d).
On top of it: 75 (stopped by a signal, state saved) and 70 (hung) are returned as the ranks gave them, where torchrun
returns 1; neither a run that was stopped nor one with a mistake in it is restarted; a node that waits says for whom;
the last line is the first failure. What torchrun itself logs goes to ``torchrun.log`` beside the ranks' logs.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_depthattn.config import load_config, validate
from megatron_depthattn.launch import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_HANG,
    EXIT_REQUEUE,
    SHUTDOWN_SECONDS,
    SIGNALS,
    heeded_signals,
)
from megatron_depthattn.launch.failures import first_failure
from megatron_depthattn.parallel.launch_env import quiet_torch, set_defaults, variable
from megatron_depthattn.terminal import printable

TRAIN = "megatron_depthattn.train"
JOIN_SECONDS = 60
"""How long nodes wait for each other, at first and after a failure (``--rdzv-conf join_timeout=...``)."""


def run(
    arguments: Sequence[str], *, nproc_per_node: int | str, options: Sequence[str] = (), module: str = TRAIN
) -> int:
    """Run ``module`` under torchrun.

    Args:
        arguments: of the module; for training the config, overlays and ``a.b=c`` settings.
        nproc_per_node: processes on this node, or torchrun's ``gpu``: one for each GPU.
        options: further options of torchrun, such as ``--max-restarts=3``.
        module: what each rank runs.

    Returns:
        0 done, 75 stopped by a signal with its state saved, 70 hung, 1 an error, whose line is the last on stderr.
    """
    return main([f"--nproc-per-node={nproc_per_node}", *options, "-m", module, *arguments])


def main(arguments: Sequence[str] | None = None) -> int:
    """torchrun's command line; returns the exit code."""
    for number in heeded_signals():
        signal.signal(number, _stop_early)
    given = list(sys.argv[1:] if arguments is None else arguments)
    set_defaults(OMP_NUM_THREADS="1")  # as torchrun sets, with a warning
    with quiet_torch():  # a head that is not there yet is no page of C++ frames
        from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    options = parser.parse_args([*_defaults(parser), *given])
    if options.nnodes in ("1", "1:1"):
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", "run"
    else:  # with its shared store torchrun does not recover from a lost node
        set_defaults(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    try:
        return _launch(options)
    except (ValueError, OSError) as error:
        return _report(f"error: {error}", EXIT_ERROR)


def _stop_early(number: int, _: FrameType | None) -> NoReturn:
    text = f"stopped by {signal.Signals(number).name} before the ranks were started: start the same command again"
    sys.exit(_report(text, EXIT_REQUEUE))


def _defaults(parser: ArgumentParser) -> list[str]:
    """Options to put before the user's, those that this version of torch knows."""
    wanted = {
        "--rdzv-backend": "c10d",
        "--tee": "3",
        "--local-ranks-filter": "0",
        "--signals-to-handle": ",".join(number.name for number in heeded_signals()),
        "--shutdown-timeout": str(SHUTDOWN_SECONDS),
    }
    known = {name for action in parser._actions for name in action.option_strings}
    return [f"{name}={value}" for name, value in wanted.items() if name in known]


def _launch(options: Namespace) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    from megatron_depthattn.launch.agent import handle_signals, start_agent

    logs = _check_run(options, torchrun.determine_local_world_size)
    if logs is not None and options.log_dir is None:
        folder = logs / f"{time.strftime('%Y%m%dT%H%M%S')}_{socket.gethostname()}"
        folder.mkdir(parents=True, exist_ok=True)
        options.log_dir = str(folder)
        _log_to(folder / "torchrun.log")
        set_defaults(TORCH_FR_DUMP_TEMP_FILE=str(folder / "flight_recorder_"))
    config, command, command_arguments = torchrun.config_from_args(options)
    _set_rendezvous(config, options)
    if not options.log_line_prefix_template:  # torchrun's own is [default0]: on one node one that renders as nothing
        config.role = "" if config.max_nodes == 1 else config.role
        config.log_line_prefix_template = "${role_name}" if config.max_nodes == 1 else "[rank ${rank}] "
    problem, agent = "", None
    handle_signals()
    try:
        agent = start_agent(config, command, command_arguments)
        codes = agent.run_until_end()
    except SignalException as error:
        codes = (agent.exit_codes() if agent else set()) or {-error.sigval}
    except RendezvousError as error:
        codes = agent.exit_codes() if agent else set()
        if not codes or codes - {EXIT_DONE, EXIT_REQUEUE}:  # else the head has ended with all ranks, a moment earlier
            waiting = agent.waiting if agent else ""
            codes, problem = {EXIT_ERROR}, _join_failure(error, options.rdzv_endpoint, config.rdzv_configs, waiting)
    # What has been recovered from is not the failure; a rank that was killed at once is dated a second back.
    return _end(exit_code(codes), codes, problem, logs, agent.started - 2.0 if agent and agent.started else time.time())


def _end(code: int, codes: set[int], problem: str, logs: Path | None, started: float) -> int:
    """Say how it ended; returns the exit code."""
    if code == EXIT_DONE:
        return code
    if code == EXIT_REQUEUE:
        saved = "saved: start the same command again" if EXIT_REQUEUE in codes else "before there was anything to save"
        return _report(f"stopped by a signal, {saved}", code)
    failure = first_failure(logs, started) if logs else None
    lines = [f"error: {problem}"] if problem else []
    if logs and failure:
        lines.append(f"all logs: {logs}, shown by: launch/logs {logs.parent}")
        if variable("REPORT_FAILURE") != "0":  # the batch script does, after Slurm's own last lines
            lines.append(failure.text)
    return _report("\n".join(lines) or f"error: exit code {code}; the ranks' own lines say why", code)


def exit_code(codes: set[int]) -> int:
    """What the ranks' exit codes mean together. Ranks that torchrun ended after a failure have -SIGTERM, or 75."""
    failed = codes - {EXIT_DONE, EXIT_REQUEUE} - {-number for number in SIGNALS}
    if failed:
        return EXIT_HANG if EXIT_HANG in failed else EXIT_ERROR
    return EXIT_DONE if codes <= {EXIT_DONE} else EXIT_REQUEUE


def _check_run(options: Namespace, local_world_size: Any) -> Path | None:
    """Check the config for the world that is asked for, before anything is started; returns the folder of logs."""
    if options.nproc_per_node == "gpu":
        try:
            local_world_size("gpu")
        except ValueError as error:
            raise ValueError("there is no GPU to count: set NPROC_PER_NODE (--nproc-per-node) to a number") from error
    if options.training_script not in (TRAIN, "megatron_depthattn.preflight") or not options.training_script_args:
        return None
    if any(word in ("-h", "--help") for word in options.training_script_args):
        return None
    path, *overrides = options.training_script_args
    config = load_config(path, overrides)
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
        raise ValueError(
            f"--rdzv-endpoint is {options.rdzv_endpoint!r} with --nnodes={options.nnodes}: set it to HOST:PORT of the "
            "head node, on every node"
        )
    if config.local_addr is None:
        is_head = str(conf.get("is_host", "")).lower() in ("1", "true")
        config.local_addr = host if is_head else _address_towards(host, int(port))
    interface = _interface_of(config.local_addr)
    if interface and interface != "lo":  # gloo would take the address of the host's name
        set_defaults(GLOO_SOCKET_IFNAME=interface)


def _join_failure(error: Exception, endpoint: str, conf: dict[str, Any], waiting: str) -> str:
    """One line for a rendezvous that failed."""
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError

    within = f"within {conf['join_timeout']} s (JOIN_TIMEOUT)"
    if isinstance(error, RendezvousTimeoutError):
        return f"not all nodes came {within}: {waiting}"
    if isinstance(error, RendezvousConnectionError):
        host = endpoint.rpartition(":")[0]
        try:
            reason = f"which is {socket.gethostbyname(host)} here"
        except OSError as lookup:
            reason = f"{lookup.strerror}"
        return f"no rendezvous at {endpoint} {within}; {reason}. Check that the head (NODE_RANK=0) runs, and the port"
    return f"another node has ended the run: {error}"


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
            if any(each.address == address for each in addresses):
                return interface
    return None


def _log_to(path: Path) -> None:
    """Let torchrun's loggers write to a file instead of the console."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(names)]:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def _report(text: str, code: int) -> int:
    print(printable(text), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
