"""Memory of a device: sending to it without waiting for it, and the peak of a phase (of the caching allocator on a GPU, of the
process on a CPU)."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of the CPU on a device, in a dtype, rounded before. A GPU finishes its work before it takes ordinary memory of the
    CPU, and stands still until there is new work; it takes page-locked memory in its turn."""
    tensor = tensor.to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the process's high-water mark (proc(5))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak since the reset; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None
