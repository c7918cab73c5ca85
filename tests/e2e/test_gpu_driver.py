"""The driver of `make gpu` over processes that behave in every way, cut anywhere. Benchmarks: test_benchmarks.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools import gpu

ROOT = Path(__file__).parents[2]
GPU = "Stand-in H200"
PART = """
import os, signal, sys, time, traceback
from pathlib import Path
from megatron_depthattn.benchmarks import result
from megatron_depthattn.benchmarks.result import Result, write_json
result.gpu_name = lambda: None  # without torch, whose import is most of the time
name, base = sys.argv[1:]
with open(OUTPUT / "started", "a") as file:
    file.write(f"{name}\\n")
def leave(until="", **more):
    write_json(Path(base + ".json"), Result(f"table of {name}", ["model"], [["vanilla"]], until=until, **more))
    print(until or "done", flush=True)
if name == "one":
    leave()
elif name == "raises":
    raise RuntimeError("no kernel image is available")
elif name == "one-model-raises":
    leave(failures={"triton": "Traceback ...\\nCompilationError: at 3:4"})
elif name == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
elif name == "is-stubborn":
    signal.signal(signal.SIGTERM, lambda *_: None)
    leave("round 1 of 12")
    time.sleep(60)
elif name == "takes-long":
    if (OUTPUT / "quick").exists():
        leave()
    else:
        leave("round 7 of 12")
        time.sleep(60)
elif name == "last":
    leave()
"""
DRIVER = """
import sys
from pathlib import Path
from megatron_depthattn.benchmarks import result
from tools import gpu
OUTPUT = Path(sys.argv[1])
gpu.PARTS = tuple(gpu.Part(name, (), (name,), 1.5 if name == "is-stubborn" else 60) for name in NAMES)
gpu.command_of = lambda part, base: [sys.executable, str(OUTPUT / "part.py"), part.name, str(base)]
gpu.gpu_name = result.gpu_name = lambda: GPU
gpu.LOOK_SECONDS, gpu.GRACE_SECONDS = 0.2, 0.5
sys.exit(gpu.main(["--output", *sys.argv[1:]]))
"""
NAMES = ("one", "raises", "one-model-raises", "dies", "is-stubborn", "takes-long", "last")


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    (folder / "part.py").write_text(f"OUTPUT = __import__('pathlib').Path({str(folder)!r})\n{PART}")
    (folder / "driver.py").write_text(f"NAMES, GPU = {NAMES!r}, {GPU!r}\n{DRIVER}")
    command = [sys.executable, str(folder / "driver.py"), str(folder), *more]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def parts_in(folder: Path) -> dict[str, dict]:
    results = json.loads((folder / "stand-in-h200.json").read_text())
    return {part["part"]: part for part in results["parts"]}


def wait_for(folder: Path, part: str, said: str) -> None:
    """Until the page, as it is on disk, says so."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (folder / "stand-in-h200.json").exists() and said in parts_in(folder).get(part, {}).get("said", ""):
            return
        time.sleep(0.1)
    raise AssertionError(f"{part} never said {said}: {parts_in(folder)}")


def gone(folder: Path, part: str) -> bool:
    """Whether no process of the part is left."""
    words = f"{folder}/part.py\0{part}\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in path.read_text():
                return False
        except OSError:
            continue
    return True


