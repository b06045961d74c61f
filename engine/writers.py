"""Which process writes a file, in its name, and whether that process is gone.

A process number says something in its own machine, boot and container alone, and numbers come again; so the name also holds a
hash of those three and when the process began. Of a writer elsewhere nothing is known here.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

PATTERN = r"[0-9a-f]{8}\.\d+\.\d+"
"""What `this_writer` gives where the system tells (Linux): here, process, when it began in the system's ticks."""


def this_writer() -> str:
    """This process, matching PATTERN; "" where the system does not tell."""
    here, began = _here(), _began(os.getpid())
    return f"{here}.{os.getpid()}.{began}" if here and began else ""


def is_gone(writer: str) -> bool:
    """Whether a writer of this machine, boot and container is no more; False for any other."""
    here, pid, began = writer.split(".")
    return here == _here() and _began(int(pid)) != began


@cache
def _here() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        parts = (boot, os.readlink("/proc/self/ns/pid"), os.uname().nodename)
    except OSError:
        return ""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _began(pid: int) -> str:
    """When a process began; "" where there is none, or only what its parent has not yet taken note of."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in ("Z", "X") else fields[18]
