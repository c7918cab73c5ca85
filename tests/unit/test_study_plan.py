"""Studies: the ladder's rules, what a plan holds, what cannot be planned; nothing is trained."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from streaming import MDSWriter

from megatron_depthattn.cli.study import check_held_out, main
from megatron_depthattn.config import load_config, to_dict, validate
from megatron_depthattn.config.schedule import schedule_of
from megatron_depthattn.launch.submit import sweep
from megatron_depthattn.parallel.launch_env import job_environment
from megatron_depthattn.study import run
from megatron_depthattn.study.ladder import Ladder
from megatron_depthattn.study.plan import make_plan, read_points, with_trunks
from megatron_depthattn.study.results import collect_results
from megatron_depthattn.study.run import left_to_run, progress_of, training_command, write_array
from megatron_depthattn.study.study import Study, load_study

STUDIES = Path(__file__).parents[2] / "configs/studies"
SMALL = {
    "title": "small",
    "config": str(STUDIES.parent / "quickstart.yaml"),
    "settings": {
        **{"parallel.pipeline": 1, "data.path": "data/none"},
        **{"model.depth_attention.stride": None, "checkpoint.dir": "saved", "log.wandb.project": "ladder"},
    },
    "ladder": {"layers": [2, 4], "hidden_per_layer": 16, "head_size": 16, "ffn_multiple": 16, "reference_size": 1e5},
    "methods": {"vanilla": {}, "depth_attention": {}, "looped": {"settings": {"model.num_loops": 2}, "rungs": ["d2"]}},
    "seeds": [1, 2],
    "tokens_per_parameter": [2, 4],
}


SHORT = {"ladder": SMALL["ladder"] | {"layers": [2]}, "seeds": [1], "tokens_per_parameter": [2]}


def study_of(folder: Path, **changes) -> Study:
    """The small study with changes."""
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return load_study(file)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict]:
    """The small study's output folder and plan."""
    folder = tmp_path_factory.mktemp("plan") / "of $(touch obeyed) 'mine' #1"
    folder.mkdir()
    return folder / "out", make_plan(study_of(folder), folder, folder / "out")


def test_the_ladder_turns_width_with_depth():
    shape = Ladder(layers=[4, 8], hidden_per_layer=24, head_size=32, ffn_multiple=32).shape(8)
    assert shape == {
        "model.num_layers": 8,
        "model.hidden_size": 192,
        "model.num_attention_heads": 6,
        "model.num_query_groups": 3,
        "model.kv_channels": 32,
        "model.ffn_hidden_size": 512,  # 8/3 x 192
    }


def test_batch_and_rate_follow_their_powers():
    ladder = Ladder(layers=[4], reference_size=1e6, reference_batch=16, reference_lr=3e-3)
    assert ladder.recipe(1e6) == {"train.global_batch_size": 16, "train.micro_batch_size": 16, "optimizer.lr": 3e-3}
    larger = ladder.recipe(8e6)
    assert larger["train.global_batch_size"] == 64, "8^(2/3) = 4 times"
    assert larger["optimizer.lr"] == 1.5e-3, "8^(1/3) = 2 times less"
    assert larger["train.micro_batch_size"] == 16


def test_a_plan_has_every_point_once_with_its_whole_config(small):
    output, plan = small
    ids = [point["id"] for point in plan["points"]]
    wanted = [
        f"{rung}/{method}/x{budget}/seed{seed}"
        for rung, methods in (("d2", SMALL["methods"]), ("d4", ["vanilla", "depth_attention"]))
        for budget in (2, 4)
        for seed in (1, 2)
        for method in methods
    ]
    assert ids == wanted, "those of a pair one after the other"
    for point in read_points(output):
        config = load_config(output / point.config)
        batch, length = config.train.global_batch_size, config.data.sequence_length
        assert point.tokens == config.train.steps * batch * length
        assert point.tokens - batch * length < point.tokens_per_parameter * point.size <= point.tokens
        assert config.train.eval_batches * batch == 128, "the same held-out sequences at every size"
        assert config.checkpoint.load == "latest" and config.run.seed == point.seed


