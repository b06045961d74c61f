"""The cases of `bench.kernels` for the delta fitted on cached features: its objective, at the sites that need features and at those that
need sums, and what else a step is."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels import delta_features, delta_step
from .kernel_cases import Case, Inputs, Sizes, randn

PRE_VARIANTS = (
    (1, 1, 1584, 1), (1, 1, 1584, 2), (1, 1, 1584, 3), (1, 1, 1584, 6), (1, 1, 1056, 4), (1, 1, 1716, 4), (1, 2, 1320, 4),
    (2, 2, 792, 3), (2, 4, 528, 1), (2, 4, 528, 3), (4, 4, 396, 1), (4, 4, 396, 3), (8, 8, 132, 3),
)  # fmt: skip
"""Tokens and warps of a program, programs (as many as registers allow at once), and stages of the loop over tokens at site pre."""


def delta_cases(s: Sizes) -> Iterator[Case]:
    """One step of the delta at site pre: loss and gradient together. The map from features to outputs is float32 in all."""
    K, D, C = s.draws, s.dim, s.outputs
    for N in s.counted:

        def make(device: torch.device, dtype: torch.dtype, N: int = N) -> Inputs:
            features, residual = randn(device, dtype, K, N, D, scale=3), randn(device, torch.float32, K, N, C)
            maps = randn(device, torch.float32, K, C, D, scale=D**-0.5)
            kept = delta_features.prepare(features, residual, None, maps)
            delta = randn(device, torch.float32, K, D, scale=0.3)
            centred = delta - delta.mean(-1, keepdim=True)
            added = (kept.maps * centred[:, None]).sum(-1, dtype=torch.float64)
            return [features, residual, maps, delta, centred, added, kept.means, kept.target, kept.maps, kept.projected]

        def plain(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
            def step(features, residual, maps, delta, *_):
                # The engine keeps features in 16 bits and computes in float32.
                wide = features.float() if features.dtype != torch.float64 else features
                with torch.enable_grad():
                    leaf = delta.detach().requires_grad_()
                    value = loss(wide, residual, None, maps, leaf)
                    return value.detach(), torch.autograd.grad(value, leaf)[0]

            return step

        def ours(features, residual, maps, delta, centred, added, means, target, centred_maps, projected):
            kept = delta_features.Features(features, means, target, None, target[0].numel(), centred_maps, projected)
            loss = delta.new_empty(1)
            gradient = delta_features.pre_gradient(kept, centred, added, loss, 0)
            return loss[0], gradient

        yield Case(
            "delta pre step", f"{K} x {N}", make, plain(delta_features.loss_reference),
            {"triton": ours, "compiled": plain(torch.compile(delta_features.loss_reference, dynamic=False))},
            (2 * K * N * D + 8 * K * N * C, 0),
            compile=False,
            variants=tuple(
                (delta_features, {"BLOCK_N": n, "WARPS": w, "PROGRAMS": p, "STAGES": s}) for n, w, p, s in PRE_VARIANTS
            ),
        )  # fmt: skip

        def sums(residual):
            found = delta_features.residual_sums(residual, None)
            return found.residual, found.square

        def plain_sums(residual):
            return residual.sum(1), residual.square().sum((1, 2))

        yield Case(
            "delta sums", f"{K} x {N}",
            lambda device, dtype, N=N: [randn(device, torch.float32, K, N, C)],
            plain_sums, {"triton": sums}, (4 * K * N * C, 0),
        )  # fmt: skip


def delta_step_cases(s: Sizes) -> Iterator[Case]:
    """The objective of a linear site, and the step after any: from the draws' gradients to the vectors and their maps."""
    K, D, C, N = s.draws, s.dim, s.outputs, s.counted[0]

    def make_linear(device: torch.device, dtype: torch.dtype) -> Inputs:
        residual, maps = randn(device, torch.float32, K, N, C), randn(device, torch.float32, K, C, D, scale=D**-0.5)
        delta = randn(device, torch.float32, K, D, scale=0.3)
        added = (maps * delta[:, None]).sum(-1, dtype=torch.float64)
        sums = delta_features.residual_sums(residual, None)
        return [maps, delta, added, sums.residual, sums.count, sums.square]

    def plain_linear(maps, delta, added, residual, count, square):
        return delta_features.linear_loss_and_gradient(
            delta_features.ResidualSums(residual, count, square), maps, delta
        )

    def linear(maps, delta, added, residual, count, square):
        loss = delta.new_empty(1)
        sums = delta_features.ResidualSums(residual, count, square)
        gradient = delta_features.linear_gradient(sums, maps, added, loss, 0)
        return loss[0], gradient

    yield Case(
        "delta linear objective", f"{K} draws", make_linear, plain_linear, {"triton": linear}, (4 * K * C * D, 0),
        compile=False,
    )  # fmt: skip

    ranges, rule = [0] * K, delta_step.Rule([0.01], decay=0.1, ridge=1e-3, clip=1.0)
    fits: list[delta_step.DeltaSteps] = []  # of the inputs that were made last

    def make_step(device: torch.device, dtype: torch.dtype) -> Inputs:
        maps = randn(device, torch.float32, K, C, D, scale=D**-0.5)
        start = randn(device, torch.float32, 1, D, scale=0.3)
        fits[:] = [delta_step.DeltaSteps(start, ranges, maps, rule, True)]
        return [randn(device, torch.float32, K, D), start, maps]

    def plain_step(gradient, start, maps):
        zeros = torch.zeros_like(start)
        delta, _, _, norm = delta_step.delta_step_reference(gradient, ranges, start, zeros, zeros, 0, rule)
        return delta, norm, (maps * (delta - delta.mean())).sum(-1)

    def step(gradient, start, maps):
        fits[0].taken = 0
        fits[0].take(gradient)
        return fits[0].deltas[1], fits[0].norms[0], fits[0].added

    yield Case(
        "delta step", f"{K} draws", make_step, plain_step, {"triton": step}, (4 * K * C * D + 4 * K * D, 0),
        variants=tuple((delta_step, {"TILE": t, "WARPS": w}) for t, w in ((4096, 4), (8192, 4), (16384, 8))),
        compile=False,
        traced=False,
    )  # fmt: skip
