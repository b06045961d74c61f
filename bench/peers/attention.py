"""An attention package at the shapes of adapting and of sampling, beside PyTorch's own.

Run: python -m vidtta.bench.peers.attention PACKAGE [--out FILE.json] [--only NAME ...]     (needs a GPU)
     PACKAGE: flash-attn, flash-attn-4 or xformers

Each result is held against float32 with every score in memory, on the first sequence; what errs further than kernels/attention.py
allows has no time. `ratio` is how many times longer PyTorch's fastest back end took.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import record, suite
from ..suite import Absent, Row
from ..timing import Ceilings, Timer, measure_ceilings
from . import need, version_of

# package -> the module that it installs, the function in it, and how to get it.
PACKAGES = {
    "flash-attn": ("flash_attn", "flash_attn_func", "pip install flash-attn --no-build-isolation"),
    "flash-attn-4": ("flash_attn.cute.interface", "flash_attn_func", "pip install flash-attn-4"),
    "xformers": ("xformers.ops", "memory_efficient_attention", "pip install xformers"),
}
OURS = ("cudnn", "flash", "efficient")


def load(package: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """softmax(q k^T / sqrt(d)) v of [B, N, H, d]; raises Absent."""
    module, name, how = PACKAGES[package]
    need(module.split(".")[0], how)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise Absent(f"{package} {version_of(package)} cannot be imported: {error}; {how}") from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


@dataclass
class Bench:
    """What the rows run on. times: milliseconds of PyTorch's fastest back end, by row."""

    package: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    device: torch.device
    timer: Timer | None
    ceilings: Ceilings | None
    times: dict[str, float] = field(default_factory=dict)


def row_of(shape: Any, training: bool) -> Callable[[Bench], Row]:
    """The package at one shape; without a timer it is only checked."""
    from ...kernels.attention import LARGEST_ERROR
    from ...kernels.attention import attend as ours

    def run(bench: Bench) -> Row:
        dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
        generator = torch.Generator(bench.device).manual_seed(0)

        def rand(length: int) -> Tensor:
            size = (shape.batch, length, shape.heads, shape.dim)
            return torch.randn(size, generator=generator, device=bench.device).to(dtype).requires_grad_(training)

        q, k, v, dout = rand(shape.queries), rand(shape.keys), rand(shape.keys), rand(shape.queries).detach()

        def step(attend: Callable[..., Tensor], *qkv: Tensor, dout: Tensor = dout) -> list[Tensor]:
            with torch.set_grad_enabled(training):
                out = attend(*qkv)
            return [out.detach(), *(torch.autograd.grad(out, qkv, dout) if training else ())]

        wide = [t[:1].detach().float().requires_grad_(training) for t in (q, k, v)]
        truth = step(lambda *t: ours(*t, backend="math"), *wide, dout=dout[:1].float())
        found = step(bench.attend, q, k, v)
        errors = [((a[:1].float() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]
        if not max(errors) <= LARGEST_ERROR:
            raise ArithmeticError(f"relative error {max(errors):.2g} from float32, allowed {LARGEST_ERROR}")
        row: Row = {"peer": f"{bench.package} {version_of(bench.package)}", "against": {"error": max(errors)}}
        if bench.timer is None or bench.ceilings is None:
            return row
        timing = bench.timer.measure(lambda: lambda: step(bench.attend, q, k, v))
        fastest = {}
        for name in OURS:
            try:
                fastest[name] = bench.timer.measure(
                    lambda name=name: lambda: step(lambda *t: ours(*t, backend=name), q, k, v)
                ).milliseconds
            except RuntimeError as error:
                row[f"{name}_refused"] = suite.reason(error)
        moved = (4 if not training else 12) * q.numel() * dtype.itemsize
        flops = (4 if not training else 12) * shape.batch * shape.queries * shape.keys * shape.heads * shape.dim
        row |= {
            "ms": timing.milliseconds,
            "times": list(timing.times),
            "peak_gib": timing.peak / 2**30,
            "how": timing.how,
        }
        row |= {"pytorch": fastest, "ratio": min(fastest.values()) / timing.milliseconds} if fastest else {}
        return row | bench.ceilings.figures(timing.milliseconds, moved, flops)

    return run


def rows_of(package: str, small: bool) -> dict[str, Callable[[Bench], Row]]:
    """By name: forward at every shape, and forward with backward at those that are adapted on."""
    from ...kernels.attention import self_attention_shapes
    from ..kernel_cases import REAL, SMALL

    sizes = SMALL if small else REAL
    found: dict[str, Callable[[Bench], Row]] = {}
    for index, (_, samples, grid) in enumerate(sizes.batches):
        for shape in self_attention_shapes(samples, grid, sizes.heads, sizes.dim // sizes.heads):
            for training in (True, False) if index == 0 else (False,):
                found[f"{package} {shape.key} {'training' if training else 'forward'}"] = row_of(shape, training)
    return found


def main() -> None:
    parser = suite.parser("peers.attention", __doc__, minutes=3.0)
    parser.add_argument("package", choices=list(PACKAGES))
    arguments = parser.parse_args()
    package, device = arguments.package, suite.device(arguments.check)
    rows = rows_of(package, arguments.check)
    names = suite.chosen(list(rows), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return
    about = record.environment(device, arguments.commit)

    def write(done: list[Row]) -> None:
        if arguments.out:
            record.write(arguments.out, "peers", about, done)

    try:
        attend = load(package)
    except Absent as error:
        absent: Row = {"row": package, "absent": str(error)}
        print(suite.line(absent), flush=True)
        write([absent])
        return
    timer = None if arguments.check else Timer(device)
    bench = Bench(package, attend, device, timer, measure_ceilings(timer) if timer else None)
    suite.finish(suite.run(rows, names, bench, 60 * arguments.minutes, write))


if __name__ == "__main__":
    main()
