"""How kernels are tested: truth is float64, the yardstick is what plain PyTorch errs in the kernel's own dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the raw bits of bfloat16 in tl.dot, so float16 stands for it on a CPU.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
# "compiled" is torch.compile(fullgraph=True) around a kernel that is compiled anyway; the interpreter cannot be traced.
MODES = ["eager", "compiled"] if DEVICE == "cuda" else ["eager"]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_mode = pytest.mark.parametrize("mode", MODES)


def assert_as_accurate(
    actual: Tensor, truth: Tensor, baseline: Tensor, name: str = "", *, terms: int = 1, largest: float = 0.0
) -> None:
    """`actual` may sit at most twice as far from the float64 truth as plain PyTorch does, plus one ulp of the largest value.

    terms: how many products a number is the sum of. A kernel adds them to one float32 accumulator, which errs by about their root
    in ulps (Higham & Mary 2019, doi:10.1137/18M1226312), while a card's library splits a long sum. Allowed on a card alone;
    in bfloat16 it is nothing.
    largest: the size of terms that cancel to a small truth.
    """
    assert actual.shape == truth.shape, f"{name}: {actual.shape} for {truth.shape}"
    assert actual.isfinite().all(), f"{name}: not finite"
    if actual.numel() == 0:
        return
    ulp = torch.finfo(baseline.dtype).eps * truth.abs().max()
    spread = (terms - 1) ** 0.5 if actual.is_cuda else 0.0
    summed = torch.finfo(torch.float32).eps * (spread * truth.abs().max() + largest)
    error, allowed = (actual.double() - truth).abs().max(), 2 * (baseline.double() - truth).abs().max() + ulp + summed
    assert error <= allowed, f"{name}: max error {error:.2e}, allowed {allowed:.2e}"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the engine compiles its layers (engine/models/paths.py): one graph, shapes as they are. Forgets what earlier tests
    compiled, for the compiler gives up on a function after a few shapes."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def run(function: Callable[..., Any], inputs: list[Tensor], trained: list[int], douts: list[Tensor]) -> list[Tensor]:
    """Outputs of function(*inputs) and the gradients of the inputs numbered in `trained`, for output gradients `douts`."""
    leaves = [t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(inputs)]
    outs = function(*leaves)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    for out, dout in zip(outs, douts, strict=True):
        assert out.shape == dout.shape, f"output {list(out.shape)}, expected {list(dout.shape)}"
    grads = torch.autograd.grad(
        outs, [leaves[i] for i in trained], [d.to(o.dtype) for d, o in zip(douts, outs, strict=True)]
    )
    return [t.detach() for t in (*outs, *grads)]


def check(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: list[Tensor],
    *,
    trained: list[int],
    douts: list[Tensor],
    mode: str = "eager",
    terms: int = 1,
    largest: float = 0.0,
) -> None:
    """Outputs and gradients of a kernel against float64; no input or output gradient may be written to."""
    before = [t.clone() for t in (*inputs, *douts)]
    function = ours if mode == "eager" else compiled(ours)
    actual = run(function, inputs, trained, douts)
    for t, kept in zip((*inputs, *douts), before, strict=True):
        assert torch.equal(t, kept), "an input was overwritten"
    truth = run(reference, [t.double() for t in inputs], trained, [d.double() for d in douts])
    baseline = run(reference, inputs, trained, douts)
    for i, (a, t, b) in enumerate(zip(actual, truth, baseline, strict=True)):
        name = f"output {i}" if i < len(douts) else f"gradient of input {trained[i - len(douts)]}"
        assert_as_accurate(a, t, b, name, terms=terms, largest=largest)


def half_a_step(x: Tensor, scales: Tensor) -> Tensor:
    """Of e4m3 at each number: 2**-4 of it, and 2**-10 below the smallest normal, 2**-6; in units of x. A hair more, as x over its
    scale is rounded to float32 first."""
    steps = (x / scales).abs().clamp(min=2.0**-6).log2().floor().exp2() * 2.0**-4
    return steps * scales * (1 + 1e-6) + (x / scales).abs() * scales * 2e-7


def rand(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1009 + len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)