def test_a_batch_ramp_reaches_the_budget_in_more_steps(small, tmp_path):
    """Of one sequence for 100 samples, then of the rung's; the tokens are those that the steps read."""
    batch = small[1]["rungs"][0]["global_batch_size"]
    ramp = {"train.batch_ramp": [1, batch - 1, 100], "train.micro_batch_size": 1}
    study = study_of(tmp_path, **SHORT, methods={"vanilla": {"settings": ramp}})
    make_plan(study, tmp_path, tmp_path / "out")
    (point,), plain = read_points(tmp_path / "out"), read_points(small[0])[0]
    length = load_config(tmp_path / "out" / point.config).data.sequence_length
    assert point.tokens == (100 + (point.steps - 100) * batch) * length
    assert plain.steps < 100 < point.steps
    assert point.tokens - batch * length < point.tokens_per_parameter * point.size <= point.tokens
    assert point.flops / point.tokens == pytest.approx(plain.flops / plain.tokens)


def test_methods_of_a_pair_differ_in_the_method_and_their_folders_alone(small):
    output, _ = small
    one, other = (
        to_dict(load_config(output / f"configs/d4/{method}/x2/seed1.yaml")) for method in ("vanilla", "depth_attention")
    )
    assert (one["model"].pop("method"), other["model"].pop("method")) == ("vanilla", "depth_attention")
    assert one["run"].pop("dir") != other["run"].pop("dir")
    assert one["log"]["wandb"].pop("name") == "d4/vanilla/x2/seed1" != other["log"]["wandb"].pop("name")
    assert one["checkpoint"].pop("dir") == "saved/d4/vanilla/x2/seed1" != other["checkpoint"].pop("dir")
    assert one == other


def test_size_leaves_the_embedding_out_and_is_the_rungs_not_the_methods(tmp_path):
    study = study_of(tmp_path, methods={"vanilla": {}, "mhc": {}}, **SHORT)
    vanilla, mhc = make_plan(study, tmp_path, tmp_path)["points"]
    embedding = 2048 * 32  # vocabulary x hidden of d2
    assert vanilla["size"] == mhc["size"] == vanilla["parameters"] - embedding
    assert mhc["parameters"] > vanilla["parameters"]


