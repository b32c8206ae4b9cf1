"""The only exception of a sweep besides InputError."""


class SweepFailed(RuntimeError):
    """Too many trials failed to continue. The message gives the cause."""
