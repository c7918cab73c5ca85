"""What the bytes of a text are: UTF-8, another Unicode encoding that a byte-order mark names, or no text at all.

Standard library only: every encoding process imports this file.
"""

import codecs
from collections.abc import Iterator

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MARK_BYTES = 4  # that the longest mark takes
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\v\f\r"})
_HIGH = bytes(range(128, 256))
_JUDGED_ASCII = 32  # fewer ASCII characters than this may well stand without a space


def byte_order_mark(head: bytes) -> tuple[int, str]:
    """(bytes of the mark that a file begins with, its encoding); `head` are its first `MARK_BYTES` bytes or more."""
    return next(((len(mark), encoding) for mark, encoding in _MARKS if head.startswith(mark)), (0, "utf-8"))


def to_utf8(data: bytes) -> bytes:
    """A whole file without its byte-order mark, in UTF-8 if the mark says UTF-16 or UTF-32.

    Raises:
        UnicodeDecodeError: it is not in the encoding that its mark names, UTF-16 or UTF-32.
    """
    return b"".join(data for data, _ in utf8_blocks(iter([(data, 0)])))


def utf8_blocks(blocks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same for a file in blocks, each with a number that is handed on. The first holds the whole mark."""
    decoder: codecs.IncrementalDecoder | None = None
    for number, (data, tag) in enumerate(blocks):
        block = data
        if number == 0:
            size, encoding = byte_order_mark(data)
            block = data[size:]
            decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
        yield (block if decoder is None else decoder.decode(block).encode()), tag
    if decoder is not None:
        decoder.decode(b"", final=True)


class TextCheck:
    """Learns from the blocks of a text whether it is UTF-8, and whether it is text.

    Attributes:
        is_utf8: no byte had to be replaced; final once `finish` was called.
    """

    def __init__(self) -> None:
        self.is_utf8 = True
        self._strict = codecs.getincrementaldecoder("utf-8")()
        self._lenient = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = self._odd = self._ascii = self._spaces = 0

    def add(self, block: bytes) -> None:
        self._odd += len(block) - len(block.translate(None, _CONTROLS))
        self._ascii += len(block.translate(None, _HIGH))
        self._spaces += block.count(b" ") + block.count(b"\n")
        self._decode(block)

    def finish(self, *, is_whole: bool = True) -> bool:
        """Whether it is text in UTF-8, or in ASCII with other bytes here and there that are replaced, such as Latin-1.

        It is not if over a quarter of its characters are invalid UTF-8 or control characters (other code pages, most
        compressed data), or if it is invalid UTF-8 with hardly a space or line end among its ASCII characters: UTF-16
        of Japanese without a mark looks like that. As text these would be no language.

        Args:
            is_whole: False if more blocks would follow, so that half a character at the end is none of its faults.
        """
        self._decode(b"", final=is_whole)
        has_spaces = self._ascii < _JUDGED_ASCII or self._spaces * 100 >= self._ascii
        return self._odd * 4 <= self._characters and (self.is_utf8 or has_spaces)

    def _decode(self, block: bytes, *, final: bool = False) -> None:
        if self.is_utf8:
            try:
                self._strict.decode(block, final)
            except UnicodeDecodeError:
                self.is_utf8 = False
        text = self._lenient.decode(block, final)
        self._characters += len(text)
        self._odd += text.count("\ufffd")


def check_text(data: bytes) -> TextCheck:
    check = TextCheck()
    check.add(data)
    return check
