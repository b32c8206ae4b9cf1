"""Asks once whether the hub of pretrained weights answers: its client would retry each of its requests for half a minute."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

TIMEOUT = 10  # seconds to connect and to answer


class Hub(contextlib.AbstractContextManager["Hub"]):
    """Uses, in its block, only weights that were downloaded before if the hub does not answer."""

    unreachable: str | None = None
    """Why the hub does not answer; None if it does."""

    def __init__(self) -> None:
        self._offline: bool = False

    def __enter__(self) -> Hub:
        """Ask the hub. Does nothing if the user has set its client offline (HF_HUB_OFFLINE)."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        self._offline = constants.HF_HUB_OFFLINE
        if not self._offline:
            session: Any = get_session()
            try:
                session.head(constants.ENDPOINT, timeout=TIMEOUT)
            except Exception as error:  # its types depend on the version of the client
                reason = (str(error).splitlines() or [""])[0] or type(error).__name__
                self.unreachable = f"{constants.ENDPOINT} does not answer: {reason}"
                constants.HF_HUB_OFFLINE = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the client's mode."""
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = self._offline
