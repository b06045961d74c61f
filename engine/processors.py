"""How many processors this process may use."""

import os


def usable_cpus() -> int:
    """Those of a job's share, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
