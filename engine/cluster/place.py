"""Which task of how many this process is, as srun or torchrun say it in the environment.

One process a GPU; the clips are dealt out among them. Tasks share the run directory and nothing else: no process group is
made, so a task that fails or comes late holds up nobody.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import UserError

Item = TypeVar("Item")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
COMPILE_CACHE = "VIDTTA_COMPILE_CACHE"
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # a batch script without srun has no step


@dataclass(frozen=True)
class Place:
    """rank: 0 .. world - 1 of all tasks that were started together; local_rank: of those on this host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def share(self, items: list[Item]) -> list[Item]:
        """This task's items: every `world`-th, so that tasks meet clips of each kind; the shares of all tasks make the whole."""
        return items[self.rank :: self.world]


def this_place(environment: Mapping[str, str] | None = None) -> Place:
    """The place that torchrun gives, else that srun gives, else a process alone. Raises UserError for numbers that cannot be."""
    found = os.environ if environment is None else environment
    for names in (TORCHRUN, SRUN):
        if not all(name in found for name in names):
            continue
        try:
            place = Place(*(int(found[name]) for name in names))
        except ValueError:
            place = Place(-1)
        if not (0 <= place.rank < place.world and place.local_rank >= 0):
            said = ", ".join(f"{name}={found[name]}" for name in names)
            raise UserError(f"the environment says {said}, which is no task of a job; unset them to run alone")
        return place
    return Place()


def under_torchrun() -> bool:
    """Whether a torchrun watches over this process, which ends all tasks when one of them ends with an error."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def share_compile_cache(root: Path) -> None:
    """Let tasks find what others on the same host compiled; a user's own TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR go before.

    In a folder of COMPILE_CACHE where the environment names one; else, in a batch job, of the run directory, as a node's /tmp goes
    with the job; else where torch and Triton keep theirs, one place a user and host, which serves later runs too. A folder a host: torch
    and Triton write cache files under a name with their process's number and rename them, which keeps processes of one host
    apart, and those of two hosts not.
    """
    if wanted := os.environ.get(COMPILE_CACHE):
        folder = Path(wanted).resolve() / os.uname().nodename
    elif "SLURM_JOB_ID" in os.environ or under_torchrun():
        folder = root.resolve() / "shared" / "compiled" / os.uname().nodename
    else:
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
