"""Searches over settings that a run wrote, for the heat map."""

from pathlib import Path
from typing import Any


def read_searches(roots: list[Path]) -> list[dict[str, Any]]:
    """Every search of the runs."""
    return []
