"""The end of a sub-layer: x + gate * h, where h may come in window order and may still lack its low-rank addition.

`gate_residual`       one pass over x and h. With windows, h is read from where attention left it: nothing is copied back first.
`lora_gate_residual`  output projection, low-rank addition, gate and residual: the library's product a W^T + b, a skinny product
                      z = a A^T, and one pass x + gate * (h + z (s B)^T). Its backward makes [dh, dz] in one pass, dh = gate * dout
                      in window order and dz = dh (s B), so that the gradient of a is one product, [dh, dz] [W; A].
Axes: B samples, N tokens, D outputs, K inputs of the projection, R columns that a rank takes (common.padded_rank).
"""

# pyright: reportUnboundVariable=false, reportGeneralTypeIssues=false
# (a kernel gives some names a value only under a constexpr condition)

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .column_sums import column_sums
from .common import block_for, cdiv, check, check_runs, jit, padded_rank
from .lora_linear import outer_product, scaled_up, skinny_product
from .windows import WINDOW, Grid, ungroup_windows, window_row

BLOCK_N = 32
BLOCK_D = 128
MOST_PARTS = 4  # that a projection's rows come in: as many as a grid has regions of equal windows


def gate_residual_reference(x: Tensor, h: Tensor, gate: Tensor, windows: Grid | None = None) -> Tensor:
    """The mathematics, in whatever dtype the inputs have."""
    if windows is not None:
        h = ungroup_windows(h.flatten(0, 1), x.shape[0], windows)
    return x + gate * h


def lora_gate_residual_reference(
    x: Tensor, a: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float, gate: Tensor,
    windows: Grid | None = None,
) -> Tensor:  # fmt: skip
    """What projection, adapter, gate and residual compute apart."""
    h = F.linear(a, weight, bias) + scale * F.linear(F.linear(a, down.to(a.dtype)), up.to(a.dtype))
    return gate_residual_reference(x, h, gate, windows)


@jit
def _rows(N, BLOCK_N: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WINDOW: tl.constexpr):
    """A program's rows of x and of h, and which are real."""
    sample = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = sample * N + n
    of_h = row
    if WINDOW > 0:
        of_h = window_row(row, tl.num_programs(1), FRAMES, ROWS, COLS, WINDOW)
    return row.to(tl.int64)[:, None], of_h.to(tl.int64)[:, None], (n < N)[:, None]


