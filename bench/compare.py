"""Did anything get slower? Two files of measurements, row by row.

Run: vidtta bench compare BEFORE.json AFTER.json [--threshold 5] [--other-card]

One line a row. Exits with 1 when a row took longer than before by more than the threshold (per cent of the median), or has lost
its time because its check fails or it raised. Rows that only one of the files ran are named and fail nothing. Timings of
different cards say nothing of the code, so they are refused unless asked for.
"""

from pathlib import Path

from ..engine.errors import UserError
from .record import Recorded, read


def compare(before: Path, after: Path, threshold: float, other_card: bool = False) -> int:
    """Print a line a row; the exit status. threshold: per cent."""
    if not threshold >= 0:
        raise UserError(f"--threshold should be a number of per cent, at least 0, was {threshold}")
    old, new = read(before), read(after)
    cards = [found.environment.get("device") for found in (old, new)]
    if cards[0] != cards[1] and not other_card:
        raise UserError(
            f"{before} is of {cards[0]} and {after} of {cards[1]}: timings of different cards do not say which code is faster; "
            "give --other-card to see them all the same"
        )
    lines = judged(old, new, threshold)
    width = max((len(name) for _, name, _ in lines), default=0)
    for verdict, name, text in lines:
        print(f"{verdict:7} {name:{width}}  {text}")
    failed = sum(verdict in ("SLOWER", "LOST") for verdict, _, _ in lines)
    print(f"{failed} of {len(lines)} rows slower by more than {threshold:g} % or lost")
    return 1 if failed else 0


def judged(old: Recorded, new: Recorded, threshold: float) -> list[tuple[str, str, str]]:
    """Verdict, row and text for each row of either file, in the order of the first: SLOWER and LOST fail."""
    lines = []
    for name, was in old.times.items():
        if name in new.times:
            now = new.times[name]
            change = 100 * (now / was - 1)
            verdict = "SLOWER" if change > threshold else "faster" if change < -threshold else "same"
            lines.append((verdict, name, f"{was:.4g} -> {now:.4g} ms  {change:+.1f} %"))
        elif reason := _lost(name, new):
            lines.append(("LOST", name, f"{was:.4g} ms before; now none: {reason}"))
        else:
            lines.append(("not run", name, f"{was:.4g} ms before; {new.path.name} does not have it"))
    lines += [("new", name, f"{now:.4g} ms") for name, now in new.times.items() if name not in old.times]
    return lines


def _lost(name: str, new: Recorded) -> str | None:
    """Why a row that had a time has none: a kernel's row has one for each of its passes, and one reason for both."""
    for row, reason in new.without.items():
        if name == row or name.startswith(f"{row} "):
            return None if reason.startswith("no time left") else reason
    return None
