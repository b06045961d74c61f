"""A linear layer and GELU (tanh) in one product: the library applies the activation to the float32 accumulator.

An operator of its own, because a compiler would take the library's call apart again. Without gradients alone.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("vidtta::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), [..., N]. x: [..., K]; weight: [N, K]; bias: [N]."""
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], -1)


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