@jit
def _forward_kernel(
    x_ptr, h_ptr, gate_ptr, z_ptr, up_ptr, out_ptr, N, rank,
    D: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, of_h, real = _rows(N, BLOCK_N, FRAMES, ROWS, COLS, WINDOW)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = real & (d < D)
    x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + of_h * D + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + tl.program_id(1).to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
    if R > 0:
        r = tl.arange(0, R)
        z = tl.load(z_ptr + of_h * R + r, mask=real, other=0.0)
        up = tl.load(up_ptr + d[None, :] * rank + r[:, None], mask=(d < D)[None, :] & (r < rank)[:, None], other=0.0)
        h += tl.dot(z, up, input_precision="ieee")
    tl.store(out_ptr + row * D + d, (x + gate * h).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dout_ptr, h_ptr, gate_ptr, z_ptr, up_ptr, dh_ptr, dgate_ptr, N, rank,
    D: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FRAMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, of_h, real = _rows(N, BLOCK_N, FRAMES, ROWS, COLS, WINDOW)
    sample = tl.program_id(1).to(tl.int64)
    if R > 0:
        r = tl.arange(0, R)
        z = tl.load(z_ptr + of_h * R + r, mask=real, other=0.0)
        dz = tl.zeros((BLOCK_N, R), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = real & (d < D)
        dout = tl.load(dout_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + sample * D + d, mask=d < D, other=0.0).to(tl.float32)
        dh = (gate * dout).to(dh_ptr.dtype.element_ty)
        tl.store(dh_ptr + of_h * (D + R) + d, dh, mask=inside)
        if R > 0:
            up = tl.load(
                up_ptr + d[:, None] * rank + r[None, :], mask=(d < D)[:, None] & (r < rank)[None, :], other=0.0
            )
            dz += tl.dot(dh, up, input_precision="ieee")
        if GATE:
            h = tl.load(h_ptr + of_h * D + d, mask=inside, other=0.0).to(tl.float32)
            if R > 0:
                h += tl.dot(z, tl.trans(up), input_precision="ieee")
            at = (sample * tl.num_programs(0) + tl.program_id(0)) * D + d
            tl.store(dgate_ptr + at, tl.sum(dout * h, 0), mask=d < D)
    if R > 0:
        tl.store(dh_ptr + of_h * (D + R) + D + r, dz.to(dh_ptr.dtype.element_ty), mask=real)


def _options(D: int, windows: Grid | None) -> dict[str, int]:
    frames, rows, cols = windows or (1, 1, 1)
    return {
        "D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": block_for(D, BLOCK_D), "num_warps": 4,
        "FRAMES": frames, "ROWS": rows, "COLS": cols, "WINDOW": WINDOW if windows else 0,
    }  # fmt: skip


def _forward(x: Tensor, h: Tensor, gate: Tensor, z: Tensor | None, up: Tensor | None, windows: Grid | None) -> Tensor:
    B, N, D = x.shape
    out = torch.empty_like(x)
    options = _options(D, windows)
    R, rank = (0, 0) if z is None or up is None else (z.shape[1], up.shape[1])
    _forward_kernel[(cdiv(N, BLOCK_N), B, cdiv(D, options["BLOCK_D"]))](
        x, h, gate, x if z is None else z, x if up is None else up, out, N, rank, R=R, **options
    )
    return out


def _backward(
    dout: Tensor, h: Tensor | None, gate: Tensor, z: Tensor | None, up: Tensor | None, windows: Grid | None
) -> tuple[Tensor, Tensor | None]:
    """[dh, dz], [B, N, D + R] in h's order, and the gate's gradient if h is given."""
    B, N, D = dout.shape
    R, rank = (0, 0) if z is None or up is None else (z.shape[1], up.shape[1])
    dh = dout.new_empty(B, N, D + R)
    programs = cdiv(N, BLOCK_N)
    parts = dout.new_empty(B, 1 if h is None else programs, D, dtype=torch.float32)
    _backward_kernel[(programs, B)](
        dout, dout if h is None else h, gate, dout if z is None else z, dout if up is None else up, dh, parts, N, rank,
        R=R, GATE=h is not None, **_options(D, windows),
    )  # fmt: skip
    return dh, None if h is None else column_sums(parts, gate.dtype).unsqueeze(1)


def joined_rows(parts: Sequence[Tensor]) -> Tensor:
    """Rows that follow one another, [rows, K] or with axes before, as one matrix."""
    rows = [part.flatten(0, -2) for part in parts]
    return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, gate: Tensor, windows: Grid | None) -> Tensor:
        x, h, gate = x.contiguous(), h.contiguous(), gate.contiguous()
        # Only the gate's own gradient needs h again.
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, gate)
        ctx.windows = windows
        return _forward(x, h, gate, None, None, windows)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        h, gate = ctx.saved_tensors
        dh, dgate = _backward(dout.contiguous(), h, gate, None, None, ctx.windows)
        return dout, dh, dgate, None


class _LoRAGateResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float, gate: Tensor,
        windows: Grid | None, first: Tensor, second: Tensor | None, third: Tensor | None, fourth: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # As many parameters as MOST_PARTS: with `*parts` torch.compile, without gradients, drops ctx for some numbers of them.
        parts = [part for part in (first, second, third, fourth) if part is not None]
        x, gate, rows = x.contiguous(), gate.contiguous(), joined_rows(parts)
        low, high = down.to(x.dtype), scaled_up(up, scale, x.dtype)
        h = F.linear(rows, weight, bias)
        z = skinny_product(rows, low.T)
        # The parts, which whoever made them keeps anyway, and not the rows that they join to.
        ctx.save_for_backward(weight, low, high, z, gate, h if ctx.needs_input_grad[6] else None, *parts)
        ctx.windows, ctx.scale, ctx.dtypes = windows, scale, (down.dtype, up.dtype)
        return _forward(x, h, gate, z, high, windows)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, low, high, z, gate, h, *parts = ctx.saved_tensors
        D, rank, R = dout.shape[2], low.shape[0], z.shape[1]
        dh, dgate = _backward(dout.contiguous(), h, gate, z, high, ctx.windows)
        dh = dh.flatten(0, 1)
        low = low if rank == R else F.pad(low, (0, 0, 0, R - rank))  # which copies even for nothing
        stacked = torch.cat([weight, low])  # [D + R, K]
        dparts: list[Tensor | None] = [None] * MOST_PARTS
        if any(ctx.needs_input_grad[8:]):
            da = (dh @ stacked).split([len(part.flatten(0, -2)) for part in parts])
            dparts[: len(parts)] = [d.view(part.shape) for d, part in zip(da, parts, strict=True)]
        ddown = outer_product(joined_rows(parts), dh[:, D:])[:, :rank].T.to(ctx.dtypes[0])
        dup = outer_product(dh[:, :D], z, ctx.scale)[:, :rank].to(ctx.dtypes[1])
        return dout, None, None, ddown, dup, None, dgate, None, *dparts


def _check_rows(name: str, x: Tensor, other: Tensor, what: str, width: int, gate: Tensor, windows: Grid | None) -> None:
    B, N, D = x.shape
    check(other.shape == (B, N, width), f"{name}: {what} is {list(other.shape)}, x {[B, N, D]} needs {[B, N, width]}")
    check(gate.shape == (B, 1, D), f"{name}: gate is {list(gate.shape)}, x {[B, N, D]} needs {[B, 1, D]}")
    check(windows is None or windows.tokens == N, f"{name}: windows are {windows}, x has {N} tokens")


def _check_projection(
    name: str, x: Tensor, parts: Sequence[Tensor], weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, gate: Tensor,
    windows: Grid | None,
) -> None:  # fmt: skip
    D, K = weight.shape
    check_runs(name, x, *parts, weight, bias, gate)
    check(x.shape[2] == D, f"{name}: x is {list(x.shape)}, weight {[D, K]} needs [B, N, {D}]")
    _check_rows(name, x, x, "x", D, gate, windows)
    rows = x.shape[0] * x.shape[1]
    check(1 <= len(parts) <= MOST_PARTS, f"{name}: a comes in {len(parts)} parts, may in 1 to {MOST_PARTS}")
    check(
        all(part.shape[-1] == K for part in parts) and sum(part.shape[:-1].numel() for part in parts) == rows,
        f"{name}: a is {' and '.join(str(list(part.shape)) for part in parts)}, x {list(x.shape)} needs {rows} rows of {K}",
    )
    rank = up.shape[1]
    padded_rank(rank)
    check(
        bias.shape == (D,) and up.shape == (D, rank) and down.shape == (rank, K),
        f"{name}: bias, down, up are {list(bias.shape)}, {list(down.shape)}, {list(up.shape)}; "
        f"weight {[D, K]} needs {[D]}, [r, {K}], [{D}, r]",
    )
    check(down.device == up.device == x.device, f"{name}: down and up must be on {x.device}")
    check(
        not (torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)),
        f"{name}: weight and bias must be frozen; to train them use F.linear and gate_residual",
    )


