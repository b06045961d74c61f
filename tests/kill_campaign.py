"""Kill tasks of an array at random moments and submit it again until it is done: nothing may be lost, made twice or differ.

Run: python -m tests.kill_campaign --kills 200 --seed 0 --log tests/logs/kills-array-200.txt
     python -m tests.kill_campaign --kills 200 --plain      (where no Slurm can be started: each range a process)
Exits 1 if anything was. The array is slurm/run.sbatch on a real Slurm of one node (tests/slurm/local.py): 4 tasks at once, each a
range of 2 clips of the embedded model, in 2 arms. Every kill is a SIGKILL of a task's process, so its job fails; ranges that
lack results are submitted again. A finished run directory is held against one that nothing disturbed, and a new one begins.

The `vidtta` that jobs find asks a process which has imported everything to fork the run: a kill then falls into the run, from
loading the recipe on, and not into the imports. All else is as ever: batch file, srun, environment, exit status.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import yaml
from vidtta.engine.files import write_text

from .engine.tiny_run import FORKS, Lab, tiny_lab
from .kills import ENDED as RUN_ENDED
from .kills import LOADING, Report, compare, identity, run_and_tell, temporaries
from .slurm.local import ENDED, LocalSlurm, Unavailable, local_slurm

BATCH = Path(__file__).resolve().parents[1] / "slurm" / "run.sbatch"
TASKS, CLIPS = 4, 2
"""Tasks of an array, and clips of each one's range."""
KILLED = 137
"""The exit status that a shell gives a process after SIGKILL."""
SETTINGS: dict[str, Any] = {
    "model": {
        "dit": "embedded",
        "vae": "embedded",
        "text": "embedded",
        "dtype": "float32",
        "device": "cpu",
        "allow_untrained": True,  # it was trained on larger pictures
    },
    "data": {"clips": "world:shifted/test", "height": 24, "width": 32, "limit": TASKS * CLIPS},
    "window": {"total_frames": 9, "known_frames": 5, "model_frames": 9},
    "prompt": {"aesthetic": None},
    "sampler": {"steps": 2, "text_guidance": 1.0, "image_guidance": 1.5, "sdedit": False},
    "adaptation": {"context_latents": 1, "timesteps": "sampler", "draws": 2},
    "arms": {"lora": {"kind": "lora", "steps": 2, "rank": 2, "lr": 1e-3}},
    "scores": {"lpips": "allow_missing"},
    "keep": ["video", "latents", "adapter"],
}

CLIENT = """\
#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = {{"argv": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
    server.sendall(json.dumps(asked).encode() + b"\\n")
    said = server.makefile().readline()
sys.exit(int(said) if said else {killed})
"""


@dataclass
class Running:
    """A forked task. dies: the processor time in seconds after which it is killed, unless it has ended."""

    dies: float
    place: Any


@dataclass
class Forks:
    """The process that forks tasks, and kills some: it alone knows when a process number is still its child's."""

    pipe: Any
    seed: int
    log: str
    whole: float = 0.0
    """Moments of kills are uniform over this many seconds of a task's own processor time: on a machine that others use, too, any
    part of a task then is as likely as on an idle one. 0: none is killed."""
    left: int = 0
    """Kills that are still to be made."""
    asked: int = 0
    running: dict[int, Running] = field(default_factory=dict)

    def serve(self, address: str) -> None:
        import torch._inductor  # noqa: F401 (what a run imports when it asks for deterministic algorithms)

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            listener.settimeout(0.005)
            self.pipe.send("ready")
            while True:
                while self.pipe.poll():
                    self.whole, self.left = self.pipe.recv()
                with suppress(TimeoutError):
                    self._start(listener.accept()[0], listener)
                for pid in list(self.running):
                    self._look_at(pid)

    def _start(self, client: socket.socket, listener: socket.socket) -> None:
        asked = json.loads(client.makefile().readline())
        place = RawArray("c", 64)
        place.value = LOADING
        pid = os.fork()
        if pid == 0:
            listener.close()
            os._exit(self._run(asked, place, client))
        client.close()
        self.asked += 1
        self.running[pid] = Running(random.Random(f"{self.seed} {self.asked}").uniform(0, self.whole), place)

    def _run(self, asked: dict[str, Any], place: Any, client: socket.socket) -> int:
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        try:
            run_and_tell(asked["argv"], place, self.log)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            code = 70
        client.sendall(f"{code}\n".encode())
        return code

    def _look_at(self, pid: int) -> None:
        task = self.running[pid]
        ended, _, used = os.wait4(pid, os.WNOHANG)
        if ended:
            self.pipe.send(("ended", used.ru_utime + used.ru_stime))
        elif self.left and processor_time(pid) >= task.dies and task.place.value != RUN_ENDED:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            self.left -= 1
            self.pipe.send(("killed", task.place.value.decode()))
        else:
            return
        del self.running[pid]


