"""GELU (tanh) and the trained linear layer after it, which keep for the backward what enters GELU, and not what leaves it.

Plain autograd keeps both, four widths of the network each: the one for GELU's gradient, the other for the weight's. Here GELU runs
once more in the backward, on the same numbers and so to the same bits. Operators of their own, because a compiler would find
that the two are equal and keep the first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("vidtta::gelu_linear", mutates_args=())
def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x) W^T + b, [..., N], the bits of F.gelu and F.linear; differentiable in all. x: [..., K]; weight: [N, K]; bias: [N]."""
    return F.linear(F.gelu(x, approximate="tanh"), weight, bias)


@gelu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("vidtta::gelu_linear_gradients", mutates_args=())
def _gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias, by the products that autograd takes."""
    rows = dy.flatten(0, -2)
    dgelu = (rows @ weight).view(x.shape)
    dx = torch.ops.aten.gelu_backward(dgelu, x, approximate="tanh")
    del dgelu
    dweight = rows.t() @ F.gelu(x, approximate="tanh").flatten(0, -2)
    return dx, dweight, rows.sum(0)


@_gradients.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dy, *ctx.saved_tensors)  # type: ignore[return-value]


gelu_linear.register_autograd(_backward, setup_context=_keep)
