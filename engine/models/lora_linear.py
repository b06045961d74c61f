"""A frozen linear layer with a low-rank addition, y = x W^T + b + s (x A^T) B^T (arXiv:2106.09685, section 4.1).

Two ways. Apart: three products, each rounded, as adapters are usually written. Extended: one product with K longer by the rank,
[x, x A^T] [W, s B]^T, so that the addition joins in the float32 accumulator and costs no second pass over the output; its
backward gives the gradients of x and of x A^T in one product too, and makes none for the frozen W. The addition is never
merged into 16-bit weights, which would round small updates away. Where the frozen layer computes in float8 (float8.py) the addition
joins its result, itself in the input's dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.lora_linear import extend_weight, write_up
from .float8 import in_float8


class LoRALinear(nn.Module):
    """A frozen linear layer and its addition. A: [rank, in]; B: [out, rank], both float32.

    extended: storage [W, s B] of the extended way, or None; whoever changes B calls `refresh`.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        device = base.weight.device
        self.A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.extended: Tensor | None = None

    def extend(self) -> None:
        """Switch to the extended way: a second copy of W with room for s B beside it. Takes a rank from 1 to 64."""
        self.extended = extend_weight(self.base.weight.detach(), self.B.shape[1])
        self.refresh()

    def refresh(self) -> None:
        """Bring the extended storage up to B."""
        if self.extended is not None:
            write_up(self.extended, self.B, self.scale)

    @property
    def room(self) -> Tensor:
        """The columns of the extended storage that hold s B."""
        assert self.extended is not None
        start = self.base.in_features
        return self.extended[:, start : start + self.B.shape[1]]

    def added(self, dtype: torch.dtype) -> Tensor:
        """What the layer's weight gains in effect, computed from A and B rounded to `dtype`; [out, in] float32."""
        return self.scale * (self.B.to(dtype).float() @ self.A.to(dtype).float())

    def joined(self, y: Tensor, low: Tensor) -> Tensor:
        """y + s low B^T, of the frozen layer's result and x A^T [..., rank]."""
        rows, z, up = y.flatten(0, -2), low.flatten(0, -2), self.B.to(y.dtype)
        return torch.addmm(rows, z, up.T, alpha=self.scale).view(y.shape)

    def forward(self, x: Tensor) -> Tensor:
        if in_float8(self.base, x):
            return self.joined(self.base(x), F.linear(x, self.A.to(x.dtype)))
        if self.extended is not None:
            return _Extended.apply(x, self.extended, self.base.bias, self.A, self.B, self.scale)  # type: ignore[return-value]
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class _Extended(torch.autograd.Function):
    """Plain operations on any device, which a compiler sees through; B's value is read from the extended weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        A = down.to(x.dtype)
        columns = weight.shape[1] - x.shape[-1]
        z = F.linear(x, A)
        if columns > A.shape[0]:
            z = F.pad(z, (0, columns - A.shape[0]))
        ctx.save_for_backward(x, weight, A, z)
        ctx.scale, ctx.dtypes = scale, (down.dtype, up.dtype)
        return F.linear(torch.cat([x, z], dim=-1), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, z = ctx.saved_tensors
        rank, width = A.shape
        dy = dy.flatten(0, -2)
        both = dy @ weight  # [rows, K + R]: the part of dx through W, and the gradient of x A^T
        dz = both[:, width : width + rank]
        dx = torch.addmm(both[:, :width], dz, A).view(x.shape) if ctx.needs_input_grad[0] else None
        ddown = (dz.mT @ x.flatten(0, -2)).to(ctx.dtypes[0])
        dup = (dy.mT @ z.flatten(0, -2)[:, :rank] * ctx.scale).to(ctx.dtypes[1])
        return dx, None, None, ddown, dup, None
