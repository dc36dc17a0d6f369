"""The exceptions that users see, each with the exit code of the command line.

Codes: 1 the merge failed, 2 the spec, an input or an argument is wrong, 3 interrupted and resumable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergecore.spec.problems import Problem


class MergecoreError(Exception):
    """Base of all errors whose message is meant for users: what is wrong, where, and what to do."""

    exit_code = 1


class SpecError(MergecoreError):
    """The spec cannot be understood or asks for something impossible; `problem` is the first one, if it has a place."""

    exit_code = 2

    def __init__(self, message: str, problem: Problem | None = None) -> None:
        super().__init__(message)
        self.problem = problem


class CheckpointError(MergecoreError):
    """An input model is missing, malformed, or does not fit the others."""

    exit_code = 2


class OutputExistsError(MergecoreError):
    """The output path is taken; nothing was touched."""

    exit_code = 2


class OutputError(MergecoreError):
    """The output cannot be written: disk full, no permission, an I/O error."""


class InputFault(MergecoreError):
    """An input could not be read to its end: truncated while in use, or an I/O error."""


class NonFiniteError(MergecoreError):
    """An input holds NaN or Inf, or the result overflows the output dtype."""


class Interrupted(MergecoreError):
    """The merge was asked to stop; the finished tensors are kept and `--resume` continues."""

    exit_code = 3
