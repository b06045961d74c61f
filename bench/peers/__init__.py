"""Other people's code beside ours: each checked to compute the same, then both timed in the same run.

A peer runs in a process of its own (`python -m vidtta.bench.peers` starts them all), so that what it imports, patches or takes down
is its own affair. What cannot be imported is a row that says why.
"""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..suite import Absent


def version_of(package: str) -> str:
    """The installed version of a package, as its own metadata tells."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def need(package: str, how: str) -> None:
    """Raise Absent for a package that is not installed. how: to get it."""
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed; {how}")


def empty_module(name: str) -> Any:
    """A new module of this name without contents, which Python and its package know."""
    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)  # other packages ask for that of what is installed
    module.__path__ = []
    sys.modules[name] = module
    package, _, last = name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)
    return module
