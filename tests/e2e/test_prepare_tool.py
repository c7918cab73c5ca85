"""The command line of corpus preparation: what it prints, its exit codes, interruptions."""

import gzip
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_depthattn.cli import prepare
from megatron_depthattn.data.prepare import PrepareProgress
from tests.prepared import make_documents, stored_stream

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i, text in enumerate(make_documents(60)):
        (folder / f"{i:03}.txt").write_text(text)
    for name, data in (("binary", b"a\0"), ("late.bin", b"a" * 70_000 + b"\0"), ("e", b""), ("f", b" "), ("g", b"\n")):
        (folder / name).write_bytes(data)
    return folder


def command(source: Path, output: Path) -> list[str]:
    given = {"--input": source, "--tokenizer": "train-bpe:300", "--sequence-length": 16, "--output": output}
    return [str(part) for pair in given.items() for part in pair] + ["--validation-fraction", "0.25"]


def test_tool_prints_counts_and_repeats(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(command(source, tmp_path / "out")) == 0
    first = capsys.readouterr()
    assert "2 binary files, 3 empty documents" in first.out
    assert "tokens/s" in first.out
    assert "tokenising" in first.err
    assert prepare.main(command(source, tmp_path / "out")) == 0
    assert capsys.readouterr().out.startswith("already prepared")
    for asked in (10**6, 1600):  # more than there is, which the last line says, and less
        assert prepare.main([*command(source, tmp_path / "out"), "--max-tokens", str(asked), "--overwrite"]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        found = re.fullmatch(r"  train has ([\d,]+) tokens to predict, --max-tokens asks for 1,000,000", last)
        assert (found is None) == (asked == 1600)
        if found:
            assert len(stored_stream(tmp_path / "out" / "train")) - 1 == int(found[1].replace(",", "")) // 16 * 16


def test_tool_fails_with_one_line(source: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path / "missing", tmp_path / "out")
    program = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --input {tmp_path / 'missing'} does not exist")


def test_names_and_code_from_elsewhere_end_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file's name does not steer the terminal; a tokenizer's code is neither run nor asked about."""
    name = tmp_path / "in\x1b[2J\u202e\n👩\u200d🚀.jsonl"
    name.write_text("{")
    assert prepare.main(command(name, tmp_path / "out")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/in\\x1b[2J\\u202e 👩\u200d🚀.jsonl, line 1 is not a JSON object")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}')
    (tmp_path / "tok" / "mine.py").write_text("raise SystemExit")
    assert prepare.main([*command(source, tmp_path / "out"), "--tokenizer", str(tmp_path / "tok")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: tokenizer {tmp_path / 'tok'} does not load: tokenizer_config.json names code of")


def test_damage_late_in_the_corpus_says_that_the_work_is_kept(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-9])
    damaged = [*command(source, tmp_path / "out"), "--input", str(source), str(tmp_path / "z.jsonl.gz")]
    # its tokenizer is given: training would read the damaged file first, before there is work to keep
    assert prepare.main(command(source, tmp_path / "first")) == 0
    damaged += ["--tokenizer", str(tmp_path / "first" / "tokenizer")]
    assert prepare.main(damaged) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'z.jsonl.gz'}: the gzip data is truncated")
    assert error.endswith(f"kept in {tmp_path / '.out.unfinished'}; the same command continues it)")
    assert prepare.main([*damaged, "--on-corrupt", "skip"]) == 0
    second = capsys.readouterr()
    assert "continuing at file 66 of 66 (z.jsonl.gz), after" in second.err
    assert "1 damaged files" in second.out


def test_a_scheduler_s_stop_keeps_the_work(source: Path, tmp_path: Path) -> None:
    assert prepare.main(command(source, tmp_path / "first")) == 0
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n".join(make_documents(4000) * 10))
    arguments = [*command(tmp_path / "in", tmp_path / "out"), "--tokenizer", str(tmp_path / "first" / "tokenizer")]
    program = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *arguments, "--workers", "1"]
    program += ["--validation-fraction", "0"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("tokenising: 2.")  # MB of 10
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
    assert process.returncode == 130
    unfinished = tmp_path / ".out.unfinished"
    assert log == f"error: interrupted (the work so far is kept in {unfinished}; the same command continues it)\n"
    assert (unfinished / "progress.npz").is_file()
    assert not (tmp_path / "out").exists()

    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("continuing at file 1 of 1 (a.txt), after ")
        children: list[psutil.Process] = []
        while len(children) < 2 and process.poll() is None:  # one that encodes, and multiprocessing's tracker
            children = psutil.Process(process.pid).children()
        process.kill()
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive  # encoding processes end with their parent: nobody else would end them


def test_progress_counts_from_where_this_process_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """600 of 1,000 MB were there; 100 MB and 30 M tokens in 50 s leave 300 MB, 150 s."""
    now = 1000.0
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=lambda: now))
    report = prepare.ProgressReport()
    values = {"phase": "tokenising", "total_bytes": 10**9}
    message = "continuing at file 7 (a\x1b[2J\nb [/i])"
    report(PrepareProgress(**values, done_bytes=6 * 10**8, tokens=10**8, message=message))
    now += 50
    report(PrepareProgress(**values, done_bytes=7 * 10**8, tokens=13 * 10**7))
    now += 1
    report(PrepareProgress(**values, done_bytes=8 * 10**8, tokens=14 * 10**7))  # too soon for another line
    assert capsys.readouterr().err.splitlines() == [
        "continuing at file 7 (a\\x1b[2J b [/i])",
        "tokenising: 600.0 of 1,000.0 MB, 100,000,000 tokens",
        "tokenising: 700.0 of 1,000.0 MB, 130,000,000 tokens, 600,000 tokens/s, 0:02:30 left",
    ]


def test_options_know_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the `~` of `--output=~/x` as it is, and a folder of that name would be made."""
    monkeypatch.setenv("HOME", "/home/someone")
    given = prepare.parse_arguments(
        ["--input", "a", "~/b", "--tokenizer=~/t", "--output=~/o", "--sequence-length", "8"]
    )
    assert (list(given.inputs), given.tokenizer) == (["a", "/home/someone/b"], "/home/someone/t")
    assert given.output == Path("/home/someone/o")
