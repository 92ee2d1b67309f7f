"""Errors of loram-hub: one class per exit code, each also the builtin a caller would expect.

A message starts with the thing that is wrong, gives what was asked and what was found, and ends with what to do.
"""

from __future__ import annotations


class LoramError(Exception):
    """Base of every error that loram-hub raises on purpose; `exit_code` is what the `loram` command returns."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message as one printable line: names in it may come from untrusted files and hold anything."""
        text = super().__str__().replace("\n", " ")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class InvalidRequestError(LoramError, ValueError):
    """An argument is outside its domain: a ratio of 1.2, a calibration set that is too short (exit code 2)."""

    exit_code = 2


class VerificationError(LoramError, ValueError):
    """A file is torn, altered or not what it claims to be (exit code 3)."""

    exit_code = 3


class CheckpointError(VerificationError):
    """A folder is no checkpoint, or one of its parts is missing or damaged (exit code 3)."""


class IncompatibleError(LoramError, ValueError):
    """Two things that are each sound do not belong together, or a format is unknown here (exit code 4)."""

    exit_code = 4


class UnsupportedModelError(IncompatibleError):
    """The model's modules do not follow a pattern that loram-hub knows how to prune (exit code 4)."""


class PlanMismatchError(IncompatibleError):
    """An adapter or a weight does not have the shape that the plan gives it (exit code 4)."""


class UnsupportedAdapterError(IncompatibleError):
    """An adapter uses a feature that has no full-size equivalent (exit code 4)."""


class MissingDependencyError(LoramError, ImportError):
    """An optional package that this call needs is not installed (exit code 4)."""

    exit_code = 4


class AccessError(LoramError, ConnectionError):
    """The Hub refused, or could not be reached (exit code 5)."""

    exit_code = 5


class TrainingError(LoramError, ArithmeticError):
    """Training cannot go on: the loss is no number, or another process of the run ended (exit code 1)."""


class ResourceError(LoramError, OSError):
    """Disk or memory ran out, or a path cannot be written (exit code 6)."""

    exit_code = 6
