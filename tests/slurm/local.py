"""A real Slurm for tests: munged, slurmctld and slurmd of one node that pretends to have many processors and four GPUs.

All state lies in one folder; a Slurm or munge of the machine is neither used nor disturbed. Works as root and as an ordinary
user, and needs the programs alone: apt-get install --no-install-recommends munge slurmctld slurmd slurm-client
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "munge", "unmunge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SBIN = "/usr/sbin:/sbin:/usr/local/sbin"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom")  # slurmd wants character devices for GPUs
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
MinJobAge=3600
MailProg=/bin/true
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=usual Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""


class Unavailable(Exception):
    """Why Slurm cannot be started here."""


class LocalSlurm:
    """A running cluster. The environment variable SLURM_CONF leads to it; `scontrol` and the like then find it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = [_free_port(), _free_port()]
        values = {"host": host, "ports": ports, "user": getpass.getuser(), "root": self.root, "gpus": len(DEVICES)}
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(**values))
        (self.root / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in DEVICES))
        version = re.search(r"slurm\D*(\d+)", _said("slurmd", "-V"))
        plugin = "cgroup/v1" if version and int(version[1]) < 24 else "disabled"  # v2 wants systemd; none is used
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (self.root / "plugstack.conf").touch()
        for name in ("state", "spool"):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        paths = {"key-file": key, **{f"{n}-file": self.root / f"munged.{n}" for n in ("log", "pid", "seed")}}
        options = [f"--{name}={path}" for name, path in paths.items()]
        self._launch("munged", "--foreground", "--force", f"--socket={self.root}/munge.socket", *options)
        self._wait(lambda: (self.root / "munge.socket").exists(), "munged")
        self._launch("slurmctld", "-D", "-f", str(self.root / "slurm.conf"))
        self._launch("slurmd", "-D", "-f", str(self.root / "slurm.conf"))
        self._wait(lambda: _said("sinfo", "-h", "-o", "%T").strip() == "idle", "the node")

    def stop(self) -> None:
        """Cancel all jobs, whose steps would outlive slurmd, and end the daemons."""
        _said("scancel", "--quiet", "--user", getpass.getuser())
        until = time.monotonic() + 20
        while _said("squeue", "-h", "-t", "R,CG", "-o", "%A").strip() and time.monotonic() < until:
            time.sleep(0.1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job or of an array's task, by its words (JobState, Restarts, Reason, ...)."""
        text = _said("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job).get("JobState", "")

    def wait(self, job: str, *states: str, timeout: float = 90) -> dict[str, str]:
        """Wait until a job is in one of these states (by default one of the last ones); what scontrol then says of it."""
        until = time.monotonic() + timeout
        while (found := self.show(job)).get("JobState") not in (states or ENDED):
            assert time.monotonic() < until, f"job {job} after {timeout} s: {found}"
            time.sleep(0.1)
        return found

    def begin_now(self, job: str) -> None:
        """Do not let a requeued job wait as long as it would; its earlier credential counts in whole seconds."""
        time.sleep(1.5)
        _said("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _launch(self, *command: str) -> None:
        log = (self.root / f"{command[0]}.out").open("wb")
        self.daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + 30
        while not ready():
            if time.monotonic() > until or any(daemon.poll() is not None for daemon in self.daemons):
                logs = "\n".join(path.read_text()[-1500:] for path in sorted(self.root.glob("*.log")))
                raise Unavailable(f"{what} did not come up\n{logs}")
            time.sleep(0.05)


@contextmanager
def local_slurm() -> Iterator[LocalSlurm]:
    """A cluster for as long as the context lasts; SLURM_CONF and PATH are set for this process and its children.

    Raises Unavailable where programs are missing or do not come up.
    """
    before = {name: os.environ.get(name) for name in ("PATH", "SLURM_CONF")}
    os.environ["PATH"] = f"{os.environ['PATH']}:{SBIN}"
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: paths of sockets end at 107 characters
    folder.chmod(0o755)  # munged takes no socket below a folder that others cannot enter
    cluster = LocalSlurm(folder)
    try:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise Unavailable(f"not installed: {', '.join(missing)}")
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
