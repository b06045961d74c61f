"""Clips an hour on one and on several GPUs of one host, at STDiT3-XL/2: one process a GPU, nothing shared but a folder.

Run: python -m vidtta.bench.many_cards --cards 1 2 --clips 6 --minutes 9 --out FILE.json      (needs GPUs; no weights, no data)
     python -m vidtta.bench.many_cards --check                  (CPU: a small network in two processes; no timing that means anything)

As a run on several cards does it: each process sees one GPU (CUDA_VISIBLE_DEVICES), takes every n-th clip, and writes a
result a clip into the shared folder; compilers share their caches there, so only the first process compiles. A clip is
encoded, adapted on (20 steps of LoRA), sampled (30 steps), decoded, hashed and written, on the engine's fast paths. Each process
makes `--clips` clips after two to warm up; time counts from the moment all are warm to the last result, so a straggler counts. The
clips are the same for each number of cards, and with `--deterministic` their latents must be, too. Weights and frames are
random. Not included: reading videos, scoring, writing videos; these share the host's processors and disk, not a GPU.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TOLD = "@card "
"""How a line begins that a process says to the one that started it; libraries print, too."""


def work(arguments: argparse.Namespace) -> None:
    """What a process does: load, warm up, wait for the start, make its clips; says so line by line."""
    import torch

    from ..engine.clip import Known, continue_clip, encode_known
    from ..engine.cluster.place import Place
    from ..engine.determinism import make_deterministic
    from ..engine.environment import describe_environment
    from ..engine.files import sha256_tensor, write_json
    from ..engine.memory import peak_memory
    from ..engine.methods import LoRA, NoAdaptation
    from ..engine.models.paths import use_paths
    from ..engine.models.vae_fast import use_channels_last
    from ..kernels.attention import Choice
    from .step_rows import attention
    from .step_scene import real_scene, small_scene

    begun = time.monotonic()
    if arguments.deterministic:
        make_deterministic()
    device = torch.device("cpu" if arguments.check else "cuda")
    scene = small_scene(device) if arguments.check else real_scene(device)
    scene.compiler = "inductor"
    folder, place = arguments.folder, Place(arguments.rank, arguments.world)
    if "fused" in arguments.path:
        choice = folder / "choice.json"
        if not choice.exists():
            attention(scene)
            assert scene.choice is not None
            with suppress(FileExistsError):  # the first process's choice holds for all
                write_json(choice.with_name(f"choice-{place.rank}.json"), json.loads(scene.choice.to_json()))
                os.link(choice.with_name(f"choice-{place.rank}.json"), choice)
        scene.choice = Choice.from_json(choice.read_text())
    dit, vae = scene.experiment.dit, scene.experiment.vae
    use_paths(dit, scene.paths(arguments.path))
    if "fused" in arguments.path:
        use_channels_last(vae, triton=device.type == "cuda")
    method = LoRA(steps=20) if arguments.method == "lora" else NoAdaptation()
    adapter = method.attach(dit, 0)

    def make(name: str, experiment: Any) -> Row:
        start = time.monotonic()
        noise = torch.Generator().manual_seed(int(name.split()[-1]))
        pixels = torch.rand(scene.pixels.shape, generator=noise).mul_(2).sub_(1).to(device)
        known = Known(name, encode_known(vae, pixels, experiment.window), scene.caption())
        outcome = continue_clip(experiment, known, adapter)
        row = {"clip": name, "latents": sha256_tensor(outcome.latents), "cost": outcome.seconds}
        write_json(folder / f"{arguments.world} cards" / f"{name}.json", row)
        return row | {"seconds": time.monotonic() - start}

    say({"loaded_s": time.monotonic() - begun, "environment": describe_environment(device)})
    start = time.monotonic()
    sampler = replace(
        scene.experiment.sampler, steps=2, force_steps=0
    )  # steps of three branches and of one, as in a clip
    make("warm-up 0", replace(scene.experiment, sampler=sampler))
    make("warm-up 1", scene.experiment)
    say({"warm_s": time.monotonic() - start})
    sys.stdin.readline()
    for k in place.share(list(range(arguments.clips * place.world))):
        say(make(f"clip {k}", scene.experiment))
    peak = (peak_memory(device) or 0) / 2**30 if device.type == "cuda" else None
    say({"done": True, "peak_gib": peak})


def say(value: Row) -> None:
    print(TOLD + json.dumps(value), flush=True)


class Cards:
    """Processes, one a GPU, and what they say, in the order in which it comes."""

    def __init__(self, world: int, arguments: argparse.Namespace, folder: Path, environment: dict[str, str]) -> None:
        self.said: queue.Queue[tuple[int, Row | None]] = queue.Queue()
        self.logs = [folder / f"{world}-{rank}.log" for rank in range(world)]
        self.processes = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(world)))).split(",")
        if len(visible) < world and not arguments.check:
            raise SystemExit(
                f"error: --cards {world}: CUDA_VISIBLE_DEVICES names {len(visible)}; name more, or ask for fewer"
            )
        for rank in range(world):
            command = [sys.executable, "-m", "vidtta.bench.many_cards", *arguments.passed_on]
            command += [f"--folder={folder}", f"--rank={rank}", f"--world={world}"]
            own = {} if arguments.check else {"CUDA_VISIBLE_DEVICES": visible[rank]}
            with self.logs[rank].open("wb") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment | own
                )
            self.processes.append(process)
            threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()

    def _listen(self, rank: int, process: Any) -> None:
        for line in process.stdout:
            if line.startswith(TOLD):
                self.said.put((rank, json.loads(line[len(TOLD) :])))
        self.said.put((rank, None))

    def until_all_say(self, key: str, deadline: float, rows: list[Row]) -> None:
        """Wait until each process has said `key`, adding what they say to their rows."""
        waiting = set(range(len(self.processes)))
        while waiting:
            try:
                rank, said = self.said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no time left; waiting for `{key}` of cards {sorted(waiting)}") from None
            if said is None:
                if rank in waiting:
                    raise RuntimeError(f"card {rank} ended: {self.logs[rank].read_text()[-1500:]}")
                continue
            if "clip" in said:
                rows[rank]["clips"].append(said)
                print(f"    card {rank}: {said['clip']} in {said['seconds']:.2f} s", flush=True)
            else:
                rows[rank] |= said
            if key in said:
                waiting.discard(rank)

    def start(self) -> None:
        for process in self.processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def measure(world: int, arguments: argparse.Namespace, folder: Path, deadline: float) -> Row:
    """A row for so many cards; what was done before it failed or time ran out is in it."""
    rows: list[Row] = [{"card": rank, "clips": []} for rank in range(world)]
    row: Row = {"cards": world, "processes": rows}
    threads = max(1, (os.cpu_count() or 1) // max(arguments.cards))  # as many for one card as for several
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if arguments.check:
        environment["TRITON_INTERPRET"] = "1"
    cards = Cards(world, arguments, folder, environment)
    try:
        cards.until_all_say("warm_s", deadline, rows)
        begun = time.monotonic()
        cards.start()
        cards.until_all_say("done", deadline, rows)
        seconds = time.monotonic() - begun
        clips = sum(len(one["clips"]) for one in rows)
        row |= {"clips": clips, "seconds": seconds, "clips_an_hour": clips / seconds * 3600}
    except (RuntimeError, TimeoutError) as error:
        row["error"] = str(error)
    finally:
        cards.end()
    return row


def compare(rows: list[Row], deterministic: bool) -> None:
    """Add to each row its ratio to the first, and whether clips that both made have the same bits."""
    first = rows[0]
    for row in rows:
        if "clips_an_hour" in row and "clips_an_hour" in first:
            row["ratio"] = row["clips_an_hour"] / first["clips_an_hour"]
        if deterministic:
            bits, others = (
                {clip["clip"]: clip["latents"] for one in r["processes"] for clip in one["clips"]} for r in (first, row)
            )
            common = bits.keys() & others.keys()
            row["same_bits"] = f"{sum(bits[name] == others[name] for name in common)} of {len(common)}"


def show(row: Row) -> None:
    """One line a row."""
    warm = ", ".join(f"{one['warm_s']:.0f}" for one in row["processes"] if "warm_s" in one)
    head = f"{row['cards']} cards: warm after {warm or '-'} s"
    if "error" in row:
        print(f"{head}; {row['error']}", flush=True)
        return
    bits = f", same bits {row['same_bits']}" if "same_bits" in row else ""
    ratio = f", {row['ratio']:.3f}x the first row" if "ratio" in row else ""
    print(
        f"{head}; {row['clips']} clips in {row['seconds']:.2f} s, {row['clips_an_hour']:.1f} clips an hour{ratio}{bits}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of GPUs, a row each")
    parser.add_argument("--clips", type=int, default=6, help="clips a card, after the warm-up")
    parser.add_argument("--method", choices=["lora", "none"], default="lora")
    parser.add_argument("--path", default="fused", help="as in bench.steps: fused, compiled, eager, ...")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this, all rows together")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    parser.add_argument("--deterministic", action="store_true", help="deterministic algorithms, and compare bits")
    parser.add_argument("--commit", help="the code's commit, where the machine has no checkout to ask")
    parser.add_argument("--check", action="store_true", help="a small network on the CPU; checks alone")
    for hidden in ("--folder", "--rank", "--world"):
        parser.add_argument(hidden, type=Path if hidden == "--folder" else int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.passed_on = list(sys.argv[1:] if argv is None else argv)
    if arguments.folder:
        work(arguments)
        return 0
    deadline, rows = time.monotonic() + 60 * arguments.minutes, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for world in arguments.cards:
            row = measure(world, arguments, Path(folder), deadline)
            rows.append(row)
            compare(rows, arguments.deterministic)
            show(row)
            said = [one.pop("environment", None) for one in row["processes"]]
            if arguments.out:
                environment = next((e for e in said if e), {}) | (
                    {"commit": arguments.commit} if arguments.commit else {}
                )
                settings = {n: getattr(arguments, n) for n in ("method", "path", "clips", "deterministic")}
                found = {"environment": environment, "settings": settings, "rows": rows}
                arguments.out.write_text(json.dumps(found, indent=1))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
