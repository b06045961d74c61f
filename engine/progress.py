"""What a person watching a run sees: bars for clips, adaptation and sampling, and a line for each finished clip."""

import sys
from types import TracebackType
from typing import Any

PHASES = {"captions": "encoding captions", "fisher": "Fisher information", "adapt": "adapting", "sample": "sampling"}


class RunProgress:
    """Bars on a terminal; elsewhere the lines alone; nothing when quiet. Use as a context manager."""

    def __init__(self, clips: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self.quiet = quiet
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        self.clips = self.bars.add_task("clips", total=clips)
        self.phases = {phase: self.bars.add_task(name, total=1, visible=False) for phase, name in PHASES.items()}

    def __enter__(self) -> "RunProgress":
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def clip(self, arm: str, clip_id: str) -> None:
        """A clip begins."""
        self.bars.update(self.clips, description=f"{arm}: {clip_id}")
        for task in self.phases.values():
            self.bars.update(task, completed=0, visible=False)

    def step(self, phase: str, done: int, total: int) -> None:
        """A step of a phase is done."""
        self.bars.update(self.phases[phase], completed=done, total=total, visible=True)

    def finished(self, line: str) -> None:
        """A clip is done, one way or the other."""
        self.bars.advance(self.clips)
        self.say(line)

    def say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line)


def result_line(arm: str, clip_id: str, result: dict[str, Any]) -> str:
    """What is said of a finished clip."""
    scores, cost, gate = result["scores"], result["cost"]["seconds"], result.get("gate")
    foreseen = f"  foreseen {gate['predicted']:+.2f} dB: {'' if gate['adapted'] else 'not '}adapted" if gate else ""
    return (
        f"{arm}  {clip_id}  PSNR {scores['psnr']['mean']:.2f} dB  SSIM {scores['ssim']['mean']:.4f}  "
        f"adapt {cost['adapt']:.1f} s  sample {cost['sample']:.1f} s"
        f"{foreseen}"
    )
