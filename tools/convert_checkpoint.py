"""Convert checkpoints: a step folder to a Hugging Face folder, back, and a proof that the two hold one model."""

import argparse
import logging
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from megatron_depthattn.convert.megatron_checkpoint import MegatronCheckpoint
from megatron_depthattn.convert.to_hf import export
from megatron_depthattn.hf.weights_folder import HFFolder
from megatron_depthattn.paths import user_path
from megatron_depthattn.terminal import printable


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with its own message if it is malformed."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    step = "step folder, or a checkpoints folder: its latest step"
    to_hf = verbs.add_parser("to-hf", help="export a step folder as a Hugging Face folder")
    to_hf.add_argument("--checkpoint", type=user_path, required=True, metavar="STEP_DIR", help=step)
    to_hf.add_argument("--output", type=user_path, required=True, metavar="HF_DIR", help="folder to make")
    to_hf.add_argument("--tokenizer", type=user_path, metavar="DIR", help="default: the one of the run's data")
    from_hf = verbs.add_parser("from-hf", help="import a Hugging Face folder as a step folder to start a run from")
    from_hf.add_argument("--model", type=user_path, required=True, metavar="HF_DIR", help="folder with safetensors")
    from_hf.add_argument("--output", type=user_path, required=True, metavar="STEP_DIR", help="folder to make")
    adopt = verbs.add_parser("adopt", help="make a released checkpoint loadable: same weights, our model files")
    adopt.add_argument("--model", type=user_path, required=True, metavar="DIR", help="folder in the released layout")
    adopt.add_argument("--output", type=user_path, required=True, metavar="HF_DIR", help="folder to make")
    for verb in (to_hf, from_hf, adopt):
        verb.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    prove = verbs.add_parser("verify", help="compare weights, logits and cached decoding; exit code 1 if one differs")
    prove.add_argument("--checkpoint", type=user_path, required=True, metavar="STEP_DIR", help=step)
    prove.add_argument("--model", type=user_path, required=True, metavar="HF_DIR", help="exported or imported folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; 0, or 1 after one line (or, for `verify`, a table) that says why."""
    given = parse_arguments(arguments)
    warnings.simplefilter("ignore")  # what torch and Megatron say about themselves
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return {"to-hf": _to_hf, "from-hf": _from_hf, "adopt": _adopt, "verify": _verify}[given.verb](given)
    except (ValueError, OSError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1


def _to_hf(given: argparse.Namespace) -> int:
    checkpoint = MegatronCheckpoint(given.checkpoint)
    notes = export(checkpoint, given.output, tokenizer=given.tokenizer, overwrite=given.overwrite)
    return _wrote(given.output, notes)


# Megatron takes seconds and half a gigabyte to import, and exporting needs none of it.
def _from_hf(given: argparse.Namespace) -> int:
    from megatron_depthattn.convert.from_hf import MODEL_YAML, import_checkpoint

    notes = import_checkpoint(HFFolder(given.model), given.output, overwrite=given.overwrite)
    start = f"start a run from it: CONFIG.yaml {given.output / MODEL_YAML} checkpoint.load={given.output}"
    return _wrote(given.output, [*notes, start])


def _adopt(given: argparse.Namespace) -> int:
    from megatron_depthattn.convert.adopt import adopt

    return _wrote(given.output, adopt(HFFolder(given.model), given.output, overwrite=given.overwrite))


def _wrote(output: Path, notes: list[str]) -> int:
    print(f"wrote {output}")
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    return 0


def _verify(given: argparse.Namespace) -> int:
    from megatron_depthattn.convert.verify import verify

    checks = verify(MegatronCheckpoint(given.checkpoint), given.model)
    table = Table("check", "result", "bound", "")
    for check in checks:
        table.add_row(check.name, Text(printable(check.result)), check.bound, "ok" if check.passed else "FAILED")
    Console(width=120).print(table)
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
