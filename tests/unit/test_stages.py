"""Proportions by stage of training, as settings: where each stage begins, what a resumed run and a branch keep."""

import pytest

from megatron_depthattn.config import from_dict, load_config, to_dict, validate
from megatron_depthattn.config.stages import Stage, after_steps, stages_of
from megatron_depthattn.train.parent import stages_passed_over

STREAMS = [{"path": "a", "proportion": 0.7}, {"path": "b", "proportion": 0.3}, {"path": "c", "proportion": 0}]
OWN, SECOND, THIRD = [0.7, 0.3, 0.0], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]


def config(*stages, data=(), **train):
    listed = [{"from_step": step, "proportions": shares} for step, shares in stages]
    settings = {"streams": STREAMS, "stages": listed or None, **dict(data)}
    return from_dict({"run": {"dir": "x"}, "data": settings, "train": {"global_batch_size": 16, **train}}, "a test")


def stages(given, **where):
    return stages_of(given.data, given.train, **where)


def test_a_stage_begins_with_the_first_sample_of_its_step():
    given = config((1, SECOND), (11, THIRD))
    validate(given, 1)
    assert stages(given) == [Stage(0, 0, OWN), Stage(1, 0, SECOND), Stage(11, 160, THIRD)]
    assert stages(config()) == [Stage(0, 0, OWN)]
    assert stages(config(data={"streams": None, "path": "a"})) == [Stage(0, 0, [1.0])]
    ramp = config((11, SECOND), (60, THIRD), data={"skip_samples": 50}, batch_ramp=[8, 8, 100])
    consumed = [0]
    for _ in range(60):
        consumed.append(consumed[-1] + (8 if consumed[-1] < 100 else 16))
    begins = [Stage(11, 50 + consumed[10], SECOND), Stage(60, 50 + consumed[59], THIRD)]
    for step in (0, 5, 10, 11, 30, 59):  # from the beginning, and resumed anywhere
        known = [Stage(0, 0, OWN), *(stage for stage in begins if stage.from_step <= step)]
        where = {"step": step, "consumed_samples": consumed[step], "known": [list(stage) for stage in known]}
        assert stages(ramp, **where) == [Stage(0, 0, OWN), *begins]


def test_what_has_been_read_stays_and_what_comes_may_change():
    """Resumed after 20 steps of 16 samples and 10 of 8; the second stage has begun with step 11."""
    known = [[0, 0, OWN], [11, 160, SECOND]]
    where = {"step": 30, "consumed_samples": 400, "known": known}
    begun = [Stage(*stage) for stage in known]
    assert stages(config((11, SECOND)), **where) == begun
    assert stages(config((11, SECOND), (31, THIRD)), **where) == [*begun, Stage(31, 400, THIRD)]
    assert stages(config((11, SECOND), (41, THIRD)), **where) == [*begun, Stage(41, 560, THIRD)]
    for wrong in ([], [(12, SECOND)], [(11, THIRD)], [(11, SECOND), (30, THIRD)], [(5, THIRD), (11, SECOND)]):
        with pytest.raises(ValueError, match=r"for the 30 steps that this run has taken, which were read with \[0\.5"):
            stages(config(*wrong), **where)
    older = where | {"known": None}  # a checkpoint of before there were stages
    assert stages(config(), **older) == [Stage(0, 0, OWN)]
    assert stages(config((31, THIRD)), **older) == [Stage(0, 0, OWN), Stage(31, 400, THIRD)]
    with pytest.raises(ValueError, match=r"read with the streams' own proportions: what has been read stays; set"):
        stages(config((11, SECOND)), **older)


def test_a_branch_passes_over_what_its_parent_has_read():
    def passed(branch, parent, **common):
        return stages_passed_over({"config": to_dict(parent), "corpus": "x", **common}, to_dict(branch))

    trunk = config((11, SECOND), (21, THIRD))
    known = {"stages": [[0, 0, OWN], [11, 160, SECOND]]}
    branch = config((1, THIRD), data={"skip_samples": 200})
    read = [[0, 0, OWN], [0, 160, SECOND], [0, 200, OWN]]
    assert passed(branch, trunk, **known) == read
    expected = [*(Stage(*stage) for stage in read), Stage(1, 200, THIRD)]
    assert stages(branch, known=read) == expected
    assert stages(branch, step=1, consumed_samples=16, known=[list(stage) for stage in expected]) == expected
    same = [each | {"proportion": share} for each, share in zip(STREAMS, SECOND, strict=True)]
    continued = config(data={"skip_samples": 200, "streams": same})  # in the proportions that the trunk ended in
    assert passed(continued, trunk, **known) == [[0, 0, OWN], [0, 160, SECOND]]
    assert passed(continued, config()) == [[0, 0, OWN], [0, 200, SECOND]]  # of a trunk of before there were stages
    assert passed(config(data={"skip_samples": 100}), trunk, **known) == [[0, 0, OWN]]
    assert passed(config(), trunk, **known) is None
    two = config(data={"skip_samples": 9, "streams": STREAMS[:2]})
    assert passed(two, trunk, **known) is passed(branch, trunk, **known, corpus=None) is None