def gate_residual(x_BND: Tensor, h_BND: Tensor, gate_B1D: Tensor, windows: Grid | None = None) -> Tensor:
    """x + gate * h, [B, N, D]; differentiable in all three.

    One dtype for all. windows: the token grid, where the rows of h (all B * N of them) are grouped by window (windows.py).
    Raises ValueError when shapes, dtypes or devices disagree.
    """
    check_runs("gate_residual", x_BND, h_BND, gate_B1D)
    _check_rows("gate_residual", x_BND, h_BND, "h", x_BND.shape[2], gate_B1D, windows)
    return _GateResidual.apply(x_BND, h_BND, gate_B1D, windows)  # type: ignore[return-value]


def lora_gate_residual(
    x_BND: Tensor,
    a_BNK: Tensor | Sequence[Tensor],
    weight_DK: Tensor,
    bias_D: Tensor,
    down_rK: Tensor,
    up_Dr: Tensor,
    scale: float,
    gate_B1D: Tensor,
    windows: Grid | None = None,
) -> Tensor:
    """x + gate * (a W^T + b + scale (a A^T) B^T), [B, N, D]; differentiable in x, a, down, up and gate: W and b are frozen.

    One dtype for all but down (A) and up (B), which may be float32 masters; r from 1 to 64. windows: as in `gate_residual`,
    of the rows of a, which may come in up to four parts that follow one another, [..., K] each: what attention gave for each
    region. These are then kept for the backward. Raises ValueError when shapes, dtypes or devices disagree, or when weight or bias
    want a gradient.
    """
    parts = [a_BNK] if isinstance(a_BNK, Tensor) else list(a_BNK)
    _check_projection("lora_gate_residual", x_BND, parts, weight_DK, bias_D, down_rK, up_Dr, gate_B1D, windows)
    missing = [None] * (MOST_PARTS - len(parts))
    return _LoRAGateResidual.apply(  # type: ignore[return-value]
        x_BND, weight_DK, bias_D, down_rK, up_Dr, scale, gate_B1D, windows, *parts, *missing
    )
