"""The progress display of a pool: a bar on a terminal, otherwise one line per finished task."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self


class Progress:
    """Shows the progress of `total` tasks, or nothing if `shown` is False."""

    def __init__(self, title: str, total: int, shown: bool = True) -> None:
        self._shown, self._bar = shown, None
        if shown and sys.stdout.isatty():
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[state]}"))
            self._task = self._bar.add_task(title, state="", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, state: str) -> None:
        """Show the number of finished tasks, and `state` in a few words."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=state)

    def ended(self, text: str, state: str) -> None:
        """Print a line about a task that has ended."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._shown:
            print(f"{text}   [{state}]", flush=True)
