"""Text of strangers on its way to terminals and logs: names of files, tensors and models come from anybody."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """`text` on one line; control characters and escape sequences are shown instead of obeyed."""
    safe = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in safe)


def printable_lines(text: str) -> str:
    """The same for text of several lines."""
    return "\n".join(map(printable, text.expandtabs().split("\n")))


class PrintableFormatter(logging.Formatter):
    """Log lines, and tracebacks, that a terminal shows as they are."""

    def format(self, record: logging.LogRecord) -> str:
        """The line as text."""
        return printable_lines(super().format(record))
