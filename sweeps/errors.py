"""The one exception of a sweep beside InputError."""


class SweepFailed(RuntimeError):
    """So much failed that going on makes no sense; the message says what."""
