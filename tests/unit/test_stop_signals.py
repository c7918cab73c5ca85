"""A stop signal before there is anything to save: the process ends at once, wherever it is, with one line."""

import signal
import subprocess
import sys

import pytest

WAITS = {
    "in Python": "import time; time.sleep(600)",
    "in C, which never comes back": """
import ctypes
mutex = ctypes.create_string_buffer(64)
for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
""",
}
START = """
from megatron_depthattn.train.stop_signals import StopSignals
signals = StopSignals(rank=3)
print("ready", flush=True)
"""


def run(code: str, *numbers: signal.Signals, before: str = "") -> tuple[int, str]:
    """Exit code and stderr of a process that gets these signals once it says that it is ready."""
    command = [sys.executable, "-c", before + START + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


@pytest.mark.parametrize("where", WAITS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_ends_at_once(where: str, number: signal.Signals):
    line = f"stopped by {number.name} before the first step, nothing to save: start the same command again (rank 3)\n"
    assert run(WAITS[where], number) == (75, line)


def test_once_they_are_only_noted_no_number_of_them_ends_anything():
    code = """
signals.only_note()
for _ in range(6):
    signals.received = 0
    print("ready", flush=True)
    while not signals.received:
        pass
"""
    with subprocess.Popen([sys.executable, "-c", START + code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
        assert process.wait(20) == 0


def test_nohup_is_obeyed():
    before = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code = "os.kill(os.getpid(), signal.SIGHUP); assert not signals.received; os.kill(os.getpid(), signal.SIGUSR2)\n"
    returncode, errors = run(code + WAITS["in Python"], before=before)
    assert (returncode, "stopped by SIGUSR2" in errors) == (75, True)
