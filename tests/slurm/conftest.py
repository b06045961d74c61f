import os
import sys
from pathlib import Path

import pytest

from ..engine.tiny_run import make_clip, tiny_lab
from .local import Unavailable, local_slurm

CLIPS = 6


@pytest.fixture(scope="session")
def slurm():
    """A real Slurm, for as long as the tests last; skipped, with the reason, where it cannot be started."""
    try:
        with local_slurm() as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(f"no Slurm: {reason}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A lab of CLIPS clips, and an environment in which jobs find `vidtta`."""
    with pytest.MonkeyPatch.context() as patch, tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        for seed in range(CLIPS - 2):
            make_clip(lab.root / "clips" / f"more{seed:02d}.mp4", seed + 2)
        assert lab.run("undisturbed") == 0
        yield lab


@pytest.fixture(scope="session")
def undisturbed(lab):
    return lab.results("undisturbed")
