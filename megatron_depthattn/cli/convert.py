"""Convert checkpoints: a step folder to a Hugging Face folder, back, a proof that the two hold one model; average them.

An average is of the optimizer's fp32 weights where the checkpoints have them, and is taken in fp64.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_depthattn.cli.common import check, new_parser, print_table, run
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable
from megatron_depthattn.train.step_folders import checkpoints_of, complete_folders


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0, or 1 after one line (or, for `verify`, a table) that says why."""
    parser = new_parser("convert", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    step = "step folder; or a run's folder, or its checkpoints: the latest step"
    to_hf = verbs.add_parser("to-hf", help="export a step folder as a Hugging Face folder")
    to_hf.add_argument("--checkpoint", type=user_path, required=True, metavar="STEP_DIR", help=step)
    to_hf.add_argument("--tokenizer", type=user_path, metavar="DIR", help="default: the one of the run's data")
    from_hf = verbs.add_parser("from-hf", help="import a Hugging Face folder as a step folder to start a run from")
    from_hf.add_argument("--model", type=user_path, required=True, metavar="HF_DIR", help="folder with safetensors")
    repackage = verbs.add_parser("repackage", help="repackage a released checkpoint: same weights, our model files")
    repackage.add_argument("--model", type=user_path, required=True, metavar="DIR", help="folder as it was released")
    averaged = verbs.add_parser("average", help="average checkpoints into a step folder to export or to start from")
    several = "step folders; or one run's folder, or its checkpoints: all that are there"
    averaged.add_argument("--checkpoints", type=user_path, nargs="+", required=True, metavar="DIR", help=several)
    averaged.add_argument("--last", type=int, metavar="N", help="only the newest N of a run's")
    exponential = "exponential average, of which D stays with each further checkpoint (default: all weigh the same)"
    averaged.add_argument("--decay", type=float, metavar="D", help=exponential)
    for verb, made in ((to_hf, "HF_DIR"), (from_hf, "STEP_DIR"), (repackage, "HF_DIR"), (averaged, "STEP_DIR")):
        verb.add_argument("--output", type=user_path, required=True, metavar=made, help="folder to make")
        verb.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    prove = verbs.add_parser("verify", help="compare weights, logits and cached decoding; exit code 1 if one differs")
    prove.add_argument("--checkpoint", type=user_path, required=True, metavar="STEP_DIR", help=step)
    prove.add_argument("--model", type=user_path, required=True, metavar="HF_DIR", help="exported or imported folder")
    given = parser.parse_args(arguments)
    verbs_by_name = {"to-hf": _to_hf, "from-hf": _from_hf, "repackage": _repackage, "average": _average}
    return run((verbs_by_name | {"verify": _verify})[given.verb], given)


# Megatron takes seconds and half a gigabyte to import, and exporting needs none of it.
def _to_hf(given: argparse.Namespace) -> None:
    from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint, find_step_folder
    from megatron_depthattn.convert.to_hf import export
    from megatron_depthattn.train.lease import lease

    folder = find_step_folder(given.checkpoint)
    with lease(folder):
        checkpoint = MegatronCheckpoint(folder)
        notes = export(checkpoint, given.output, tokenizer=given.tokenizer, overwrite=given.overwrite)
    _wrote(given.output, notes)
    size = sum(file.stat().st_size for file in given.output.iterdir())
    names = ", ".join(sorted(file.name for file in given.output.iterdir()))
    print(f"  {checkpoint.folder.name} of {checkpoint.folder.parent}, {size / 1e6:,.1f} MB in {names}")
    made = shlex.quote(str(given.output))
    print(f"next: depthattn generate --model {made} --prompt TEXT")
    print(f"      depthattn convert verify --checkpoint {shlex.quote(str(given.checkpoint))} --model {made}")


def _from_hf(given: argparse.Namespace) -> None:
    from megatron_depthattn.convert.from_hf import MODEL_YAML, import_checkpoint
    from megatron_depthattn.hf.weights_folder import HFFolder

    notes = import_checkpoint(HFFolder(given.model), given.output, overwrite=given.overwrite)
    start = f"start a run from it: CONFIG.yaml {given.output / MODEL_YAML} checkpoint.load={given.output}"
    _wrote(given.output, [*notes, start])


def _repackage(given: argparse.Namespace) -> None:
    from megatron_depthattn.convert.from_hf import repackage
    from megatron_depthattn.hf.weights_folder import HFFolder

    _wrote(given.output, repackage(HFFolder(given.model), given.output, overwrite=given.overwrite))


def _average(given: argparse.Namespace) -> None:
    from megatron_depthattn.convert.average import average

    folders, is_one = given.checkpoints, len(given.checkpoints) == 1
    check(
        (
            given.decay is not None and not 0 < given.decay < 1,
            f"--decay {given.decay}: set more than 0 and less than 1",
        ),
        (given.last is not None and not is_one, "--last: only with one run's folder, or its checkpoints"),
        (given.last is not None and given.last < 2, f"--last {given.last}: set 2 or more"),
    )
    if is_one:
        directory = checkpoints_of(folders[0])
        folders = complete_folders(directory)
        wanted = given.last or 2
        short = f"{directory} has {len(folders)} complete checkpoints, {wanted} are needed: set checkpoint.keep larger"
        check((len(folders) < wanted, f"{short}, or name step folders"))
        folders = folders[-given.last :] if given.last else folders
    record = average(folders, given.output, decay=given.decay, overwrite=given.overwrite)
    _wrote(given.output, [f"averaged: {record['averaged']}; {record['formula']}"])
    rows = [(str(each["step"]), f"{each['weight']:.6g}", each["folder"]) for each in record["checkpoints"]]
    print_table(("step", "weight", "checkpoint"), rows, box=None)
    print(f"next: depthattn convert to-hf --checkpoint {shlex.quote(str(given.output))} --output HF_DIR")
    print(f"      start a run from it: CONFIG.yaml run.dir=... checkpoint.load={given.output}")


def _wrote(output: Path, notes: Sequence[str]) -> None:
    print(f"wrote {output}")
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _verify(given: argparse.Namespace) -> int:
    from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
    from megatron_depthattn.convert.verify import verify

    checks = verify(MegatronCheckpoint(given.checkpoint), given.model)
    rows = [(check.name, check.result, check.bound, "ok" if check.passed else "FAILED") for check in checks]
    print_table(("check", "result", "bound", ""), rows)
    return 0 if all(check.passed for check in checks) else 1
