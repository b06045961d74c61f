"""Time and peak memory of a clip under every arm of a comparison, placebos included, at STDiT3-XL/2 through the engine's path.

Run: python -m vidtta.bench.methods --out FILE.json --minutes 9 [--paths fused] [--methods full lora ...]   (a GPU; no weights, no data)
     python -m vidtta.bench.methods --check        (CPU: a small network, the small recipe; checks, no timings that mean anything)
     python -m vidtta.bench.methods --list

Weights and frames are random: cost, never quality. Arms, sampler, window and adaptation are those of recipes/08_method_comparison.yaml
(another with `--recipe`). Each arm makes three clips: the first two with two steps of sampling, so that what happens once a process or
once an arm (allocator, handles, compiling, recording) is in no figure but `first_seconds`. A row: encode, adapt, sample, decode and
total (with restoring) in seconds, peak memory of adapting and of the whole clip in GiB; afterwards the network is bit for bit as
before, or the row says that it is not. Rows are printed and written as they are done; an arm for which no time is left is named under
`skipped`, and an arm that fails has its reason.
"""

import argparse
import dataclasses
import json
import os
import time
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..engine.adaptation import AdaptationSettings, Task
from ..engine.arms import PLACEBOS, Placebo
from ..engine.clip import Experiment, Known, continue_clip, encode_known, timed
from ..engine.determinism import make_deterministic
from ..engine.environment import describe_environment
from ..engine.memory import peak_memory, reset_peak_memory
from ..engine.methods import METHODS, AnyMethod
from ..engine.methods.protocol import Adapter
from ..engine.models.checkpoint import state_hash
from ..engine.recipe_files import read_layers
from ..engine.sampler import SamplerSettings
from ..engine.window import Window

if TYPE_CHECKING:
    from .step_scene import Scene

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """An arm: its method, and which placebo of it, if any."""

    method: AnyMethod
    placebo: Placebo | None = None


def build(kind: Any, values: Any) -> Any:
    """A settings type from what a recipe says: nested dataclasses from mappings, tuples from lists. The recipe's loader, which also
    refuses what is wrong, needs pydantic; this needs nothing, and leaves out no key."""
    if isinstance(values, list):
        return tuple(values)
    if not isinstance(values, dict):
        return float(values) if kind is float else values
    if isinstance(kind, types.UnionType):
        kind = next(one for one in typing.get_args(kind) if dataclasses.is_dataclass(one))
    hints = typing.get_type_hints(kind)
    return kind(**{key: build(hints[key], value) for key, value in values.items()})


def read_cases(recipe: str) -> tuple[dict[str, Case], SamplerSettings, AdaptationSettings, Window]:
    """The baseline, the arms and their placebos by name, and the sections that shape a clip's cost."""
    values = read_layers(recipe).merged()
    arms = {"baseline": {"kind": "none"}} | values.get("arms", {"method": values.get("method")})
    cases = {name: Case(build(METHODS[arm["kind"]], arm)) for name, arm in arms.items()}
    for name in values.get("placebos", ()):
        cases |= {f"{name}-{placebo}": Case(cases[name].method, placebo) for placebo in PLACEBOS}
    found = (
        build(kind, values.get(section, {}))
        for section, kind in (("sampler", SamplerSettings), ("adaptation", AdaptationSettings), ("window", Window))
    )
    return cases, *found


class PeakOfAdapting:
    """An observer that reads the peak of memory where adapting ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def begin(self, task: Task, adapter: Adapter) -> None:
        pass

    def step(self, steps: int) -> None:
        pass

    def adapted(self) -> None:
        self.bytes = peak_memory(self.device) or 0


def shortened(experiment: Experiment) -> Experiment:
    """Two steps of sampling: one that guides over three branches, and one of the prompt's branch alone where guidance oscillates."""
    return dataclasses.replace(experiment, sampler=dataclasses.replace(experiment.sampler, steps=2, force_steps=1))


def measure(experiment: Experiment, known: Known, other: Known, case: Case, encode: float) -> Row:
    """Seconds and GiB of one clip under one arm. encode: seconds that its known frames took."""
    device = experiment.dit.device
    case.method.check(experiment.adaptation)
    adapter = case.method.attach(experiment.dit, experiment.seed)
    peak = PeakOfAdapting(device)

    def run(experiment: Experiment) -> tuple[Any, float]:
        seconds: dict[str, float] = {}
        random = torch.Generator(device).manual_seed(0) if case.placebo == "random" else None
        with timed(seconds, "total", device):
            outcome = continue_clip(
                experiment,
                known,
                adapter,
                adapt_on=other if case.placebo == "other_clip" else None,
                randomize=random,
                observer=peak,
            )
        return outcome, seconds["total"]

    try:
        first = sum(run(shortened(experiment))[1] for _ in range(2))
        outcome, total = run(experiment)
    finally:
        adapter.detach()
    taken = outcome.trace.steps
    return {
        "encode": encode,
        **{phase: outcome.seconds[phase] for phase in ("adapt", "sample", "decode")},
        "total": encode + total,
        "first_seconds": first,
        "seconds_a_step": outcome.seconds["adapt"] / taken if taken else None,
        "adapt_peak_gib": peak.bytes / 2**30,
        "peak_gib": (outcome.peak_memory_bytes or 0) / 2**30,
        "steps": taken,
        "trained": outcome.change.trained,
        "changed": outcome.change.changed,
    }


