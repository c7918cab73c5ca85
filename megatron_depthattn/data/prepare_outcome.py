"""What became of documents and files: counts for the manifest, a line for every source file."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_depthattn.data.documents import CorpusFile
from megatron_depthattn.data.prepare_settings import PrepareSettings
from megatron_depthattn.data.readers import Position
from megatron_depthattn.data.tokenizer import file_sha256
from megatron_depthattn.data.unfinished import Merged

SOURCES_NAME = "sources.jsonl"
SPLIT_COUNTS = (
    "documents",
    "documents_with_replaced_utf8",
    "bytes",
    "tokens",
    "samples",
    "dropped_tail_tokens",  # after the last whole sample; they are part of `tokens`
)
# Kinds of outcome and what they are counted as.
SKIPPED = {
    "binary": "binary_files_skipped",
    "archive": "archive_files_skipped",
    "dataset metadata": "dataset_metadata_files_skipped",
    "undecodable": "undecodable_files_skipped",
    "special": "special_files_skipped",
    "link out of the folder": "links_out_of_the_folder_skipped",
    "damaged": "damaged_files",
    "json as text": "json_files_read_as_text",
}
SKIPPED_COUNTS = (*SKIPPED.values(), "damaged_records", "empty_documents")


def outcome_counts(merged: Merged, splits: Sequence[str]) -> dict[str, Any]:
    """The counts of the manifest."""
    return {
        "skipped": {name: merged.skipped[name] for name in SKIPPED_COUNTS},
        "first_damaged_record": merged.first_damage or None,
        "splits": {split: {name: merged.counts[split][name] for name in SPLIT_COUNTS} for split in splits},
    }


def check_not_empty(settings: PrepareSettings, merged: Merged, splits: Sequence[str]) -> None:
    """Raise ValueError if a split has no sample."""
    counts = merged.counts
    if not any(counts[split]["documents"] for split in splits):
        reasons = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in merged.skipped.items() if n)
        raise ValueError(
            f"--input {' '.join(settings.inputs)} holds no text ({reasons or 'no files'}): give files of text, "
            "JSON lines, parquet or Arrow"
        )
    for split in splits:
        if not counts[split]["samples"]:
            advice = "give more text or set a smaller --sequence-length"
            if split == "val":
                advice += ", set a larger --validation-fraction, or 0 for no val split"
            raise ValueError(
                f"the {split} split got {counts[split]['documents']} documents and {counts[split]['tokens']} tokens, "
                f"and one sample needs {settings.sequence_length + 1}: {advice}"
            )


def write_sources(folder: Path, files: Sequence[CorpusFile], merged: Merged) -> dict[str, Any]:
    """Write a line for each file, also of those that `max_bytes` left out; returns the totals for the manifest."""
    outcomes = {outcome.file: outcome for outcome in merged.outcomes}
    totals: dict[str, Counter[str]] = {}
    path = folder / SOURCES_NAME
    with path.open("w", encoding="utf-8") as stream:
        for index, file in enumerate(files):
            outcome = outcomes.get(index)
            is_reached = Position(index) < merged.position
            entry = {
                "name": file.name,
                "bytes": file.size,
                "format": file.format.value,
                "outcome": outcome.kind if outcome else "read" if is_reached else "not reached",
            }
            if outcome and outcome.message:
                entry["message"] = outcome.message
            stream.write(json.dumps(entry) + "\n")
            totals.setdefault(file.format.value, Counter()).update(files=1, bytes=file.size)
    return {
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "formats": {name: dict(of) for name, of in sorted(totals.items())},
        "list": SOURCES_NAME,
        "list_sha256": file_sha256(path),
    }
