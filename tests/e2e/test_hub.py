"""A data set on the Hub, by a local server that speaks its protocol: pinned, continued, and one line where it fails."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_depthattn.data import readers, shard_writer
from megatron_depthattn.data.prepare import prepare_corpus
from tests.e2e.commands import python
from tests.prepared import assert_holds, folder_bytes, make_documents, make_settings, save_tokenizer

PROGRAM = Path(__file__).with_name("prepare_from_hub.py")
TEXTS = make_documents(400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    data = folder / "org" / "pile" / "data"
    data.mkdir(parents=True)
    for i in (0, 1):
        table = pyarrow.table({"text": TEXTS[200 * i : 200 * i + 200]})
        pyarrow.parquet.write_table(table, data / f"train-{i:05}-of-00002.parquet")
    (data.parent / "README.md").write_text("---\nlicense: mit\n---\n")
    save_tokenizer(folder / "tokenizer")
    return folder


def test_a_data_set_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = python(PROGRAM, folder, folder / "tokenizer", folder / "out", seconds=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    outcomes = {key: step["outcome"] for key, step in found.items()}

    monkeypatch.setattr(readers, "UNIT_BYTES", 2000)
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 20_000)
    files = sorted((folder / "org").rglob("*.parquet"))
    plain = make_settings(folder / "org" / "pile" / "data", folder / "tokenizer", folder / "plain")
    prepare_corpus(plain)
    assert_holds(folder / "plain", TEXTS, folder / "tokenizer")
    expected = {name: data for name, data in folder_bytes(folder / "plain").items() if "shard" in name}
    for name in ("whole", "stopped"):  # one whose connections were dropped, one that was stopped and continued
        assert {k: v for k, v in folder_bytes(folder / "out" / name).items() if k in expected} == expected
        manifest = json.loads((folder / "out" / name / "manifest.json").read_text())
        assert manifest["settings"]["revision"] == [f"org/pile@{'a' * 40}"]
        assert manifest["sources"]["bytes"] == sum(file.stat().st_size for file in files)

    stopped = outcomes["forbidden half-way"]
    assert re.match(
        r"OSError: hf:org/pile@a+/data/train-0000\d-of-00002.parquet cannot be read \(403 Forbidden", stopped
    )
    assert found["pinned"]["messages"][0].startswith("continuing at file ")
    assert outcomes["again"]["already"]
    assert outcomes["offline, a folder"]["manifest"]["sources"] == outcomes["online, a folder"]["manifest"]["sources"]
    assert found["online, a folder"]["requests"] == 0
    assert outcomes["a part"]["manifest"]["splits"]["train"]["samples"] == 100
    assert not any("00001-of" in line for line in found["a part"]["ranges"])  # what is not needed is not fetched
    assert found["again"]["requests"] > 0  # control
    for key, expected_line in {
        "moved on": f"work with revision ['org/pile@{'a' * 40}'], not ['org/pile@{'b' * 40}']: finish it with its own",
        "gated": "--input hf:org/gated: Dataset 'org/gated' is a gated dataset on the Hub.",
        "unknown": "--input hf:org/nothing: Dataset 'org/nothing' doesn't exist on the Hub or cannot be accessed; a",
        "no such revision": "--input hf:org/pile: Revision 'v9' doesn't exist",
        "offline": "`hf download --repo-type dataset org/pile --local-dir DIR`, then --input hf:DIR",
    }.items():
        assert expected_line in outcomes[key]
        assert outcomes[key].startswith("ValueError: ")
