"""What a preparation was asked for: checked, recorded, and compared with what is there already."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_depthattn.data.documents import BUILTIN_STDLIB, CorpusFile
from megatron_depthattn.data.stream import MANIFEST_NAME

FORMAT_VERSION = 3


@dataclass(kw_only=True, frozen=True)
class PrepareSettings:
    """What `depthattn prepare` was asked for."""

    inputs: tuple[str, ...]
    """Files, folders, or `builtin:python-stdlib`."""
    tokenizer: str
    """A Hugging Face tokenizer folder, a tokenizer.json, or `train-bpe:VOCAB`."""
    sequence_length: int
    """Tokens a model sees at a time; a sample stores one more."""
    output: Path
    """The folder to write."""
    validation_fraction: float = 0.01
    """Share of the documents that goes to val; 0 writes no val split."""
    text_field: str = "text"
    """Field of a JSON line, column of a parquet or Arrow file."""
    on_corrupt: str = "error"
    """error, or skip: keep what comes before the damage and count it."""
    workers: int | None = None
    """Encoding processes; None: the cores that this process may use. The output does not depend on it."""
    max_bytes: int | None = None
    """Stop after this many bytes of documents; the last one is cut."""
    overwrite: bool = False
    """Prepare again even if `output` holds a corpus, or unfinished work with other settings."""


def check_settings(settings: PrepareSettings) -> None:
    fraction, max_bytes, workers = settings.validation_fraction, settings.max_bytes, settings.workers
    for is_valid, given, advice in (
        (settings.inputs, "input is missing", f"name files, folders, or {BUILTIN_STDLIB}"),
        (settings.sequence_length >= 1, f"sequence-length {settings.sequence_length}", "set at least 1"),
        (0 <= fraction < 1, f"validation-fraction {fraction}", "set a number in [0, 1)"),
        (max_bytes is None or max_bytes >= 1, f"max-bytes {max_bytes}", "set at least 1, or leave it out"),
        (workers is None or workers >= 1, f"workers {workers}", "set at least 1, or leave it out"),
        (settings.on_corrupt in ("error", "skip"), f"on-corrupt {settings.on_corrupt}", "set error or skip"),
    ):
        if not is_valid:
            raise ValueError(f"--{given}: {advice}")
    output = settings.output.resolve()
    for given in settings.inputs:
        if Path(given).is_dir() and output.is_relative_to(Path(given).resolve()):
            raise ValueError(f"--output {settings.output} lies inside --input {given}: choose a folder outside of it")


def settings_record(settings: PrepareSettings, files: Sequence[CorpusFile], tokenizer_sha256: str) -> dict[str, Any]:
    """What decides the result, as stored in the manifest.

    `tokenizer_sha256` is that of the loaded tokenizer, or "" for one that is to be trained. A list of files that
    decide it would be that of some kinds of tokenizer only.

    The corpus counts by file names and sizes: reading every byte to find that nothing changed would cost as
    much as preparing. An edit that keeps a file's size needs --overwrite.
    """
    names_and_sizes = repr([(file.name, file.size) for file in files])
    tokenizer = settings.tokenizer + (f" (sha256 {tokenizer_sha256})" if tokenizer_sha256 else "")
    return {
        "format_version": FORMAT_VERSION,
        "input": list(settings.inputs),
        "corpus_files_sha256": hashlib.sha256(names_and_sizes.encode()).hexdigest(),
        "tokenizer": tokenizer,
        **{
            key: getattr(settings, key) for key in ("sequence_length", "validation_fraction", "text_field", "max_bytes")
        },
    }


def existing_manifest(settings: PrepareSettings, record: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a corpus already prepared with these settings; None if the output is to be written."""
    output = settings.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    file = output / MANIFEST_NAME
    if not file.is_file():
        # Never removed, --overwrite or not: it is not ours.
        raise ValueError(f"--output {output} exists and is not a prepared corpus: choose another folder")
    if settings.overwrite:
        return None
    manifest: dict[str, Any] = json.loads(file.read_text())
    stored = manifest.get("settings", {})
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"--output {output} was prepared by another version of this tool (format_version "
            f"{stored.get('format_version')}, here {FORMAT_VERSION}), which read some files in another way: use it as "
            "it is, choose another folder, or pass --overwrite to prepare it again"
        )
    changed = changed_settings(stored, record)
    if changed:
        raise ValueError(f"--output {output} was prepared with {changed}: choose another folder or pass --overwrite")
    return manifest


def changed_settings(stored: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings that differ, as words; empty if none does."""
    return "; ".join(f"{key} {stored.get(key)!r}, not {new[key]!r}" for key in new if stored.get(key) != new[key])


def check_skipped_damage(settings: PrepareSettings, skipped: Mapping[str, int], where: str) -> None:
    if settings.on_corrupt == "error" and (skipped["damaged_files"] or skipped["damaged_records"]):
        raise ValueError(
            f"{where} leaves out {skipped['damaged_files']} damaged files and {skipped['damaged_records']} damaged "
            "records: pass --on-corrupt skip to accept that, or repair them and pass --overwrite"
        )