def processor_time(pid: int) -> float:
    """Seconds that a process has computed for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(pipe: Any, seed: int, log: str, address: str) -> None:
    Forks(pipe, seed, log).serve(address)


@dataclass
class Campaign:
    """A lab whose recipe is run as arrays. cluster: None where ranges are plain processes."""

    lab: Lab
    cluster: LocalSlurm | None
    program: Path
    pipe: Any
    report: Report
    clips: list[str] = field(default_factory=list)
    arrays: int = 0
    longest: float = 0.0

    def recipe(self, output: str) -> Path:
        path = self.lab.root / f"{output}.yaml"
        settings = {**self.lab.settings, "output_dir": str(self.lab.root / output)}
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    def array(self, output: str, tasks: list[int]) -> None:
        """Submit these tasks at once, and wait until all have ended, well or not."""
        recipe = self.recipe(output)
        self.arrays += 1
        if self.cluster is None:
            ranges = [["--batch-start", str(k * CLIPS), "--batch-end", str((k + 1) * CLIPS)] for k in tasks]
            children = [subprocess.Popen([self.program, "run", recipe, *words]) for words in ranges]
            for child in children:
                child.wait()
        else:
            options = [f"--array={','.join(map(str, tasks))}", f"--output={self.lab.root}/job-%A_%a.out"]
            command = ["sbatch", "--parsable", *options, str(BATCH), str(recipe), str(CLIPS)]
            job = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
            for k in tasks:
                self.cluster.wait(f"{job}_{k}", *ENDED, timeout=900)
        time.sleep(0.05)  # longer than the forking process looks away
        while self.pipe.poll():
            what, found = self.pipe.recv()
            if what == "killed":
                self.report.kills += 1
                self.report.places[found] += 1
            else:
                self.report.undisturbed += 1
                self.longest = max(self.longest, found)

    def unfinished(self, output: str) -> list[int]:
        """Tasks whose range lacks a result."""
        clips = [name.split("/")[1] for name in self.lab.results(output)]
        return [
            k for k in range(TASKS) if sum(clips.count(c) for c in self.clips[k * CLIPS : (k + 1) * CLIPS]) < 2 * CLIPS
        ]

    def undisturbed(self) -> None:
        """The run that the others are held against; how long its tasks take says when others are killed."""
        self.array("undisturbed", list(range(TASKS)))
        expected = self.lab.results("undisturbed")
        assert len(expected) == 2 * TASKS * CLIPS, sorted(expected)
        self.clips = sorted({name.split("/")[1] for name in expected})
        self.report.undisturbed = 0

    def kill(self, kills: int) -> None:
        """So many kills, then to the end of the run directory in hand."""
        while self.report.kills < kills:
            output = f"killed {len(self.report.outputs)}"
            self.report.outputs.append(output)
            finished: dict[Path, tuple[int, int]] = {}
            self.pipe.send((self.longest, kills - self.report.kills))
            while tasks := self.unfinished(output):
                self.array(output, tasks)
                for path in (self.lab.root / output).glob("arms/*/clips/*/result.json"):
                    finished.setdefault(path, identity(path))
                self.report.left += len(temporaries(self.lab))
            self.pipe.send((0.0, 0))
            code = subprocess.run([self.program, "run", self.recipe(output)], timeout=600).returncode
            assert code == 0, code
            compare(self.lab, output, self.report)
            self.report.doubled += sum(p.exists() and identity(p) != before for p, before in finished.items())
            self.report.left_after += len(temporaries(self.lab))
            shutil.rmtree(self.lab.root / output)
            print(f"{self.report.kills} kills, {len(self.report.outputs)} run directories", flush=True)


@contextmanager
def campaign(lab: Lab, cluster: LocalSlurm | None, seed: int) -> Iterator[Campaign]:
    """A campaign on a lab's recipe; the environment's PATH leads jobs to the program that forks."""
    program, address = lab.root / "bin" / "vidtta", str(lab.root / "forks.socket")
    program.parent.mkdir()
    program.write_text(CLIENT.format(python=sys.executable, address=address, killed=KILLED))
    program.chmod(0o755)
    ours, theirs = FORKS.Pipe()
    server = FORKS.Process(target=_serve, args=(theirs, seed, str(lab.root / "tasks.log"), address))
    server.start()
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{program.parent}:{before}"
    try:
        assert ours.recv() == "ready"
        each = f"{TASKS * CLIPS} clips in 2 arms, by {TASKS} tasks"
        yield Campaign(lab, cluster, program, ours, Report(each=each))
    finally:
        os.environ["PATH"] = before
        server.kill()
        server.join()


def run_campaign(lab: Lab, cluster: LocalSlurm | None, kills: int, seed: int) -> tuple[Report, list[str]]:
    """Kill so many tasks; the report, and its lines."""
    begun = time.monotonic()
    with campaign(lab, cluster, seed) as arrays:
        arrays.undisturbed()
        arrays.kill(kills)
    arrays.report.seconds = time.monotonic() - begun
    how = "jobs of Slurm" if cluster else "plain processes"
    return arrays.report, [f"arrays {arrays.arrays}, their tasks {how}", *arrays.report.lines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without Slurm")
    parser.add_argument("--log", type=Path, help="write the report here, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the daemons would outlive this process
    with (
        tempfile.TemporaryDirectory() as folder,
        tiny_lab(Path(folder)) as lab,
        nullcontext() if arguments.plain else local_slurm() as cluster,
    ):
        lab.settings = SETTINGS
        report, lines = run_campaign(lab, cluster, arguments.kills, arguments.seed)
    command = f"python -m tests.kill_campaign --kills {arguments.kills} --seed {arguments.seed}"
    text = "\n".join([command + " --plain" * arguments.plain, *lines, ""])
    print(text, end="")
    if arguments.log:
        write_text(arguments.log, text)
    return int(not report.ok)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unavailable as reason:
        sys.exit(f"no Slurm ({reason}); give --plain")
