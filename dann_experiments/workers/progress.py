"""What a pool's user sees while it works: a bar on a terminal, a line for each task that ends elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self


class Progress:
    """Shows the progress of `total` tasks; nothing if not `shown`."""

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
        """Show the number of tasks done, and `state`, a few words beside it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=state)

    def ended(self, text: str, state: str) -> None:
        """Print the line of a task that has ended."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._shown:
            print(f"{text}   [{state}]", flush=True)
