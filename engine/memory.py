"""Peak memory of a phase: of the caching allocator on a GPU, of the process on a CPU."""

from contextlib import suppress
from pathlib import Path

import torch

_noted = 0
"""The largest peak since the reset that the allocator does not know of."""


def note_peak(used: int) -> None:
    """Count so many bytes as in use at some moment since the reset: a replayed CUDA graph works in memory that the allocator holds free
    for it, and counts none."""
    global _noted
    _noted = max(_noted, used)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak from what is in use now."""
    global _noted
    _noted = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the process's high-water mark (proc(5))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since the reset, what recorded work uses included; None where the system does not tell."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(device), _noted)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None
