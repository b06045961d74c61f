"""What a person watching sees: one bar on a terminal, lines elsewhere, nothing when quiet."""

import sys
from types import TracebackType

EVERY = 100  # clips between two lines where there is no terminal


class Progress:
    """Counts clips. Use as a context manager."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self.quiet = quiet
        self.done, self.total = 0, 0
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        self.task = self.bars.add_task("clips", total=None)

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def expect(self, more: int) -> None:
        """So many more clips are wanted."""
        self.total += more
        self.bars.update(self.task, total=self.total)

    def finished(self, more: int = 1) -> None:
        self.done += more
        self.bars.update(self.task, completed=self.done)
        if self.bars.disable and self.done // EVERY > (self.done - more) // EVERY:
            self.say(f"{self.done} of {self.total} clips")

    def say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line)
