"""Exceptions of which users see only the message."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong setting, file or checkpoint that the user can correct.

    The message names the key or file, its value and what to do; the command line prints it and exits with 2.
    """


class StoreAway(InputError):
    """The tracking store does not answer now, but may do so later."""


class TrainingFailed(Exception):
    """Training failed: values are not finite, or memory ran out.

    The message says where it happened and what may help. The run is FAILED; the command line prints the message and exits with 1.
    """


class NotWritten(InputError):
    """A file cannot be written or read because the disk is full or read-only, or permission is denied."""
