"""Compile every kernel for Hopper's machine code at the model's widths, on a machine that need not have a GPU.

Run: python -m tests.kernels.hopper [OP ...]
It calls the operations of the bench on the CPU with a driver that answers "capability 9.0" and a launch that only compiles, so
that what it compiles is what would be launched. What comes out is not run: this finds what Triton refuses and tables what the
assembler gave (registers, spilled bytes, shared memory, products through wgmma or mma); it checks no number.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are decorated

import torch
import torch.utils._triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vidtta.bench.kernel_cases import SMALL, Sizes, all_cases
from vidtta.bench.kernels import with_gradients
from vidtta.kernels import common
from vidtta.kernels.windows import Grid

SIZES = Sizes(
    batches=(("hopper", 1, Grid(1, 30, 40)),),
    draws=2,
    counted=(4800,),
    chunk=((128, 2, 8, 12), (512, 2, 8, 12)),
    network=SMALL.network,
)


LIBRARY = ("compiled", "two of flash")
"""Implementations beside the kernels."""
OPERATIONS = ("triton_kernel", "autograd_function", "vidtta.")
"""What the compiler calls a kernel, one with gradients of its own, and one behind an operator of our own."""


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def assembled(kernel: Any) -> dict[str, Any]:
    """Registers and spilled bytes, as the assembler reports them, and the kinds of instruction."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found.group(1)) if found else 0

    return {
        "warps": kernel.metadata.num_warps,
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill stores"),
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4|cp\.async\.cg", ptx)),
    }


def compile_all(only: list[str]) -> list[dict[str, Any]]:
    """A row for every kernel that is compiled, or for an operation that could not be."""
    driver.set_active(Hopper())  # type: ignore[arg-type]
    common.INTERPRETED = True  # lets tensors on the CPU through; no launch happens
    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    launch = JITFunction.run
    case: Any = None

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            name = f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}"
            rows.append({"kernel": name, "for": case.key, **assembled(kernel)})
        return kernel

    JITFunction.run = compile_only
    for case in all_cases(SIZES):
        if only and not any(case.op.startswith(op) for op in only):
            continue
        inputs = case.make(torch.device("cpu"), torch.bfloat16)
        for name, function in case.impls.items():
            if name in LIBRARY:
                continue
            try:
                with_gradients(function, inputs, case.trained, 1)
            except Exception as error:
                rows.append({"kernel": name, "for": case.key, "error": f"{type(error).__name__}: {error}"[:2000]})
    return rows


class Captured(Exception):
    """The compiler took the whole call, forward and backward, as one graph."""


def trace_all(only: list[str]) -> list[dict[str, Any]]:
    """A row for every operation: whether torch.compile(fullgraph=True) takes it as one graph, with its gradients and without."""
    driver.set_active(Hopper())  # type: ignore[arg-type]
    common.INTERPRETED = True
    torch.utils._triton.has_triton = lambda *_: True  # it looks for a GPU; without one kernels are not recognised

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]

        def stop(*_: Any) -> Any:
            raise Captured(sum(any(kind in name for kind in OPERATIONS) for name in names))

        return stop

    rows: list[dict[str, Any]] = []
    for case in all_cases(SIZES):
        if not case.traced or (only and not any(case.op.startswith(op) for op in only)):
            continue
        inputs = case.make(torch.device("cpu"), torch.bfloat16)
        leaves = [t.detach().requires_grad_(i in case.trained) for i, t in enumerate(inputs)]
        for name, gradients in product(case.impls, (True, False) if case.trained else (False,)):
            if name in LIBRARY:
                continue
            torch._dynamo.reset()
            row: dict[str, Any] = {"traced": name, "for": case.key, "gradients": gradients}
            try:
                with torch.set_grad_enabled(gradients):
                    torch.compile(case.impls[name], fullgraph=True, dynamic=False, backend=backend)(*leaves)
            except Captured as found:
                row["operations"] = found.args[0]
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
            rows.append(row)
    return rows


if __name__ == "__main__":
    for row in compile_all(sys.argv[1:]) + trace_all(sys.argv[1:]):
        print(json.dumps(row))