def test_budgets_that_share_a_trunk(tmp_path, monkeypatch, capsys):
    """Branches begin where a run of wsd over their budget would begin to decay; what they cost is counted once."""
    changes = {"schedule": "wsd", "decay_ratio": 0.25, "ladder": SHORT["ladder"], "seeds": [1]}
    changes["methods"] = {"vanilla": {}, "depth_attention": {"tokens_per_parameter": [2]}}
    output = tmp_path / "out"
    plan = make_plan(study_of(tmp_path, **changes), tmp_path, output)
    assert [trunk["id"] for trunk in plan["trunks"]] == ["d2/depth_attention/trunk/seed1", "d2/vanilla/trunk/seed1"]
    short, other, long = read_points(output)
    trunk = read_points(output, "trunks")[1]
    assert (short.trunk, long.trunk, other.trunk) == (trunk.id, trunk.id, "d2/depth_attention/trunk/seed1")
    warmup = round(0.1 * (long.steps + long.trunk_steps))
    for point in (short, long, other):
        budget, config = point.steps + point.trunk_steps, load_config(output / point.config)
        batch = config.train.global_batch_size
        assert point.steps == round(0.25 * budget) and config.data.skip_samples == point.trunk_steps * batch
        assert point.tokens == budget * batch * config.data.sequence_length
        assert point.tokens_per_parameter * point.size <= point.tokens < (point.tokens_per_parameter + 0.1) * point.size
        optimizer, checkpoint = config.optimizer, config.checkpoint
        assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.decay_ratio) == ("wsd", 0, 1)
        begin = f"saved/{point.trunk}/step_{point.trunk_steps:08d}"
        assert (checkpoint.start_from, checkpoint.start_optimizer) == (begin, True)
        of_trunk = load_config(output / f"configs/{point.trunk}.yaml")
        assert point.trunk_steps in of_trunk.checkpoint.keep_steps
        assert of_trunk.optimizer.schedule == "constant" and schedule_of(of_trunk).warmup == warmup > 0
    assert trunk.steps == long.trunk_steps
    runs = with_trunks([long, short], output)
    assert runs == [trunk, long, short]
    spent = sum(run.tokens * run.own_share for run in runs)
    assert spent == pytest.approx(long.tokens + short.tokens * short.own_share)

    monkeypatch.setattr(run, "training_command", lambda config, _: ["false" if "trunk" in str(config) else "true"])
    failed, _ = run.run_points(runs, output, jobs=3)
    done = capsys.readouterr().out
    assert failed == [trunk, long, short] and done.count("starts; of step") == 1
    assert f"{short.id}: not started, because {trunk.id} failed, which it branches off" in done

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = f'#!/bin/sh\ngrep dependency "$2" >> {tmp_path}/after\necho 7; echo $2 >> {tmp_path}/sent'
    (tmp_path / "sbatch").write_text(script)
    (tmp_path / "sbatch").chmod(0o755)
    options = ("--nodes", "1", "--processes-per-node", "1")
    assert main(["run", str(tmp_path / "small.yaml"), "--output", str(output), "--slurm", *options]) == 0
    assert len((tmp_path / "sent").read_text().splitlines()) == 2
    assert (tmp_path / "after").read_text().strip() == '#SBATCH "--dependency=afterok:7"', "of the branches alone"
    first, second = (sweep(str(output / f"jobs/{number}.tasks")) for number in (1, 2))
    assert [len(first), len(second)] == [2, 3] and all("trunk" in task for (task,) in first)
    assert main(["run", str(tmp_path / "small.yaml"), "--output", str(output), "--slurm", "--dependency", "x"]) == 1
    assert "give --after JOB instead" in capsys.readouterr().err

    # A trunk that was removed after its branches: it stays paid, and is not trained again.
    write_run(output, short, steps=short.steps, outcome="finished")
    assert left_to_run(runs, output) == [trunk, long]
    write_run(output, long, steps=long.steps, outcome="finished")
    assert left_to_run(runs, output) == []
    flops = collect_results(read_points(output), output, baseline="vanilla")["flops"]
    assert flops["in_separate_runs"] == short.flops + long.flops
    assert flops["spent"] == pytest.approx(sum(run.flops * run.own_share for run in runs))
    lost = f"warning: {trunk.id} has no record of {trunk.steps} steps"
    assert lost in capsys.readouterr().out
    write_run(output, trunk, steps=trunk.steps, outcome="finished")
    assert collect_results(read_points(output), output, baseline="vanilla")["flops"] == flops
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_shipped_studies_can_be_planned(name, tmp_path):
    plan = make_plan(load_study(STUDIES / f"{name}.yaml"), STUDIES, tmp_path)
    assert {point["method"] for point in plan["points"]} >= {"vanilla", "depth_attention"}
    assert json.loads((tmp_path / "plan.json").read_text()) == plan


def test_the_papers_grid_is_planned_on_gpus_that_are_not_here(tmp_path):
    """One rung and two methods of it, by default on four nodes, here on one."""
    assert load_study(STUDIES / "paper.yaml").world.devices == 32
    study = load_study(STUDIES / "paper.yaml", ["world.devices=8", "seeds=[7]"])
    assert study.rung_names == ["360m", "500m", "710m", "1.5b", "3b"] and len(study.methods) == 5
    study.rungs = (study.rungs or [])[:1]
    study.methods = {name: study.methods[name] for name in ("vanilla", "mhc")}
    plan = make_plan(study, STUDIES, tmp_path)
    vanilla, mhc = read_points(tmp_path)
    assert plan["points"] == [asdict(vanilla), asdict(mhc)]
    assert (vanilla.id, vanilla.steps, vanilla.world) == ("360m/vanilla/x105/seed7", 15625, 8)
    assert 0 < (vanilla.predicted_step_seconds or 0) < (mhc.predicted_step_seconds or 0)
    for point in (vanilla, mhc):
        config = load_config(tmp_path / point.config)
        assert config.parallel.tensor == point.layout["parallel.tensor"]
        assert validate(config, 8).num_microbatches >= 1


ABLATIONS = {
    # stride, weights, mixes, loops
    "one-loop/vanilla": (12, "softmax", "value", 1),
    "one-loop/depth_attention": (12, "softmax", "value", 1),
    "one-loop/first_layer_only": (24, "softmax", "value", 1),
    "one-loop/stride_6": (6, "softmax", "value", 1),
    "one-loop/stride_1": (1, "softmax", "value", 1),
    "one-loop/uniform": (12, "uniform", "value", 1),
    "one-loop/keys": (12, "softmax", "key", 1),
    "one-loop/keys_and_values": (12, "softmax", "key_value", 1),
    "three-loops/vanilla": (12, "softmax", "value", 3),
    "three-loops/depth_attention": (12, "softmax", "value", 3),
}


