"""What every test is run under: two processes where the whole suite is asked for, and a quicker interpreter of kernels."""

import os
from collections.abc import Iterator

import pytest
import torch
from vidtta.engine.torchvision_ops import declare_missing_operators
from vidtta.kernels.common import INTERPRETED

from . import interpreter

declare_missing_operators()
if INTERPRETED:
    interpreter.make_faster()

FIRST = ("test_project.py", "test_hopper.py", "test_compile_cache.py", "test_run_kills.py")
"""Beside those on Slurm, the files whose tests take half a minute: begun last, one of them would be waited for alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name != "slurm" and item.path.name not in FIRST)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone runs on two processes of one thread each, if pytest-xdist is there and no GPU, which they would have to share.

    Files are begun in their order by each, half of them each, so that a module's fixtures are seldom made twice; who is done first
    takes over from the other.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    if not whole or torch.cuda.is_available() or config.getoption("numprocesses", 0) is not None:
        return
    config.option.numprocesses, config.option.dist = 2, "worksteal"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a run compiles is traced and counted as ever, but runs as it is."""
    from vidtta.engine import choices

    monkeypatch.setattr(choices, "COMPILER", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def float8_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own cast to float8 is wrong (test_quantize_rows.py), so torch's stands in for it; all else of a kernel is
    interpreted. On a GPU nothing is to do."""
    if INTERPRETED:
        interpreter.cast_to_float8_as_torch(monkeypatch)
