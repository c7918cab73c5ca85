"""A short campaign: two pipeline stages, struck once, bit-equal to an undisturbed run.

`make faults` strikes two replicas of them with every kind, at least 40 times.
"""

import random
import shutil
from pathlib import Path

import pytest

from tests.faults import campaign as module
from tests.faults.campaign import FULL, Campaign, compare
from tests.faults.job import RunState
from tests.faults.kinds import ENDS_THE_JOB, JOB_GOES_ON

SHORT = ["kill -9 of one rank during a save"]


def test_every_kind_of_fault_is_in_the_full_campaign():
    assert FULL.keys() == ENDS_THE_JOB.keys() | JOB_GOES_ON.keys()
    assert sum(FULL.values()) >= 40


@pytest.mark.timeout(600)
def test_a_struck_run_is_bit_equal_to_an_undisturbed_one(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "NUM_PROCESSES", 2)
    shutil.copytree(corpus, tmp_path / "corpus")
    campaign = Campaign(tmp_path, steps=40, rng=random.Random(0))
    left = campaign.struck_run(SHORT, asynchronous=True)
    assert left == [], "the run ended before it could be struck"
    assert [blow.kind for blow in campaign.blows] == SHORT

    # Control: a digit of one loss is another one, and the comparison must see it.
    undisturbed = campaign.undisturbed()
    copy = shutil.copytree(undisturbed.run_dir, tmp_path / "copy")
    text = (copy / "metrics.jsonl").read_text()
    digit = text.index('"loss": ', len(text) // 2) + len('"loss": ') + 12
    (copy / "metrics.jsonl").write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    with pytest.raises(AssertionError, match=r"the steps \[\d+\] differ"):
        compare(RunState(copy, copy / "checkpoints"), undisturbed)
