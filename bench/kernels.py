"""Check and time every Triton kernel at the model's real shapes, beside eager PyTorch and torch.compile.

Run: python -m vidtta.bench.kernels [--out FILE.json] [--only OP ...] [--minutes M] [--vary]    (needs a GPU; no weights, no data)
     python -m vidtta.bench.kernels --check        (CPU: small shapes under Triton's interpreter; checks, no timings)

Each operation is first compared with float64 on fresh random inputs: it may err at most twice as far as eager PyTorch in the
same dtype, plus one ulp. What fails is not timed; the failure is its row. Times are medians over replays of a CUDA graph with
a cold L2 cache; GB/s and TFLOP/s come from the least bytes and flops an operation needs, and their shares from a copy and a
product measured in the same run. `--vary` also times other block sizes. Cases run in another process, so that one which
takes the GPU's context down is recorded and the rest still run.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from . import record, suite
from .timing import Ceilings, Timer, measure_ceilings

if TYPE_CHECKING:
    from .kernel_cases import Case, Sizes

Row = dict[str, Any]
SECONDS = 140  # after this no further case starts
LOST = 3  # exit status of a process whose GPU context an error took down


class Wrong(Exception):
    """An operation whose result is not as close to float64 as it must be."""


def outputs(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out] if isinstance(out, Tensor) else list(out)


def with_gradients(
    function: Callable[..., Any], inputs: list[Tensor], trained: tuple[int, ...], seed: int
) -> list[Tensor]:
    """Outputs, and gradients of the trained inputs under random output gradients that depend on the seed alone."""
    leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(inputs)]
    outs = outputs(function, leaves)
    if not trained:
        return [o.detach() for o in outs]
    grads = torch.autograd.grad(outs, [leaves[i] for i in trained], output_gradients(outs, seed))
    return [t.detach() for t in (*outs, *grads)]


def output_gradients(outs: list[Tensor], seed: int) -> list[Tensor]:
    """Rounded to 16 bits in every dtype, so that all implementations are given the same numbers."""
    generator = torch.Generator(outs[0].device).manual_seed(seed)
    narrow = torch.bfloat16 if outs[0].is_cuda else torch.float16
    return [
        torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(narrow).to(o.dtype)
        for o in outs
    ]


def errors(
    function: Callable[..., Any], case: "Case", inputs: list[Tensor], truth: list[Tensor], poison: bool
) -> list[float]:
    """The largest error of each output and gradient. poison: what a kernel leaves unwritten is NaN."""
    # In this mode torch fills what torch.empty gives with NaN; torch.compile would compile anew for it.
    torch.use_deterministic_algorithms(poison, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010 (set on a module's hidden class)
    try:
        actual = with_gradients(function, inputs, case.trained, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    found = []
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        if a.shape != t.shape:
            raise Wrong(f"result {i} is {list(a.shape)}, should be {list(t.shape)}")
        error = largest(a.to(t.dtype) - t)
        found.append(error if error == error else float("inf"))
    return found


def largest(x: Tensor) -> float:
    """The largest absolute value; of nothing, as a result without columns is, 0."""
    return x.abs().max().item() if x.numel() else 0.0


def check(
    name: str, function: Callable[..., Any], case: "Case", inputs: list[Tensor], truth: list[Tensor], plain: list[float]
) -> float:
    """The largest error relative to what is allowed; raises Wrong where it is above 1."""
    found = errors(function, case, inputs, truth, poison=name != "compiled")
    eps = torch.finfo(inputs[0].dtype).eps
    worst = 0.0
    for i, (error, baseline, t) in enumerate(zip(found, plain, truth, strict=True)):
        allowed = 2 * baseline + eps * largest(t)
        if not error <= allowed:
            raise Wrong(f"result {i}: max error {error:.2e}, allowed {allowed:.2e}")
        worst = max(worst, error / allowed if error else 0.0)
    return worst


@contextmanager
def attributes(module: ModuleType | None, values: dict[str, Any]) -> Iterator[None]:
    """Set attributes of a module for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def candidates(
    case: "Case", timed: bool, vary: bool
) -> Iterator[tuple[str, Callable[..., Any], ModuleType | None, dict[str, Any]]]:
    """Name, call, and module attributes of all that is run; eager is first."""
    yield "eager", case.reference, None, {}
    if timed and case.compile:
        yield "compiled", torch.compile(case.reference, fullgraph=True, dynamic=False), None, {}
    for name, function in case.impls.items():
        if timed or name != "compiled":
            yield name, function, None, {}
    if vary:
        for module, values in case.variants:
            label = ", ".join(f"{key}={value}" for key, value in values.items())
            for name, function in case.impls.items():
                if name != "compiled":
                    yield f"{name} [{label}]", function, module, values


