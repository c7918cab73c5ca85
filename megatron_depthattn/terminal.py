"""What may be shown on a terminal of text that others wrote: file names, logs, generated text."""

from __future__ import annotations

import re

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and newline, marks that change the direction of writing, lone surrogates."""


def printable(text: str) -> str:
    r"""The text with what a terminal would obey written out, such as ``\x1b``; tabs and newlines stay."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
