"""Where a run ran: versions, device, and the code's commit."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "vidtta",
    "torch",
    "triton",
    "torchvision",
    "transformers",
    "lpips",
    "av",
    "numpy",
    "flash-attn-4",
    "xformers",
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Plain JSON: packages, Python, system, card, driver-side versions, and the commit where the code is a checkout."""
    return {
        # torch's own string names the build too ("+cu130"), which the package's version may leave out.
        "packages": {name: found for name in PACKAGES if (found := _version(name))} | {"torch": torch.__version__},
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def describe_code() -> str:
    """Version, and commit where the code is a checkout: what a result says it was computed by."""
    commit = _commit()
    return f"{_version('vidtta') or 'unknown'}{f' at {commit}' if commit else ''}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
