"""Gate and residual, from window order too, and with the projection and its low-rank addition before them."""

import pytest
import torch
from torch import Tensor
from vidtta.kernels.gate_residual import (
    gate_residual,
    gate_residual_reference,
    lora_gate_residual,
    lora_gate_residual_reference,
)
from vidtta.kernels.windows import Grid

from tests.kernels.accuracy import DEVICE, check, compiled, every_dtype, every_mode, rand

SCALE = 0.75
# samples, grid, width: one number; odd, with windows that do not divide, past one block of rows; the model's width.
CASES = [(1, Grid(1, 1, 1), 1), (2, Grid(2, 9, 3), 37), (1, Grid(1, 3, 7), 1152)]
frames_and_windows = pytest.mark.parametrize("windowed", [False, True], ids=["frames", "windows"])


@every_mode
@every_dtype
@frames_and_windows
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gate_residual(case, windowed, dtype, mode):
    B, grid, D = case
    windows = grid if windowed else None
    x, h, dout = (rand(B, grid.tokens, D, dtype=dtype, seed=s) for s in range(3))
    check(
        lambda *t: gate_residual(*t, windows=windows),
        lambda *t: gate_residual_reference(*t, windows=windows),
        [x, h, rand(B, 1, D, dtype=dtype, seed=3)],
        trained=[0, 1, 2],
        douts=[dout],
        mode=mode,
    )


@every_mode
@every_dtype
@frames_and_windows
@pytest.mark.parametrize(("case", "K", "rank"), [(CASES[0], 1, 1), (CASES[1], 20, 33), (CASES[2], 48, 16)], ids=str)
def test_projection_with_addition(case, K, rank, windowed, dtype, mode):
    B, grid, D = case
    windows = grid if windowed else None
    weight, bias = rand(D, K, dtype=dtype, scale=K**-0.5, seed=1), rand(D, dtype=dtype, seed=2)

    def ours(x: Tensor, a: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        return lora_gate_residual(x, a, weight, bias, down, up, SCALE, gate, windows)

    def reference(x: Tensor, a: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        return lora_gate_residual_reference(x, a, w, b, down, up, SCALE, gate, windows)

    inputs = [
        rand(B, grid.tokens, D, dtype=dtype),
        rand(B, grid.tokens, K, dtype=dtype, seed=5),
        rand(rank, K, dtype=dtype, scale=K**-0.5, seed=3),
        rand(D, rank, dtype=dtype, scale=rank**-0.5, seed=4),
        rand(B, 1, D, dtype=dtype, seed=6),
    ]
    douts = [rand(B, grid.tokens, D, dtype=dtype, seed=7)]
    check(ours, reference, inputs, trained=[0, 1, 2, 3, 4], douts=douts, mode=mode, terms=max(D, K))


@every_mode
@every_dtype
def test_the_projections_rows_may_come_in_parts(dtype, mode):
    """To the bit what they give together; the parts are kept, and not what they join to."""
    B, grid, D, K, rank = 2, Grid(2, 9, 3), 24, 20, 3
    sizes, kept = [(4, 16), (2, 22)], []
    vectors = [
        rand(rank, K, dtype=dtype, seed=3),
        rand(D, rank, dtype=dtype, seed=4),
        rand(B, 1, D, dtype=dtype, seed=6),
    ]
    weight, bias, x = (rand(*s, dtype=dtype, seed=i) for i, s in enumerate(((D, K), (D,), (B, grid.tokens, D))))
    a = rand(B * grid.tokens, K, dtype=dtype, seed=5)
    assert sum(windows * tokens for windows, tokens in sizes) == len(a)

    def results(*parts: Tensor) -> list[Tensor]:
        def function(x: Tensor, down: Tensor, up: Tensor, gate: Tensor, *parts: Tensor) -> Tensor:
            rows = parts[0].view(B, -1, K) if len(parts) == 1 else parts
            return lora_gate_residual(x, rows, weight, bias, down, up, SCALE, gate, grid)

        leaves = [t.detach().clone().requires_grad_() for t in (x, *vectors, *parts)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            out = (function if mode == "eager" else compiled(function))(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, rand(*x.shape, dtype=dtype, seed=7))]

    together = results(a)
    kept.clear()
    parts = [part.view(*size, K) for part, size in zip(a.split([w * t for w, t in sizes]), sizes, strict=True)]
    *apart, first, second = results(*parts)
    assert all(map(torch.equal, [*apart, torch.cat([first.flatten(0, 1), second.flatten(0, 1)])], together))
    assert first.shape == parts[0].shape
    assert mode == "compiled" or (a.shape not in kept and all(part.shape in kept for part in parts))


def test_a_frozen_gate_keeps_nothing_of_the_branch():
    x, h, gate = rand(1, 4, 8), rand(1, 4, 8).requires_grad_(), rand(1, 1, 8)
    frozen, trained = gate_residual(x, h, gate), gate_residual(x, h, gate.clone().requires_grad_())
    assert frozen.grad_fn.saved_tensors[0] is None  # type: ignore[union-attr]
    assert trained.grad_fn.saved_tensors[0] is not None  # type: ignore[union-attr]


def test_a_closed_gate_is_the_residual_bit_for_bit():
    x = rand(2, 18, 40)
    out = gate_residual(x, rand(2, 18, 40, seed=1), torch.zeros_like(x[:, :1]), Grid(1, 9, 2))
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    ("change", "windows", "message"),
    [
        ({1: (1, 5, 8)}, None, r"a is \[1, 5, 8\]"),
        ({7: (1, 1, 4)}, None, r"gate is \[1, 1, 4\]"),
        ({4: (3, 8)}, None, r"\[3, 8\]"),
        ({}, Grid(1, 2, 2), "x has 6 tokens"),
    ],
)
def test_wrong_shapes_are_named(change, windows, message):
    shapes = {0: (1, 6, 16), 1: (1, 6, 8), 2: (16, 8), 3: (16,), 4: (2, 8), 5: (16, 2), 7: (1, 1, 16)} | change
    t = {i: torch.zeros(shape, device=DEVICE) for i, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        lora_gate_residual(t[0], t[1], t[2], t[3], t[4], t[5], 1.0, t[7], windows)


def test_more_parts_than_a_grid_has_regions_are_refused():
    x, weight, vector, gate = torch.zeros(1, 5, 8), torch.zeros(8, 8), torch.zeros(8), torch.zeros(1, 1, 8)
    low = torch.zeros(2, 8), torch.zeros(8, 2)
    x, weight, vector, gate, *low = (t.to(DEVICE) for t in (x, weight, vector, gate, *low))
    with pytest.raises(ValueError, match="a comes in 5 parts, may in 1 to 4"):
        lora_gate_residual(x, list(x.split(1, dim=1)), weight, vector, *low, 1.0, gate)