@pytest.mark.parametrize(("name", "settings"), [("ablations", ["world.gpu=null"]), ("ablations-tiny", [])])
def test_the_ablations_are_the_papers_at_500m_and_in_small(name, settings, tmp_path):
    make_plan(load_study(STUDIES / f"{name}.yaml", settings), STUDIES, tmp_path)
    points = {f"{point.rung}/{point.method}": load_config(tmp_path / point.config) for point in read_points(tmp_path)}
    found = {
        name: (depth.stride, depth.weights, depth.mixes, config.model.num_loops)
        for name, config in points.items()
        if (depth := config.model.depth_attention)
    }
    assert found == ABLATIONS
    for name, config in points.items():
        assert config.model.effective_method == ("vanilla" if name.endswith("vanilla") else "depth_attention")
        assert (config.model.num_layers, config.model.depth_attention.loop_sources) == (24, "same_layer")
        validate(config, 32 if settings else 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": [1]}, "unknown key 'seed' in .*nearest valid key is 'seeds'"),
        ({"ladder": SMALL["ladder"] | {"layer": [2]}}, "unknown key 'ladder.layer' in .*'ladder.layers'"),
        ({"seeds": "three"}, "seeds"),
        ({"settings": [1]}, r"settings is list \[1\] .*; expected a section"),
        ({"ladder": None}, "as a ladder or as rungs"),
        ({"baseline": "plain"}, "baseline 'plain' is none of the methods"),
        ({"methods": {"vanilla": {}, "looped": {}}}, "methods.looped is no method"),
        ({"methods": {"vanilla": {"rungs": ["d9"]}}}, r"names \['d9'\]; the rungs are"),
        (
            {"methods": SMALL["methods"] | {"../../up": {"settings": {"model.num_loops": 2}}}},
            r"is named '\.\./\.\./up'",
        ),
        ({"methods": SMALL["methods"] | {"-x\n": {"settings": {"model.num_loops": 2}}}}, r"is named '-x\\n'"),
        ({"ladder": None, "rungs": [{"name": "/etc/x", "config": SMALL["config"]}]}, "is named '/etc/x'"),
        (SHORT | {"tokens_per_parameter": [2, 2.0001]}, "2 runs of the study are d2/vanilla/x2/seed1"),
        ({"seeds": [1, 1]}, "must be different, one at least"),
        ({"tokens_per_parameter": [0]}, "must be above 0"),
        ({"tokens_per_parameter": [float("inf")]}, "must be above 0"),
        ({"tokens_per_parameter_at": {"d9": [1]}}, "the rungs are"),
        ({"confidence": 90}, "between 0 and 1"),
        ({"ladder": SMALL["ladder"] | {"layers": [4, 2]}}, "ascending"),
        ({"eval_sequences": 100}, "multiple of"),
        ({"schedule": "cosine"}, "schedule is 'cosine'; set wsd, or null"),
        ({"schedule": "wsd", "decay_ratio": 1}, r"decay_ratio is 1\.0; set it between 0 and 1"),
        (
            {"schedule": "wsd", "tokens_per_parameter": [0.1, 40]},
            r"d2, vanilla: .* warm-up of the largest budget has \d+ steps, and the decay of the smallest would begin",
        ),
        ({"settings": SMALL["settings"] | {"model.layers": 3}}, "unknown key 'model.layers' in settings of the study"),
        ({"settings": SMALL["settings"] | {"parallel.tensor": 2}}, "d2/vanilla/x2/seed1: .*world"),
    ],
)
def test_what_cannot_be_planned_is_an_error_of_one_line(changes, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint) as raised:
        make_plan(study_of(tmp_path, **changes), tmp_path, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_study_reads_no_environment(tmp_path):
    study = study_of(tmp_path, title="${oc.env:HOME}", settings={"run.dir": "${oc.env:HOME}"})
    assert (study.title, study.settings) == ("${oc.env:HOME}", {"run.dir": "${oc.env:HOME}"})


def write_run(output: Path, point, *, steps: int, outcome: str | None, **changes) -> None:
    """What a run of ``steps`` steps leaves."""
    folder = output / point.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    text = (output / point.config).read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n + 1, "step_seconds": 1.0}) + "\n" for n in range(steps))
    )
    history = [
        {"event": "start", "version": "1-c0de", "time": 0},
        *([{"event": "end", "outcome": outcome}] if outcome else []),
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))


