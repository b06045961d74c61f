"""Slurm's own commands, called as a user calls them."""

import re
import shutil
import subprocess

from ..errors import UserError

DEFAULT_ARRAY = 1001
"""MaxArraySize where the site has not set it."""


def call(*command: str) -> str:
    """What a command of Slurm prints; raises UserError with its own words where it refuses or is not there."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not here; submit from a login node of a Slurm cluster, or look with --dry-run"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not answer within {error.timeout:.0f} s; try again") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise UserError(f"{command[0]} refused: {said}; see `man {command[0]}`, site options go in as --sbatch=OPTION")
    return done.stdout


def largest_array() -> int:
    """MaxArraySize: array indices stay below it."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_ARRAY


def submit(*arguments: str) -> str:
    """Submit through sbatch; the job's number."""
    return call("sbatch", "--parsable", *arguments).strip().split(";")[0]  # with several clusters: number;cluster


def queued(name: str) -> list[str]:
    """Numbers of this user's jobs of this name that wait or run; an array counts once."""
    return sorted(set(call("squeue", "--me", "--noheader", "--name", name, "--format", "%F").split()))


def exists(job: str) -> bool:
    """Whether Slurm knows a job: a dependency on one that it does not know holds nothing back."""
    try:
        return bool(call("scontrol", "show", "job", job).strip())
    except UserError:
        return False


def cancel(jobs: list[str]) -> None:
    if jobs:
        call("scancel", *jobs)
