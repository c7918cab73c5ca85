"""From reports to findings: each has its case here, and a healthy world has none; who is missing is named."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_depthattn.parallel import patience
from megatron_depthattn.parallel.groups import join_store
from megatron_depthattn.parallel.launch_env import launch_environment
from megatron_depthattn.preflight import gather, machine
from megatron_depthattn.preflight.compare import compare_reports, describe, group_by_host
from megatron_depthattn.preflight.report import Device, Folder, RankReport, Requirements, from_json

REQUIRED = Requirements(checkpoint_bytes=10**9, checkpoints=3, shared_memory_bytes=10**7, single_queue=True)
GPU = Device(name="H100", uuid="", total_bytes=80 * 10**9, free_bytes=79 * 10**9)
HEALTHY = RankReport(
    device=GPU,
    versions={"python": "3.11.7", "torch": "2.15.0", "transformer-engine": None, "driver": "570.86", "nccl": "2.28"},
    code="c0de",
    code_path="/code",
    config="c0f1",
    settings={"train.steps": "10", "optimizer.lr": "0.1"},
    folders=(
        Folder(key="run.dir", path="/run", free_bytes=10**12),
        Folder(key="checkpoint.dir", path="/checkpoints", free_bytes=10**12),
    ),
    shared_memory_bytes=10**9,
    memory_bytes=10**11,
    open_files=65536,
    variables={"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth0"},
)


def world(num_hosts: int = 2, ranks_each: int = 2) -> list[RankReport]:
    """Healthy ranks; those of a host in a row."""
    return [
        dataclasses.replace(
            HEALTHY,
            rank=host * ranks_each + local,
            host=f"node{host}",
            machine=f"boot{host}",
            address=f"10.0.0.{host + 1}",
            device=dataclasses.replace(GPU, uuid=f"GPU-{host}-{local}"),
        )
        for host in range(num_hosts)
        for local in range(ranks_each)
    ]


def changed(ranks: list[int], **fields) -> list[RankReport]:
    return [dataclasses.replace(report, **(fields if report.rank in ranks else {})) for report in world()]


def folders(**checkpoint) -> tuple[Folder, ...]:
    return (HEALTHY.folders[0], dataclasses.replace(HEALTHY.folders[1], **checkpoint))


def test_a_port_that_is_somebody_elses_is_named_in_time(monkeypatch, capsys):
    """What listens there takes the connection, and never answers: torch alone would wait for it for ever."""
    monkeypatch.setattr(patience, "SAID_AFTER", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        variables = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        waited = rf"rank 1 of 2 waited .*127\.0\.0\.1:{port}.* in vain .*does not answer"
        with pytest.raises(TimeoutError, match=waited):
            join_store(launch_environment(), timedelta(minutes=1), patience=timedelta(seconds=0.5))
    assert capsys.readouterr().err == (
        f"rank 1 of 2: waiting for the store of rank 0 at 127.0.0.1:{port}, until 1 s have passed\n"
    )


def test_a_store_that_is_stopped_ends_the_exchange_in_time(monkeypatch):
    """Its host takes what is sent and answers nothing more."""
    monkeypatch.setattr(gather, "_MARGIN", 0.2)
    is_alive = True
    keeper = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def forward(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(4096):
            if is_alive:
                target.sendall(data)

    def serve() -> None:
        rank, _ = listener.accept()
        store = socket.create_connection(("127.0.0.1", keeper.port))
        threading.Thread(target=forward, args=(rank, store), daemon=True).start()
        forward(store, rank)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        store = dist.TCPStore("127.0.0.1", listener.getsockname()[1], wait_for_workers=False)
        is_alive = False
        waited = r"preflight: rank 1 has waited 0\.8 s in vain for rank 0, through the store"
        with pytest.raises(TimeoutError, match=waited):
            gather.gather(store, 1, 2, 0.2, dict, lambda _: {})


def test_a_healthy_world_has_no_finding():
    assert compare_reports(world(), REQUIRED, unseen={}) == []
    assert compare_reports(world(1, 1), REQUIRED) == []
    assert compare_reports(world(40, 8), REQUIRED) == []


CASES = {
    "config": (
        changed([3], config="0dd", settings={"train.steps": "10", "optimizer.lr": "0.2"}),
        "always: different run configs: rank 3 (node1) has optimizer.lr=0.2; ranks 0-2 (node0, node1) have optimizer",
    ),
    "code": (
        changed([2, 3], code="0dd", code_path="/other"),
        "stop: different versions of this package's code: ranks 2-3 (node1) have 0dd (/other); ranks 0-1 (node0) have",
    ),
    "torch": (
        changed([1], versions=HEALTHY.versions | {"torch": "2.14.0"}),
        "stop: different versions of torch: rank 1 (node0) has 2.14.0; ranks 0, 2-3 (node0, node1) have 2.15.0. ",
    ),
    "transformer-engine here and not there": (
        changed([0], versions=HEALTHY.versions | {"transformer-engine": "2.9"}),
        "stop: different versions of transformer-engine: rank 0 (node0) has 2.9; ranks 1-3 (node0, node1) have none. ",
    ),
    "driver": (
        changed([2, 3], versions=HEALTHY.versions | {"driver": "550.1"}),
        "warn: different versions of driver: ranks 2-3 (node1) have 550.1",
    ),
    "no device": (
        changed([3], device=Device(name="none", problem="its local rank is 1 and the process sees 1 GPUs")),
        "stop: no device: rank 3 (node1): its local rank is 1 and the process sees 1 GPUs. ",
    ),
    "another device": (
        changed([2], device=dataclasses.replace(GPU, name="A100", uuid="x")),
        "stop: different devices: rank 2 (node1) has A100; ranks 0-1, 3 (node0, node1) have H100. ",
    ),
    "one GPU twice": (
        changed([2, 3], device=dataclasses.replace(GPU, uuid="GPU-1-0")),
        "stop: one GPU for 2 ranks: ranks 2-3 (node1) share H100 GPU-1-0. ",
    ),
    "GPU in use": (
        changed([1], device=dataclasses.replace(GPU, uuid="u", free_bytes=50 * 10**9)),
        "warn: GPU in use: rank 1 (node0): 30.0 GB of 80.0 GB are taken already. ",
    ),
    "folder": (
        changed([2], folders=folders(problem="Permission denied", free_bytes=None)),
        "stop: cannot write: rank 2 (node1): Permission denied: checkpoint.dir (/checkpoints). ",
    ),
    "no space": (
        changed([2, 3], folders=folders(free_bytes=10**8)),
        "stop: disk space: ranks 2-3 (node1): checkpoint.dir, /checkpoints: 100.0 MB free for 1 checkpoint of",
    ),
    "not for all checkpoints": (
        changed([0, 1, 2, 3], folders=folders(free_bytes=2 * 10**9)),
        "warn: disk space: ranks 0-3 (node0, node1): checkpoint.dir, /checkpoints: 2.0 GB free for 3 checkpoints of",
    ),
    "shared memory": (
        changed([0, 1], shared_memory_bytes=10**7),
        "stop: shared memory: node0: /dev/shm has 10.0 MB free; its 2 ranks take up to 20.0 MB. ",
    ),
    "no shared memory": (
        changed([0, 1], shared_memory_bytes=None),
        "stop: shared memory: node0: /dev/shm has 0 B free",
    ),
    "loopback": (
        changed([2, 3], address="127.0.1.1", variables={"NCCL_DEBUG": "WARN"}),
        "stop: address: node1: its name resolves to 127.0.1.1 there, so other hosts cannot reach its ranks over gloo. ",
    ),
    "no address": (
        changed([2, 3], address=None, variables={"NCCL_DEBUG": "WARN"}),
        "stop: address: node1: its name does not resolve there",
    ),
    "open files": (changed([2, 3], open_files=256), "warn: open files: node1: a process may have 256 open at once"),
    "hardware queues": (
        changed(
            [0, 1, 2, 3],
            device=dataclasses.replace(GPU, generation=9),
            variables=HEALTHY.variables | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"},
        ),
        "warn: hardware queues: ranks 0-3 (node0, node1): CUDA_DEVICE_MAX_CONNECTIONS is 8, and with tensor or",
    ),
    "variable": (
        changed([3], variables=HEALTHY.variables | {"NCCL_ALGO": "Ring"}),
        "warn: different values of NCCL_ALGO: rank 3 (node1) has Ring; ranks 0-2 (node0, node1) have no value. ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_finding(case: str):
    reports, text = CASES[case]
    (finding,) = compare_reports(reports, REQUIRED)
    assert f"{finding.severity}: {finding.text}".startswith(text), finding
    assert "\n" not in finding.text and finding.text.endswith(".")


def test_a_folder_that_is_not_shared():
    (finding,) = compare_reports(world(), REQUIRED, unseen={"checkpoint.dir": [2, 3]})
    assert finding.severity == "stop"
    assert finding.text.startswith("not shared: what ranks 2-3 (node1) write to checkpoint.dir, rank 0 (node0) does ")


LEFT_ALONE = {
    "queues of Blackwell": changed([0, 1, 2, 3], device=dataclasses.replace(GPU, generation=10)),
    "one queue": changed(
        [0, 1, 2, 3],
        device=dataclasses.replace(GPU, generation=9),
        variables=HEALTHY.variables | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    ),
    "an address that others do not need": [dataclasses.replace(each, address="127.0.0.1") for each in world(1, 4)],
    "one machine under two names": changed([0, 1, 2, 3], address="127.0.0.1", machine="boot0", variables={}),
    "another interface": changed([2, 3], address=None, variables=HEALTHY.variables | {"GLOO_SOCKET_IFNAME": "eth1"}),
    "no limit of open files": changed([0], open_files=-1),
    "CPU ranks": [dataclasses.replace(each, device=Device(name="cpu")) for each in world()],
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_no_finding(case: str):
    assert compare_reports(LEFT_ALONE[case], REQUIRED) == []


def test_a_probe_is_not_written_through_a_link(tmp_path):
    """A shared folder, in which somebody has made a link of that name."""
    victim = tmp_path / "profile"
    victim.write_text("mine")
    machine.probe_path(tmp_path, 0).symlink_to(victim)
    assert machine.probe_folder("data.cache", tmp_path, 0, "token").problem == os.strerror(errno.ELOOP)
    assert victim.read_text() == "mine" and not machine.sees_probe(tmp_path, 0, "mine")
    assert machine.probe_folder("data.cache", tmp_path, 1, "token").problem is None
    assert machine.sees_probe(tmp_path, 1, "token")


def test_hosts_of_the_same_name_are_distinguished():
    reports = [dataclasses.replace(report, host="localhost") for report in world()]
    assert [len(group) for group in group_by_host(reports).values()] == [2, 2]
    assert list(group_by_host(reports)) == ["localhost", "localhost #2"]


def test_a_report_survives_its_journey_and_another_version_of_itself():
    report = world()[3]
    values = json.loads(json.dumps(dataclasses.asdict(report)))
    assert from_json(values) == report
    values["device"]["news"] = values["news"] = 1
    del values["versions"]
    assert from_json(values) == dataclasses.replace(report, versions={})
    assert from_json({"rank": 5}).rank == 5


def test_one_line_on_one_host_and_a_line_for_each_of_several():
    (line,) = describe(world(1, 8))
    assert line == "8 ranks on H100; python 3.11.7, torch 2.15.0; code c0de, config c0f1"
    lines = describe(world(2, 8))
    assert len(lines) == 3
    assert "16 ranks on 2 hosts" in lines[0] and "torch 2.15.0" in lines[0] and "transformer" not in lines[0]
    assert "node1: ranks 8-15 on H100, 80.0 GB" in lines[2]
    assert describe(world(20, 1))[-1] == "and 4 more hosts"
