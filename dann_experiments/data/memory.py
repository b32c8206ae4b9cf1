"""How much memory the decoded images of a job may take."""

from __future__ import annotations

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]  # stored image (B, h, w), mask (h, w), valid (h, w)


class Memory:
    """A memory budget for decoded images, shared by the sets of a job."""

    def __init__(self, gigabytes: float) -> None:
        self.bytes_left = gigabytes * 1e9
        self.full = gigabytes <= 0
        """True once something did not fit; reading ahead is then useless."""

    def take(self, arrays: Arrays) -> bool:
        """Reserve memory for these arrays; return False if they do not fit."""
        size = sum(array.nbytes for array in arrays if array is not None)
        if size > self.bytes_left:
            self.full = True
            return False
        self.bytes_left -= size
        return True