def test_stages_of_a_run_that_continues_another_one():
    listed = config((11, SECOND), (21, THIRD)).data.stages

    def moved(steps, last):
        return [(stage.from_step, stage.proportions) for stage in after_steps(listed, steps, last) or []]

    assert moved(0, 30) == [(11, SECOND), (21, THIRD)] and moved(0, 20) == [(11, SECOND)] and moved(0, 10) == []
    assert moved(5, 30) == [(6, SECOND), (16, THIRD)] and moved(15, 5) == [(1, SECOND)]
    assert moved(10, 30) == [(1, SECOND), (11, THIRD)] and moved(25, 30) == [(1, THIRD)]
    assert after_steps(None, 5, 10) is after_steps(listed, 0, 5) is None


STREAM_LIST = "data.streams=[{path: a, proportion: 0.7}, {path: b, proportion: 0.3}]"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("[]", "data.stages is an empty list; give at least one entry of from_step and proportions, or set "
         "data.stages=null"),
        ("[{from_step: 0, proportions: [1, 0]}]", "data.stages[0].from_step is 0: steps count from 1, and until the "
         "first stage the streams' own proportions hold; set 1 to train.steps=200"),
        ("[{from_step: 9, proportions: [1, 0]}, {from_step: 201, proportions: [1, 0]}]", "data.stages[1].from_step is "
         "201: steps count from 1, and until the first stage the streams' own proportions hold; set 1 to "
         "train.steps=200"),
        ("[{from_step: 9, proportions: [1, 0]}, {from_step: 9, proportions: [0, 1]}]", "data.stages[1].from_step is 9, "
         "after a stage from step 9; set a later step"),
        ("[{from_step: 9, proportions: [1, 0, 1]}]", "data.stages[0].proportions has 3 numbers for 2 streams; set one "
         "for each of data.streams, in their order, 0 where a stream rests"),
        ("[{from_step: 9, proportions: [0, 0]}]", "data.stages[0].proportions is [0.0, 0.0]; set numbers of 0 or more, "
         "one of them above 0"),
        ("[{from_step: 9, proportions: [1, -1]}]", "data.stages[0].proportions is [1.0, -1.0]; set numbers of 0 or "
         "more, one of them above 0"),
        ("[{from_step: 9, proportions: [1, .inf]}]", "data.stages[0].proportions is [1.0, inf]; set numbers of 0 or "
         "more, one of them above 0"),
        ("[{from_step: 9, proportions: [1, 1e-4]}]", "data.stages[0].proportions is [1.0, 0.0001], of which 0.0001 "
         "rounds to none of 1000 samples; set at least 1/1000 of the sum, or 0"),
        ("[{from_step: 9}]", "data.stages[0].proportions is missing (in the command line); set it"),
        ("[{from_step: 9, proportion: [1, 0]}]", "unknown key 'data.stages.proportion' in the command line; the "
         "nearest valid key is 'data.stages.proportions'"),
    ],
)  # fmt: skip
def test_wrong_stages_are_errors(tmp_path, listed, message):
    base = tmp_path / "base.yaml"
    base.write_text("run: {dir: out}\n")
    validate(load_config(base, [STREAM_LIST, "data.stages=[{from_step: 9, proportions: [1, 3]}]"]), 1)
    with pytest.raises(ValueError) as raised:
        validate(load_config(base, [STREAM_LIST, f"data.stages={listed}"]), 1)
    assert str(raised.value) == message


def test_stages_and_resting_streams_need_each_other():
    for data, message in (
        ({"streams": None, "path": "a"}, r"data\.stages with data\.streams=null: .* set data\.streams, or data\.stage"),
        ({"streams": [{"path": "a", "proportion": 0.0}] * 2}, r"data\.streams\[0\]\.proportion is 0\.0; set a number"),
        ({"streams": [{"path": "a", "proportion": -1.0}] * 2}, r"data\.streams\[0\]\.proportion is -1\.0; set a num"),
        ({"stages": None}, r"data\.streams\[2\]\.proportion is 0\.0; set a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(config((9, [1, 1]), data=data), 1)
