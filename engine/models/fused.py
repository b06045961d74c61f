"""A layer of STDiT3 on the Triton kernels: the same function as `Layer.forward`, in fewer passes over memory.

    sum, norm, modulation (+ low-rank projection)    one pass           kernels/norm_modulate.py
    qkv, low-rank addition inside                    the library's product, K longer by the rank
    RMS norm, rotation, grouping by window           one pass           kernels/qk_norm_rope.py
    attention                                        a view of each region; nothing is copied on the way in
    proj, low-rank addition, gate, residual          product + one pass kernels/gate_residual.py
    cross-attention, MLP                             plain products; norm and gated residual as above
    full fine-tuning: norm and its linear layer      the norm again in the backward          kernels/norm_linear.py
                      GELU and its linear layer      GELU again in the backward              gelu_linear.py

In float8 (float8.py) the norm writes its rows in float8 for the product that follows (norm_float8_linear.py), and an MLP's hidden state
is quantised in one pass with the activation; a low-rank addition then joins in a product of its own.

What the MLP's norm reads is x and what cross-attention gives, summed there. Each norm gives back the stream that it read, so that in the
backward the gradient that comes along it joins the norm's own in one pass.

Where it rounds less often than the plain path (between norm and modulation, or product and gate) it is the closer of the two.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.common import MAX_RANK
from ...kernels.gate_residual import gate_residual, joined_rows, lora_gate_residual
from ...kernels.lora_linear import lora_linear_extended
from ...kernels.norm_linear import add_norm_linear
from ...kernels.norm_modulate import add_norm_modulate
from ...kernels.qk_norm_rope import qk_norm_rope
from ...kernels.windows import Grid, split_windows
from .again import Again, again
from .attention import DEFAULT, Backends, LayerText, SelfAttention, attend
from .float8 import Linear, in_float8
from .gelu_linear import gelu_linear
from .geometry import Geometry
from .lora_linear import LoRALinear
from .stdit3 import Layer, Mlp


def fused_layer(
    layer: Layer,
    x_BND: Tensor,
    modulation_B6D: Tensor,
    text: LayerText,
    known_text: LayerText | None,
    geometry: Geometry,
    backends: Backends = DEFAULT,
    remade: tuple[Again, ...] = (),
) -> Tensor:
    """As `Layer.forward`, [B, N, D]. Needs a device that the kernels run on. remade: what is computed again in the backward."""
    remade = remade if torch.is_grad_enabled() else ()
    vectors = (layer.scale_shift_table + modulation_B6D).transpose(0, 1).unsqueeze(2).contiguous()  # [6, B, 1, D]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors.unbind(0)
    attn: SelfAttention = layer.attn
    grid = Grid(geometry.frames, geometry.rows, geometry.cols) if attn.windowed else None
    x, qkv = _projected(attn.qkv, x_BND, None, shift_a, scale_a)
    if "rotation" in remade and not _keeps_results(attn):
        a = again(_self_attention, attn, qkv, geometry, grid, backends)
    else:
        a = _self_attention(attn, qkv, geometry, grid, backends)
    x = _added(x, a, attn.proj, gate_a, grid)
    h = layer.cross_attn(x, text, known_text, geometry, backends)
    hidden = not _trained(layer.mlp.fc2) and ("hidden" in remade or ("half_hidden" in remade and attn.windowed))
    if hidden:
        x, h = x + h, None  # what is made again is made of the sum, so that it is kept and not its two terms
    # Under the names of the two terms, so that these are let go.
    x, h, rest = _entered(layer.mlp, x, h, shift_m, scale_m, hidden)
    return gate_residual(x, rest(h), gate_m)


def _frozen(linear: nn.Module) -> nn.Module:
    """The layer itself, without its low-rank addition."""
    return linear.base if isinstance(linear, LoRALinear) else linear


def _trained(linear: nn.Module) -> TypeGuard[nn.Linear]:
    return torch.is_grad_enabled() and isinstance(linear, nn.Linear) and linear.weight.requires_grad


Sum = tuple[Tensor, Tensor]
"""s = x + h, or x where h is None, with which the residual stream goes on; and what was made of its modulated norm."""


def _entered(
    mlp: Mlp, x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, remade: bool
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A sum, how far the MLP of its norm is computed together with it, and the rest of the MLP; where its second product is trained,
    GELU's result is not kept, else with `remade` nothing."""
    if _trained(mlp.fc2):
        fc2 = mlp.fc2
        return *_projected(mlp.fc1, x, h, shift, scale), lambda hidden: gelu_linear(hidden, fc2.weight, fc2.bias)
    if in_float8(_frozen(mlp.fc1), x) or in_float8(mlp.fc2, x):
        if remade:
            return *again(_products, mlp, x, shift, scale), lambda done: done
        return *_projected(mlp.fc1, x, h, shift, scale), mlp.second
    if remade:
        return *again(_hidden, mlp.fc1, x, shift, scale), mlp.fc2
    return *add_norm_modulate(x, h, shift, scale), mlp