def test_a_call_is_cut_anywhere_and_the_next_one_continues(tmp_path):
    driver = start(tmp_path)
    wait_for(tmp_path, "takes-long", "round 7 of 12")
    driver.terminate()
    driver.communicate(timeout=60)
    assert driver.returncode == 128 + signal.SIGTERM
    found = parts_in(tmp_path)
    said = {name: (part["state"], part["said"].partition(" s")[0]) for name, part in found.items()}
    assert [*found] == [*NAMES[:-1]]  # the last one was not reached
    assert said["one"] == ("ran", "see below")
    assert said["raises"] == ("failed", "exit code 1: RuntimeError: no kernel image is available")
    assert "```text\nTraceback (most recent call last):" in found["raises"]["page"]
    assert found["one-model-raises"]["said"] == "see below; did not run: triton"
    assert "CompilationError: at 3:4" in found["one-model-raises"]["page"]
    assert found["dies"]["said"].startswith("exit code -11")
    assert found["is-stubborn"]["state"] == "failed" and "at its limit" in found["is-stubborn"]["said"]
    page = tmp_path / "stand-in-h200.md"
    assert found["takes-long"]["state"] == "cut" and "takes-long (so far: round 7 of 12)" in page.read_text()
    assert gone(tmp_path, "takes-long") and gone(tmp_path, "is-stubborn")

    driver = start(tmp_path)
    while (tmp_path / "started").read_text().split()[-2:] != ["takes-long", "takes-long"]:
        time.sleep(0.1)
    driver.kill()
    driver.communicate(timeout=60)
    assert parts_in(tmp_path)["takes-long"]["state"] == "cut"
    end = time.monotonic() + 30
    while not gone(tmp_path, "takes-long"):
        assert time.monotonic() < end, "a process outlives the driver"
        time.sleep(0.1)

    (tmp_path / "quick").touch()
    again = start(tmp_path)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    started = (tmp_path / "started").read_text().split()
    assert started == [*NAMES[:-1], "takes-long", "takes-long", "last"]  # what failed would fail again
    assert {name: part["state"] for name, part in parts_in(tmp_path).items()} == {
        **{"one": "ran", "raises": "failed", "one-model-raises": "failed", "dies": "failed", "is-stubborn": "failed"},
        **{"takes-long": "ran", "last": "ran"},
    }
    output, _ = start(tmp_path, "--again", "--parts", "one", "raises", "--minutes", "2").communicate(timeout=60)
    assert (tmp_path / "started").read_text().split()[len(started) :] == ["one", "raises"], output
    text = page.read_text()
    assert "3 ran, 4 failed, 0 cut, 0 skipped" in text and str(ROOT) not in text and str(tmp_path) not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: make gpu would measure for minutes")
def test_without_a_gpu_everything_is_skipped_and_the_page_is_written(tmp_path):
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"GPU_ARGS=--output {tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "no-gpu.json").read_text())
    assert [part["part"] for part in results["parts"]] == [part.name for part in gpu.PARTS]
    assert all("torch sees no NVIDIA GPU" in part["said"] for part in results["parts"])
    assert f"0 ran, 0 failed, 0 cut, {len(gpu.PARTS)} skipped" in (tmp_path / "no-gpu.md").read_text()


def test_a_rehearsal_starts_the_processes_of_parts(tmp_path, capsys):
    """One of pytest, which finds its tests and skips them, and one of a benchmark."""
    assert gpu.main(["--tiny", "--output", str(tmp_path), "--parts", "smoke-mix", "op", "--minutes", "20"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--tiny"])
    assert "set --output" in capsys.readouterr().err
    smoke, op = json.loads((tmp_path / "tiny.json").read_text())["parts"]
    assert (smoke["state"], op["state"]) == ("skipped", "ran") and len(op["figures"]["rows"]) > 1
    assert sum(smoke["figures"]["skipped"].values()) == len(selected(gpu.PARTS[0]))


@pytest.mark.parametrize("part", gpu.PARTS[:3], ids=lambda part: part.name)
def test_a_smoke_part_is_a_few_tests(part):
    assert part.name.startswith("smoke") and 4 <= len(selected(part)) <= 10


def selected(part: gpu.Part) -> list[str]:
    """What pytest collects for the part."""
    names: list[str] = []
    plugin = SimpleNamespace(pytest_collection_finish=lambda session: names.extend(i.nodeid for i in session.items))
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *part.arguments], plugins=[plugin])
    return names