def test_a_point_is_finished_when_its_run_says_so(small):
    output, _ = small
    done, cut, killed, new, *_ = read_points(output)
    resolved = {"spec: auto": "spec: te", "op: auto": "op: triton"}  # on a machine that has them
    write_run(output, done, steps=done.steps, outcome="finished", **resolved)
    write_run(output, cut, steps=3, outcome="signal")
    write_run(output, killed, steps=killed.steps, outcome=None)
    assert progress_of(done, output) == ("finished", done.steps)
    assert progress_of(cut, output) == ("cut", 3)
    assert progress_of(killed, output).state == "cut", "its last checkpoint may not have been written"
    assert progress_of(new, output) == ("new", 0)
    assert left_to_run([done, cut, new], output) == [cut, new] and left_to_run([done], output) == []
    tasks, job = write_array([cut, new], output)
    assert sweep(str(tasks)) == [[str(output / point.config)] for point in (cut, new)]
    assert (job / "task_0").resolve() == (output / cut.run_dir).resolve()


def test_a_run_of_another_config_is_not_taken_for_the_points(small):
    output, _ = small
    point = read_points(output)[-1]
    write_run(output, point, steps=point.steps, outcome="finished", **{"num_layers: 4": "num_layers: 3"})
    with pytest.raises(ValueError, match=r"another config .*model\.num_layers is 3, not 4"):
        progress_of(point, output)


def test_several_processes_are_torchruns():
    assert "torch.distributed.run" in training_command(Path("c.yaml"), 2)
    assert "torch.distributed.run" not in training_command(Path("c.yaml"), 1)


def test_after_an_error_no_training_is_left(tmp_path, monkeypatch):
    """The second point cannot start: a file has the name of its log's folder."""
    make_plan(study_of(tmp_path, **SHORT), tmp_path, tmp_path)
    points, processes, start = read_points(tmp_path)[:2], [], run._start
    folder = tmp_path / "logs" / Path(points[1].id).parent
    folder.parent.mkdir(parents=True)
    folder.touch()
    monkeypatch.setattr(run, "training_command", lambda *_: ["sleep", "60"])
    monkeypatch.setattr(run, "_start", lambda *given: processes.append(start(*given)) or processes[-1])
    with pytest.raises(FileExistsError):
        run.run_points(points, tmp_path, jobs=2)
    assert [process.returncode for process in processes] == [-signal.SIGTERM]


def test_no_jobs_at_a_time_is_an_error(tmp_path, capsys):
    assert main(["run", "smoke", "--jobs", "0", "--output", str(tmp_path / "out")]) == 1
    assert "error: --jobs is 0: set 1 or more\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_study_of_several_nodes_is_not_started_here(tmp_path, capsys):
    assert main(["run", "paper", "--output", str(tmp_path), "--set", "world.devices=16"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "needs 16 devices, 8 a node: give --slurm --nodes 2 --gpus-per-node 8" in line
    assert not list(tmp_path.iterdir())


def test_a_held_out_text_that_is_too_short_is_an_error(tmp_path):
    """As many sequences as are asked for are enough, one less is not."""
    study = study_of(tmp_path)
    for count in (study.eval_sequences, study.eval_sequences - 1):
        index = tmp_path / str(count) / "index.json"
        with MDSWriter(columns={"tokens": "ndarray:uint16:3"}, out=str(index.parent), size_limit=500) as writer:
            for _ in range(count):
                writer.write({"tokens": np.zeros(3, np.uint16)})
        if count == study.eval_sequences:
            check_held_out(study, index)
    with pytest.raises(ValueError, match=f"holds {study.eval_sequences - 1} sequences and eval_sequences is"):
        check_held_out(study, index)


def test_jobs_share_the_cores(monkeypatch):
    """Two processes with a thread for every core each take seven times as long as with their share."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [job_environment(jobs).get("OMP_NUM_THREADS") for jobs in (1, 2, 3, 9)] == [None, "4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert job_environment(2)["OMP_NUM_THREADS"] == "3"
