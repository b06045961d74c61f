"""AdamW on the final-layer delta with loss and gradient from kernels/delta_features.py, every step on the device.

A step is some thirty tiny launches and one kernel of a fraction of a millisecond, so on a GPU it is captured once as a CUDA
graph and replayed; nothing is asked of the device before the last step. Float32, and the arithmetic of torch's AdamW.
"""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor and fused operations under private names alone)

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.delta_features import linear_loss_and_gradient, pre_loss_and_gradient, prepare, residual_sums
from .optimize import AdamW, Trace

if TYPE_CHECKING:
    from .delta import CachedDraw, DeltaFinalLayer

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Loss and gradient for every draw's delta, [K, D] float32."""


@torch.no_grad()
def draw_objective(layer: "DeltaFinalLayer", used: Tensor, cached: "list[CachedDraw]") -> Objective:
    """The objective of cached draws at the layer's site. used: indices of the outputs that are the velocity."""
    maps = torch.cat([_map(layer, c)[:, used] for c in cached]).contiguous()
    residual = torch.cat([c.residual for c in cached])
    weight = None if bool((cached[0].weight == 1).all()) else cached[0].weight[0].contiguous()
    if layer.site == "pre":
        features = prepare(torch.cat([c.state.tokens for c in cached]), residual, weight, maps)
        return lambda delta: pre_loss_and_gradient(features, delta)
    sums = residual_sums(residual, weight)
    return lambda delta: linear_loss_and_gradient(sums, maps, delta)


def _map(layer: "DeltaFinalLayer", cached: "CachedDraw") -> Tensor:
    """W diag(1 + scale_t) of a draw, or W at site post; [1, out, D] float32."""
    if layer.site != "pre":
        return layer.map_of(cached.state.time)
    _, scale = layer.base.modulation(cached.state.time)
    return layer.base.linear.weight.float() * (1 + scale.float())


@torch.no_grad()
def fit(
    objective: Objective,
    delta_RD: Tensor,
    range_of_draw_K: Tensor,
    settings: AdamW,
    ridge: float = 0.0,
    graph: bool | None = None,
) -> tuple[Trace, Tensor]:
    """Take `settings.steps` steps on objective + ridge |delta|^2, in place on delta [ranges, D] float32; returns also the delta after
    each step, [steps, ranges, D].

    range_of_draw: [K] int64, which row each draw uses. graph: replay a captured step (default: on a GPU).
    Raises FloatingPointError, after the last step, if a loss or gradient was not finite.
    """
    device, steps, s = delta_RD.device, settings.steps, settings
    first, second = torch.zeros_like(delta_RD), torch.zeros_like(delta_RD)
    count = torch.zeros((), device=device)
    losses, norms = (torch.zeros(steps, device=device) for _ in range(2))
    deltas = torch.zeros(steps, *delta_RD.shape, device=device)
    rates = torch.tensor([s.lr * s.rate(step, steps) for step in range(steps)], device=device)
    numbers = torch.arange(steps, device=device)
    member = (range_of_draw_K == torch.arange(len(delta_RD), device=device)[:, None]).float()[:, :, None]  # [R, K, 1]

    def step() -> None:
        loss, gradient_KD = objective(delta_RD[range_of_draw_K])
        gradient = (member * gradient_KD).sum(1)
        if ridge:
            gradient = gradient + 2 * ridge * delta_RD
        norm = gradient.norm()
        now = numbers == count  # which step this is, without asking the device; elementwise, so it can be captured
        losses.copy_(torch.where(now, loss.float(), losses))
        norms.copy_(torch.where(now, norm, norms))
        lr = (rates * now).sum()
        if s.gradient_clip:
            gradient = gradient * (s.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        count.add_(1)
        if s.weight_decay:
            delta_RD.mul_(1 - lr * s.weight_decay)
        first.lerp_(gradient, 1 - s.betas[0])
        second.mul_(s.betas[1]).addcmul_(gradient, gradient, value=1 - s.betas[1])
        root = (second / (1 - s.betas[1] ** count)).sqrt().add_(s.eps)
        delta_RD.sub_(lr * (first / (1 - s.betas[0] ** count)) / root)
        deltas.copy_(torch.where(now[:, None, None], delta_RD, deltas))

    if graph is None:
        graph = device.type == "cuda"
    if graph:
        _replay(step, [delta_RD, first, second, count], steps)
    else:
        for _ in range(steps):
            step()
    found = torch.stack([losses, norms]).tolist()
    if not torch.isfinite(torch.tensor(found)).all():
        raise FloatingPointError("the loss or its gradient is not finite; a smaller lr may help")
    return Trace(steps=steps, losses=found[0], gradient_norms=found[1]), deltas


def _replay(step: Callable[[], Any], state: list[Tensor], times: int) -> None:
    """Capture a step that changes `state` in place, and run it so many times from the state as it is."""
    kept = [t.clone() for t in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what is made at a first call (kernels, handles) must not fall into the capture
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    torch._foreach_copy_(state, kept)
    for _ in range(times):
        captured.replay()
    torch.cuda.current_stream().synchronize()