def run_case(
    case: "Case", device: torch.device, dtype: torch.dtype, timer: Timer | None, ceilings: Ceilings | None, vary: bool
) -> Iterator[Row]:
    """The rows of one case: for each implementation a check, then forward and backward times."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    inputs = case.make(device, dtype)
    wide = [t.to(case.truth) for t in inputs]
    truth = with_gradients(case.reference, wide, case.trained, 1)
    del wide
    plain: list[float] = []
    for name, function, module, values in candidates(case, timer is not None, vary):
        row: Row = {"op": case.op, "shape": case.shape, "impl": name, "dtype": str(dtype).removeprefix("torch.")}
        try:
            with attributes(module, values):
                plain = plain or errors(case.reference, case, inputs, truth, poison=True)
                start = time.perf_counter()
                row["error_of_allowed"] = check(name, function, case, inputs, truth, plain)
                row["check_seconds"] = time.perf_counter() - start  # the first call, so compiling is in it
                if timer is not None and ceilings is not None:
                    row |= times(function, case, inputs, timer, ceilings)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            if device.type == "cuda" and not alive():
                row["context_lost"] = True
                yield row
                return
        yield row
    if timer is not None and ceilings is not None:
        for name, function in case.floors.items():
            passed = timer.measure(lambda function=function: lambda: function(*inputs))
            row = {"op": case.op, "shape": case.shape, "impl": f"floor: {name}", "forward": dataclasses.asdict(passed)}
            yield row


def alive() -> bool:
    """Whether the GPU's context survived the last error."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def times(function: Callable[..., Any], case: "Case", inputs: list[Tensor], timer: Timer, ceilings: Ceilings) -> Row:
    """The forward (as in training where something is trained), and the backward alone."""

    def forward() -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_(i in case.trained) for i, t in enumerate(inputs)]
        return lambda: function(*leaves)

    def backward() -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_(i in case.trained) for i, t in enumerate(inputs)]
        outs = outputs(function, leaves)
        douts = output_gradients(outs, 2)
        wanted = [leaves[i] for i in case.trained]
        return lambda: torch.autograd.grad(outs, wanted, douts, retain_graph=True)

    found: Row = {}
    passes = [("forward", forward, case.forward)] + ([("backward", backward, case.backward)] if case.trained else [])
    for name, prepare, (moved, flops) in passes:
        timing = timer.measure(prepare)
        found[name] = dataclasses.asdict(timing) | ceilings.figures(timing.milliseconds, moved, flops)
    return found


def show(row: Row) -> None:
    """One line a pass."""
    head = f"{row['op']:28} {row['shape']:10} {row['impl']:36}"
    if "error" in row or not {"forward", "backward"} & set(row):
        print(f"{head} {row.get('error', 'ok')}", flush=True)
        return
    for name in ("forward", "backward"):
        if (t := row.get(name)) is None:
            continue
        line = f"{head} {name:8} {t['milliseconds']:8.4f} ms"
        if "gb_per_s" in t:
            line += f" {t['gb_per_s']:7.0f} GB/s {t['share_of_copy']:6.1%} {t['tflop_per_s']:6.1f} TFLOP/s {t['share_of_product']:6.1%}"
        print(
            f"{line}  +{t['peak'] / 2**20:.0f} MiB, compiled and checked in {row.get('check_seconds', 0):.1f} s, {t['how']}",
            flush=True,
        )


def check_all(only: list[str] | None = None) -> list[Row]:
    """Every case at small shapes on the CPU; the interpreter must have been chosen before the kernels' first import."""
    from .kernel_cases import SMALL, all_cases

    device = torch.device("cpu")
    cases = [case for case in all_cases(SMALL) if chosen(case.key, only)]
    return [row for case in cases for row in run_case(case, device, torch.float16, None, None, False)]


def chosen(key: str, only: list[str] | None) -> bool:
    return bool(suite.chosen([key], only))


def child(arguments: argparse.Namespace) -> int:
    """Run cases and append what is found to a file, a line of JSON each; returns LOST when the GPU can no longer be used."""
    from .kernel_cases import REAL, all_cases

    # A backward is timed again and again on one forward, which buffers given away would not survive.
    functorch_config.donated_buffer = False
    warnings.simplefilter(
        "ignore"
    )  # of operations that have no deterministic version, in the check that fills new tensors
    start = time.monotonic()
    device = torch.device("cuda")
    done = set(arguments.done)
    with arguments.child.open("a") as file:

        def write(found: Row) -> None:
            file.write(json.dumps(found) + "\n")
            file.flush()

        timer = Timer(device)
        ceilings = measure_ceilings(timer)
        environment = record.environment(device, arguments.commit)
        write({"environment": environment, "ceilings": dataclasses.asdict(ceilings)})
        print(
            f"{environment['device']}, torch {environment['packages']['torch']}; copy {ceilings.bytes_per_second / 1e9:.0f} GB/s, "
            f"product {ceilings.flops_per_second / 1e12:.0f} TFLOP/s",
            flush=True,
        )
        for case in all_cases(REAL):
            if case.key in done or not chosen(case.key, arguments.only):
                continue
            if time.monotonic() - start > arguments.seconds:
                write({"skipped": case.key})
                continue
            write({"started": case.key})
            try:
                for row in run_case(case, device, torch.bfloat16, timer, ceilings, arguments.vary):
                    show(row)
                    write({"row": row})
                    if row.get("context_lost"):
                        return LOST
            except Exception as error:
                row = {
                    "op": case.op,
                    "shape": case.shape,
                    "impl": "case",
                    "error": f"{type(error).__name__}: {error}"[:400],
                }
                show(row)
                write({"row": row})
                if not alive():
                    return LOST
            torch.cuda.empty_cache()
        if chosen("attention", arguments.only) and "attention" not in done:
            if time.monotonic() - start > arguments.seconds:
                write({"skipped": "attention"})
            else:
                write({"started": "attention"})
                write({"attention": measure_attention(device)})
    return 0