def run(scene: "Scene", cases: dict[str, Case], seconds: float, write: Any = lambda rows: None) -> list[Row]:
    """A row for each arm, printed and written as it is done; those for which no time is left say so."""
    begin, experiment, rows = time.monotonic(), scene.experiment, []
    before = state_hash(experiment.dit)
    encoding: dict[str, float] = {}
    encode_known(experiment.vae, scene.pixels, experiment.window)
    with timed(encoding, "encode", scene.device):
        latents = encode_known(experiment.vae, scene.pixels, experiment.window)
    known = Known("bench", latents, scene.caption())
    other = Known("other", latents.flip(-1), scene.caption())
    # What happens once a process is not the baseline's, which takes no step that could warm up for it.
    continue_clip(shortened(experiment), known, METHODS["none"]().attach(experiment.dit, 0))
    for name, case in cases.items():
        row: Row = {"arm": name, "placebo": case.placebo, "settings": dataclasses.asdict(case.method)}
        start = time.monotonic()
        if start - begin > seconds:
            row["skipped"] = f"no time left after {seconds:.0f} s"
        else:
            reset_peak_memory(scene.device)
            try:
                row |= measure(experiment, known, other, case, encoding["encode"])
            except Exception as error:  # each arm has ways of its own to fail, and the others must run
                row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
            if scene.device.type == "cuda":
                torch.cuda.empty_cache()
            row |= {"restored_bit_for_bit": state_hash(experiment.dit) == before, "row_s": time.monotonic() - start}
        rows.append(row)
        show(row)
        write(rows)
    return rows


def show(row: Row) -> None:
    """One line a row."""
    head = f"{row['arm']:22}"
    if "total" not in row:
        print(f"{head} {row.get('error') or row['skipped']}", flush=True)
        return
    seconds = "  ".join(f"{name} {row[name]:7.2f}" for name in ("adapt", "sample", "decode", "total"))
    memory = f"peak {row['peak_gib']:6.2f} GiB (adapting {row['adapt_peak_gib']:.2f})"
    restored = "" if row["restored_bit_for_bit"] else "  NOT RESTORED"
    print(f"{head} {seconds} s  {memory}  trained {row['trained']:,}{restored}  [{row['row_s']:.0f} s]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after each of them")
    parser.add_argument("--methods", nargs="+", metavar="ARM", help="these arms alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further arm after this")
    parser.add_argument("--recipe", help="another recipe's arms")
    parser.add_argument(
        "--paths",
        choices=("eager", "compiled", "fused", "fused, not compiled"),
        default="eager",
        help="how layers compute",
    )
    parser.add_argument("--nondeterministic", action="store_true", help="let torch choose algorithms freely")
    parser.add_argument("--commit", help="the code's commit, where the machine has no checkout to ask")
    parser.add_argument("--check", action="store_true", help="a small network on the CPU; checks alone")
    parser.add_argument("--list", action="store_true", help="name the arms and stop")
    arguments = parser.parse_args()
    if arguments.check:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    recipe = arguments.recipe or f"08_method_comparison{'.demo' if arguments.check else ''}"
    cases, sampler, adaptation, window = read_cases(recipe)
    if unknown := set(arguments.methods or ()) - set(cases):
        parser.error(f"--methods {', '.join(sorted(unknown))}: the arms of {recipe} are {', '.join(cases)}")
    cases = {name: case for name, case in cases.items() if not arguments.methods or name in arguments.methods}
    if arguments.list:
        print("\n".join(cases))
        return
    from ..engine.models.paths import use_paths
    from ..engine.models.vae_fast import use_channels_last
    from .step_rows import attention
    from .step_scene import real_scene, small_scene

    if not arguments.nondeterministic:
        make_deterministic()
    device = torch.device("cpu" if arguments.check else "cuda")
    environment = describe_environment(device) | {
        "deterministic": not arguments.nondeterministic,
        "paths": arguments.paths,
        "recipe": recipe,
    }
    environment["commit"] = arguments.commit or environment["commit"]
    print(json.dumps(environment), flush=True)
    scene = small_scene(device) if arguments.check else real_scene(device)
    scene.experiment = dataclasses.replace(scene.experiment, sampler=sampler, adaptation=adaptation, window=window)
    if arguments.paths.startswith("fused") and device.type == "cuda":
        attention(scene)
    use_paths(scene.experiment.dit, scene.paths(arguments.paths))
    if arguments.paths.startswith("fused") and device.type == "cuda":
        use_channels_last(scene.experiment.vae, triton=True)

    def write(rows: list[Row]) -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1, default=str))

    rows = run(scene, cases, arguments.minutes * 60, write)
    if failed := [row["arm"] for row in rows if "error" in row or row.get("restored_bit_for_bit") is False]:
        raise SystemExit(f"{len(failed)} of {len(rows)} arms failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
