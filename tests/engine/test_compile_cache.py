"""The tasks of a job on one host compile into one folder: at once, without harm, and what one compiled the next one finds."""

import json
import os
import shutil
import subprocess
import sys

import pytest

TASK = """
import json, sys, time
from pathlib import Path
from vidtta.engine.cluster.place import share_compile_cache
share_compile_cache(Path(sys.argv[1]))
import torch
from torch import nn
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval()
x = torch.randn(4, 16)
expected = model(x)
print("ready", flush=True)
sys.stdin.readline()
found = torch.compile(model, fullgraph=True)(x)
torch.testing.assert_close(found, expected)
print(json.dumps(dict(counters["inductor"])))
"""


def start(root):
    job = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    told = job | {"TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # Trying each vector instruction set takes longer than all that is tested here.
    told |= {"TORCHINDUCTOR_VEC_ISA_OK": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", TASK, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=told,
    )


def compile_at_once(root, tasks):
    """Counters of so many tasks that begin to compile in the same moment."""
    children = [start(root) for _ in range(tasks)]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n", child.communicate()[1]
    for child in children:
        assert child.stdin
        child.stdin.write("\n")
        child.stdin.flush()
    said = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * tasks, said
    return [json.loads(out) for out, _ in said]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_two_tasks_compile_at_once_and_a_third_finds_what_they_compiled(tmp_path):
    for counters in compile_at_once(tmp_path, 2):
        assert counters.get("fxgraph_cache_miss", 0) + counters.get("fxgraph_cache_hit", 0) == 1, counters
    host = tmp_path / "shared" / "compiled" / os.uname().nodename / "inductor"
    assert list(host.rglob("*.so")) and not list(host.rglob("*.tmp"))
    (third,) = compile_at_once(tmp_path, 1)
    assert third.get("fxgraph_cache_hit") == 1 and not third.get("fxgraph_cache_miss"), third
