"""Exceptions that are reported to users by their message alone."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong setting, file or checkpoint that the user can correct. The message names the key or file, its value and the way
    out; the command line prints it and exits with 2."""


class StoreAway(InputError):
    """The tracking store does not answer; it may do so later."""


class TrainingFailed(Exception):
    """Training failed: numbers that are not finite, or no memory left. The message says where and what may help; the run is
    FAILED, the command line prints the message and exits with 1."""


class NotWritten(InputError):
    """A file cannot be written or read because the disk is full or read-only, or permission is denied."""
