"""The exceptions whose message is all that a user is shown."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong setting, file or checkpoint, which the user can mend. Its message names the key or file, the value it got and the
    way out; the command line prints it and exits with 2."""


class StoreAway(InputError):
    """The tracking store does not answer now; it may do so later."""


class TrainingFailed(Exception):
    """Training went wrong: numbers that are not finite, or no memory left. Its message says where and what may help; the run is
    FAILED, the command line prints the message and exits with 1."""


class NotWritten(InputError):
    """A file could not be written or read where the disk is full, read-only, or does not allow it."""
