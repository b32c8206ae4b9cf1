"""The one exception for what a user can mend: a wrong setting, file or checkpoint."""

from __future__ import annotations


class InputError(ValueError):
    """Its message names the key or file, the value it got and the way out; the command line prints it and exits with 2."""


class StoreAway(InputError):
    """The tracking store does not answer now; it may do so later."""
