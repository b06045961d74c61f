"""torchrun starts one process a GPU (here: two, without any); they deal out the clips and share the run directory alone."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from .tiny_run import CLIPS, tiny_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def torchrun(lab, output, *words):
    recipe = lab.argv(output)[1]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "vidtta.engine"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*program, "run", recipe, *words], capture_output=True, text=True, timeout=300, env=one_thread
    )


def test_two_processes_deal_out_the_clips_and_one_that_fails_ends_no_other(lab):
    assert lab.run("alone") == 0
    expected = lab.results("alone")
    (lab.root / "clips" / "aaa.mp4").touch()  # the first clip, of the first process, cannot be read
    done = torchrun(lab, "dealt")
    assert done.returncode == 0, done.stderr
    assert lab.results("dealt") == expected
    lines = Counter(re.findall(r"^(baseline|delta)  (\w+)  PSNR", done.stdout, re.MULTILINE))
    assert lines == Counter((arm, clip) for arm in ("baseline", "delta") for clip in CLIPS)
    assert "results missing: 2" in done.stderr
    shares = re.findall(r"plan: (\d+) clips", done.stdout)
    assert sorted(shares) == ["1", "2"]
    rows = (lab.root / "dealt/summary.csv").read_text().splitlines()
    assert sum(",done," in row for row in rows) == 4 * len(CLIPS) and sum(",failed," in row for row in rows) == 2