def _products(mlp: Mlp, x: Tensor, shift: Tensor, scale: Tensor) -> Sum:
    s, hidden = _projected(mlp.fc1, x, None, shift, scale)
    return s, mlp.second(hidden)


def _hidden(fc1: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Sum:
    s, n = add_norm_modulate(x, None, shift, scale)
    return s, F.gelu(fc1(n), approximate="tanh")


def _projected(linear: nn.Module, x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor) -> Sum:
    """A sum, and the linear layer of its modulated norm, its low-rank addition inside; where it is trained, the norm's result is not
    kept."""
    base = _frozen(linear)
    if isinstance(base, Linear) and in_float8(base, x):
        if not isinstance(linear, LoRALinear):
            return base.product_of_norm(x, h, shift, scale)[:2]
        if (rank := linear.A.shape[0]) <= MAX_RANK:
            s, y, low = base.product_of_norm(x, h, shift, scale, linear.A)
            return s, linear.joined(y, low[..., :rank])
    elif isinstance(linear, LoRALinear) and linear.extended is not None:
        s, n = add_norm_modulate(x, h, shift, scale, linear.A)
        return s, lora_linear_extended(n, linear.extended, linear.base.bias, linear.B, linear.scale)
    if _trained(linear):
        return add_norm_linear(x, h, shift, scale, linear.weight, linear.bias)
    s, n = add_norm_modulate(x, h, shift, scale)
    return s, linear(n)


def _self_attention(
    attn: SelfAttention, qkv_BNE: Tensor, geometry: Geometry, grid: Grid | None, backends: Backends
) -> list[Tensor]:
    """[B, N, D] in parts that follow one another: all, or with a grid the regions of equal windows, [windows, tokens of one, D]; these
    joined here where the projection is trained, whose gradient keeps them so."""
    B, N = qkv_BNE.shape[:2]
    weights, eps = (attn.q_norm.weight, attn.k_norm.weight), attn.q_norm.eps
    results = _keeps_results(attn)
    if grid is None:
        rows = qk_norm_rope(qkv_BNE, *weights, geometry.spatial_cos, geometry.spatial_sin, None, eps, results)
        q, k, v = (t.unflatten(0, (B * geometry.frames, geometry.tokens_per_frame)) for t in rows)
        return [attend(q, k, v, backend=backends.frames).reshape(B, N, -1)]
    rows = qk_norm_rope(qkv_BNE, *weights, geometry.window_cos, geometry.window_sin, grid, eps, results)
    regions = zip(*(split_windows(t, B, grid) for t in rows), strict=True)
    parts = [
        attend(q, k, v, backend=name).flatten(2) for (q, k, v), name in zip(regions, backends.windows, strict=False)
    ]
    return [_joined(parts, B)] if _trained(attn.proj) else parts


def _keeps_results(attn: SelfAttention) -> bool:
    """Whether the backward makes do with the rotated queries and keys, which attention keeps, and the projection is let go: then there is
    nothing to gain from making them again."""
    trained = attn.q_norm.weight.requires_grad or attn.k_norm.weight.requires_grad
    return attn.turns_back and not trained and torch.is_grad_enabled()


def _joined(parts: list[Tensor], samples: int) -> Tensor:
    """As [B, N, D]."""
    return joined_rows(parts).unflatten(0, (samples, -1))


def _added(x: Tensor, a: list[Tensor], proj: nn.Module, gate: Tensor, grid: Grid | None) -> Tensor:
    """x + gate * proj(a), a in window order where there is a grid."""
    if isinstance(proj, LoRALinear) and proj.extended is not None and not in_float8(proj.base, x):
        base = proj.base
        return lora_gate_residual(x, a, base.weight, base.bias, proj.A, proj.B, proj.scale, gate, grid)
    # Also where a rank is more than the kernel takes.
    return gate_residual(x, proj(_joined(a, len(x))), gate, grid)