def measure_attention(device: torch.device) -> Row:
    """Every attention implementation at the shapes of adaptation and of sampling, and which to choose."""
    from ..kernels.attention import choose, measure
    from .kernel_cases import REAL

    (_, *adapted), *sampled = REAL.batches
    rows = measure(shapes_of([adapted], REAL), device, torch.bfloat16, training=True)
    rows += measure(shapes_of([batch for _, *batch in sampled], REAL), device, torch.bfloat16, training=False)
    for row in rows:
        kind = "training" if row["training"] else "forward"
        found = f"{row['milliseconds']:8.4f} ms" if "milliseconds" in row else row["refused"]
        print(f"{'attention':28} {row['shape']:22} {row['backend']:10} {kind:8} {found}", flush=True)
    return {"rows": rows, "choice": dataclasses.asdict(choose(rows))}


def shapes_of(batches: list[Any], sizes: "Sizes") -> list[Any]:
    from ..kernels.attention import self_attention_shapes

    heads, dim = sizes.heads, sizes.dim // sizes.heads
    return [shape for samples, grid in batches for shape in self_attention_shapes(samples, grid, heads, dim)]


def run_all(
    arguments: argparse.Namespace, program: list[str], save: Callable[[Row], object] = lambda result: None
) -> Row:
    """Run the cases in other processes of `program`, as many as it takes; `save` is given all that is known, again and again."""
    result: Row = {"environment": None, "ceilings": [], "rows": [], "skipped": [], "attention": None}
    done: list[str] = []
    end = time.monotonic() + arguments.seconds
    while True:
        left = end - time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows"
            path.touch()
            command = [*program, "--child", str(path)]
            command += ["--seconds", f"{left:.0f}", *(["--vary"] if arguments.vary else [])]
            command += ["--commit", arguments.commit] if arguments.commit else []
            command += ["--only", *arguments.only] if arguments.only else []
            command += ["--done", *done] if done else []
            process = subprocess.Popen(command)
            while (status := waited(process)) is None:
                save(gathered(result, path)[0])
                if time.monotonic() > end + 60:
                    process.kill()
            result, started = gathered(result, path)
        save(result)
        if status == 0:
            return result
        if status != LOST:
            at = started[-1] if started else "start"
            row = {"op": at, "shape": "", "impl": "process", "error": f"the process ended with status {status}"}
            show(row)
            result["rows"].append(row)
            save(result)
        if not started or started[-1] == "attention" or end - time.monotonic() < 20:
            return result
        done += started


def waited(process: "subprocess.Popen[bytes]") -> int | None:
    """The process's exit status, or None after some seconds."""
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return None


def gathered(before: Row, path: Path) -> tuple[Row, list[str]]:
    """What was known and what a process has written so far; and the cases that it started. A last line may be half written."""
    lines = path.read_text().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    result = dict(before)
    for key, many in (("row", "rows"), ("skipped", "skipped"), ("ceilings", "ceilings")):
        result[many] = before[many] + [r[key] for r in records if key in r]
    for key in ("environment", "attention"):
        result[key] = next((r[key] for r in records if key in r), before[key])
    return result, [r["started"] for r in records if "started" in r]


def main() -> None:
    parser = suite.parser("kernels", __doc__, minutes=SECONDS / 60)
    parser.add_argument("--vary", action="store_true", help="also other block sizes")
    parser.add_argument("--seconds", type=float, help="as --minutes, in seconds")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--done", nargs="+", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or 60 * arguments.minutes
    if arguments.child:
        sys.exit(child(arguments))

    def save(result: Row) -> None:
        if arguments.out and result["environment"]:
            rows, found = result["rows"], result.get("attention")
            rows = [*rows, {"row": "attention", "backends": found["rows"]}] if found else rows
            more = {key: result[key] for key in ("ceilings", "skipped", "attention") if result.get(key)}
            record.write(arguments.out, "kernels", result["environment"], rows, **more)

    if arguments.list:
        from .kernel_cases import REAL, all_cases

        print("\n".join(case.key for case in all_cases(REAL)))
        return
    if arguments.check:
        rows = check_all(arguments.only)
        for row in rows:
            show(row)
        result: Row = {"environment": record.environment(torch.device("cpu"), arguments.commit), "rows": rows}
        save(result)
    else:
        suite.device(arguments.check)
        name = __spec__.name if __spec__ else "vidtta.bench.kernels"
        result = run_all(arguments, [sys.executable, "-m", name], save)
    suite.finish(result["rows"])


if __name__ == "__main__":
    main()
