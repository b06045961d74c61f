"""A vector added at the final layer, fitted on cached features (after SLOT, arXiv:2505.12392, carried to a diffusion network).

The last layer computes W (LN(h) * (1 + scale_t) + shift_t) + b for each token. A vector d of the hidden width may join at

    site   adds to the output             character
    post   W d                            linear; one constant on the velocity, the same at every t and token
    mid    W ((1 + scale_t) * d)          linear; its effect varies with t
    pre    W ((1 + scale_t) * (LN(h + d) - LN(h)))   not linear

All that comes before is constant for fixed draws, so the layers run once a draw without gradients and their output is kept.
The objective is mean over draws, tokens and channels of the squared error, plus ridge |d|^2. For the linear sites its optimum
solves normal equations, in D unknowns or in one for each output of each draw, whichever are fewer (closed form); AdamW serves
every site. Both are float32 or wider, added to the network's own output, so d = 0 is exactly the base.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.delta_features import linear_loss_and_gradient, residual_sums_reference
from ..adaptation import AdaptationSettings, Draw, Task
from ..models.attention import TextStates, apart, joined
from ..models.paths import method_path, raise_if_strict, records
from ..models.stdit3 import Embedded, FinalLayer, STDiT3, layer_norm
from ..recorded import CAPTION_LENGTHS, Records
from .adamw import describe_steps
from .optimize import AdamW, Masters, Trace, optimize, random_of_equal_norm
from .parts import Fisher
from .protocol import Change, OnStep

Site = Literal["post", "mid", "pre"]


def _check(ranges: int, ridge: float) -> None:
    if ranges < 1:
        raise ValueError(f"ranges must be at least 1, was {ranges}")
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, was {ridge}")


def _check_draws(adaptation: AdaptationSettings) -> None:
    if adaptation.draws == "fresh":
        raise ValueError(
            "a delta needs adaptation.draws to be a number, was fresh: its features are cached for fixed draws"
        )
    if adaptation.temporal:
        raise ValueError(
            f"a delta cannot take adaptation.temporal (was {adaptation.temporal}): its loss is fitted patch by patch on cached features"
        )


@dataclass(frozen=True, kw_only=True)
class Delta(AdamW):
    """Fit the delta by AdamW on all draws at once."""

    kind: Literal["delta"] = "delta"
    site: Site = "pre"
    """Where the vector joins: post (after the modulation), mid (between norm and modulation), pre (before the norm)."""
    lr: float = 1e-2
    """Learning rate; `schedule` and `warmup` say how it goes over the steps."""
    ranges: int = 1
    """One vector for each of so many ranges of timesteps, equal in number of sampler steps."""
    ridge: float = 0.0
    """Weight of |d|^2 beside the mean squared error."""
    gradient_clip: float = 0.0
    """Largest L2 norm of the gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.ranges, self.ridge)

    def check(self, adaptation: AdaptationSettings) -> None:
        _check_draws(adaptation)

    def attach(self, model: STDiT3, recipe_seed: int) -> "DeltaAdapter":
        return DeltaAdapter(self, model)


@dataclass(frozen=True, kw_only=True)
class DeltaClosedForm:
    """Fit the delta at a linear site by its normal equations."""

    kind: Literal["delta_closed_form"] = "delta_closed_form"
    site: Literal["post", "mid"] = "mid"
    """Where the vector joins: post (after the modulation) or mid (between norm and modulation)."""
    ranges: int = 1
    """One vector for each of so many ranges of timesteps, equal in number of sampler steps."""
    ridge: float = 1e-4
    """Weight of |d|^2 beside the mean squared error; 0 gives the shortest of the least-squares solutions."""

    def __post_init__(self) -> None:
        _check(self.ranges, self.ridge)

    def check(self, adaptation: AdaptationSettings) -> None:
        _check_draws(adaptation)
        if adaptation.reset != "clip":
            raise ValueError(
                f"a closed form is solved from the clip alone, so adaptation.reset must be clip, was {adaptation.reset}"
            )

    def attach(self, model: STDiT3, recipe_seed: int) -> "DeltaAdapter":
        return DeltaAdapter(self, model)


class DeltaFinalLayer(nn.Module):
    """The final layer plus what the delta adds, in float32. d: [ranges, D]; edges: [ranges - 1] timesteps, rising."""

    def __init__(self, base: FinalLayer, site: Site, ranges: int) -> None:
        super().__init__()
        self.base = base
        self.site = site
        weight = base.linear.weight
        self.d = nn.Parameter(torch.zeros(ranges, weight.shape[1], device=weight.device))
        self.edges: Tensor
        self.register_buffer("edges", torch.zeros(ranges - 1, device=weight.device))

    def set_ranges(self, grid: Tensor) -> None:
        """Split the sampler's timesteps into equal ranges; an edge lies half way between two neighbouring timesteps."""
        rising, ranges = grid.sort().values, len(self.d)
        if ranges > len(rising):
            raise ValueError(f"ranges must be at most the sampler's steps ({len(rising)}), was {ranges}")
        at = torch.tensor([len(rising) * i // ranges for i in range(1, ranges)], dtype=torch.long)
        self.edges.copy_((rising[at - 1] + rising[at]) / 2)

    def range_of(self, timestep_B: Tensor) -> Tensor:
        """Which range each timestep falls into, [B]."""
        return torch.bucketize(timestep_B.contiguous(), self.edges)

    def map_of(self, time_BD: Tensor) -> Tensor:
        """The linear map to the output from d, [B, out, D] float32; at site pre from what d adds to the norm's result."""
        weight = self.base.linear.weight.float()
        if self.site == "post":
            return weight.expand(time_BD.shape[0], -1, -1)
        _, scale = self.base.modulation(time_BD)
        return weight * (1 + scale.float())

    def added(self, x_BND: Tensor, time_BD: Tensor, timestep_B: Tensor) -> Tensor:
        """What the delta adds to the output, [B, N or 1, out] float32."""
        d_B1D = self.d[self.range_of(timestep_B)][:, None]
        if self.site != "pre":
            return d_B1D @ self.map_of(time_BD).mT
        _, scale = self.base.modulation(time_BD)
        x = x_BND.float()
        moved = (layer_norm(x + d_B1D) - layer_norm(x)) * (1 + scale.float())
        return F.linear(moved, self.base.linear.weight.float())

    def forward(self, x_BND: Tensor, time_BD: Tensor, timestep_B: Tensor) -> Tensor:
        return self.base(x_BND, time_BD, timestep_B).float() + self.added(x_BND, time_BD, timestep_B)


@dataclass(frozen=True)
class CachedDraw:
    """A draw behind the last layer. state: of the tokens that count; residual: what is left to explain there, [1, N, 4C]
    float32; weight: the same shape, 1 inside the latent and 0 where an odd side pads the last patch."""

    state: Embedded
    residual: Tensor
    weight: Tensor
    zero_loss: Tensor


def to_patches(x_BCTHW: Tensor) -> Tensor:
    """Patches in the final layer's order (row, column, channel), [B, N, 4C]; odd sides are padded with zeros."""
    height, width = x_BCTHW.shape[-2:]
    x = F.pad(x_BCTHW, (0, width % 2, 0, height % 2))
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 2, 3, 5, 4, 6, 1).flatten(-3).flatten(1, 3)


def least_squares(rows_MD: Tensor, wanted_M: Tensor, ridge: float) -> Tensor:
    """argmin over d of |rows d - wanted|^2 + ridge |d|^2, [D]; with ridge 0 the shortest such d. In the dtype given, float64.

    With A for rows, d = (A^T A + ridge)^-1 A^T wanted = A^T (A A^T + ridge)^-1 wanted: the smaller matrix is solved. Raises
    ValueError where a ridge is lost in its rounding.
    """
    M, D = rows_MD.shape
    gram, right = (rows_MD @ rows_MD.T, wanted_M) if M < D else (rows_MD.T @ rows_MD, rows_MD.T @ wanted_M)
    if ridge == 0:
        solution = torch.linalg.pinv(gram, hermitian=True) @ right
    else:
        rounding = torch.finfo(gram.dtype).eps * len(gram) * gram.diagonal().max().item()
        if ridge <= rounding:
            raise ValueError(
                f"ridge {ridge} is lost in the rounding of the normal equations, near {rounding:.1e}; take a larger one, or 0"
            )
        gram.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram)
        solution = torch.cholesky_solve(right[:, None], factor)[:, 0]
    return rows_MD.T @ solution if M < D else solution


class DeltaAdapter:
    def __init__(self, settings: Delta | DeltaClosedForm, model: STDiT3) -> None:
        self.settings = settings
        self.steps = settings.steps if isinstance(settings, Delta) else 1
        self.model = model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.base: FinalLayer = model.final_layer
        self.layer = DeltaFinalLayer(self.base, settings.site, settings.ranges)
        model.final_layer = self.layer  # type: ignore[assignment]
        self.masters = Masters([self.layer.d])
        self.sampling: Records | None = None
        self.fisher: Fisher | None = None
        self.trace = Trace()
        self.on_kernels, way = self._choose_fit()
        self.ways = {
            "features": "recorded" if records(model, "features") else "launched",
            "fit on cached features": way,
        }
        self.recorded: Records | None = None
        # Of each pixel's 2C outputs only the first C are the velocity.
        outputs = torch.arange(self.base.linear.out_features, device=model.device)
        self.used = (outputs % (2 * model.config.in_channels) < model.config.in_channels).nonzero().flatten()

    def _choose_fit(self) -> tuple[bool, str]:
        """Whether the delta is fitted on the kernels of delta_features.py, and how in words; raises ValueError where they were asked
        for by name and cannot do it."""
        settings = self.settings
        if isinstance(settings, DeltaClosedForm):
            return False, "normal equations in float64"
        plain = f"autograd, {describe_steps(self.masters, settings)}"
        if method_path(self.model) != "triton":
            return False, plain
        parts = [part for part in ("l2", "ewc", "early_stopping") if getattr(settings, part)]
        if not parts:
            return True, "Triton kernels, all steps on the device"
        why = f"the delta's kernels do not take {' and '.join(parts)}"
        raise_if_strict(self.model, why)
        return False, f"{plain} ({why})"

    def cache(self, task: Task) -> list[CachedDraw]:
        """Run the layers once for each draw."""
        assert task.settings.draws != "fresh"
        return self._cache(task, map(task.draw, range(task.settings.draws)))

    def cache_held_out(self, task: Task, draws: int) -> list[CachedDraw]:
        """The same for held-out draws, for early stopping."""
        return self._cache(task, map(task.held_out_draw, range(draws)))

    @torch.no_grad()
    def _cache(self, task: Task, draws: Iterable[Draw]) -> list[CachedDraw]:
        """draws: made one by one while the device works on the one before."""
        layers = len(self.model.layers)

        @torch.no_grad()
        def features(t: Tensor, noise: Tensor, latents: Tensor, *text: Tensor) -> list[Tensor]:
            found = self._cache_one(task.of(latents), Draw(t, noise), apart(text, layers))
            return [*found.state, found.residual, found.weight, found.zero_loss]

        if records(self.model, "features"):
            # This task's computation serves for every clip to come: of a clip it reads what it is given.
            self.recorded = self.recorded or Records(features, CAPTION_LENGTHS)
        else:
            self.recorded = None
        clip, cached = (task.latents, *joined(task.captions())), []
        for draw in draws:
            found = (self.recorded or features)(*draw, *clip)
            *state, residual, weight, zero_loss = (tensor.clone() for tensor in found)  # the next draw's may lie there
            cached.append(CachedDraw(Embedded(*state), residual, weight, zero_loss))
        return cached

    def _cache_one(self, task: Task, draw: Draw, text: tuple[TextStates, TextStates]) -> CachedDraw:
        state = self.model.run_layers(task.embed(draw), *text, task.geometry)
        state = state._replace(tokens=state.tokens[:, task.first_counted * task.geometry.tokens_per_frame :].clone())
        target = task.target(draw)
        base = self.base(state.tokens, state.time, state.timestep).float()[..., self.used]
        weight = to_patches(torch.ones_like(target))
        return CachedDraw(state, (to_patches(target) - base) * weight, weight, task.zero_loss(draw))

    def loss(self, cached: list[CachedDraw]) -> Tensor:
        """Mean squared error over all draws."""
        errors = []
        for c in cached:
            added = self.layer.added(c.state.tokens, c.state.time, c.state.timestep)[..., self.used]
            errors.append((c.residual - added * c.weight).square().sum() / c.weight.sum())
        return torch.stack(errors).mean()

    def adapt(self, task: Task, on_step: OnStep) -> Trace:
        self.layer.set_ranges(task.grid.to(self.layer.edges.device))
        cached = self.cache(task)
        ranges: list[int] = self.layer.range_of(torch.cat([c.state.timestep for c in cached])).tolist()
        empty = set(range(self.settings.ranges)) - set(ranges)
        if empty:
            raise ValueError(
                f"adaptation.draws ({len(cached)}) left {len(empty)} of {self.settings.ranges} ranges of timesteps without a "
                "draw; use more draws or fewer ranges"
            )
        zero_loss = torch.stack([c.zero_loss for c in cached]).mean()
        if isinstance(self.settings, Delta) and self.on_kernels:
            return self._fit(self.settings, cached, ranges, zero_loss.item(), on_step)
        if isinstance(self.settings, Delta):
            ridge, rows = self.settings.ridge, self.layer.d
            held_out = self.cache_held_out(task, self.settings.held_out_draws)
            self.trace = Trace()
            return optimize(
                self.masters,
                self.settings,
                lambda step: self.loss(cached),
                zero_loss=lambda step: zero_loss,
                penalty=(lambda: ridge * rows.square().sum()) if ridge else None,
                start=[torch.zeros_like(rows)],
                fisher=self.fisher,
                held_out=lambda: self.loss(held_out),
                on_step=on_step,
                trace=self.trace,
            )
        return self._solve(self.settings.ridge, cached, ranges, zero_loss.item(), on_step)

    def _fit(
        self, settings: Delta, cached: list[CachedDraw], ranges: list[int], zero_loss: float, on_step: OnStep
    ) -> Trace:
        """The same steps on the kernels of delta_features.py, all of them on the device; then each again for on_step, its delta in
        force and the trace as far as it."""
        from .delta_fit import draw_objective, fit

        order = sorted(range(len(cached)), key=ranges.__getitem__)  # the draws of a range side by side
        objective, delta = draw_objective(self.layer, self.used, [cached[k] for k in order]), self.layer.d.detach()
        found, deltas = fit(objective, delta, sorted(ranges), settings, settings.ridge)
        self.trace = trace = Trace()
        for loss, norm, after in zip(found.losses, found.gradient_norms, deltas.unbind(), strict=True):
            delta.copy_(after)
            trace.steps += 1
            trace.losses.append(loss)
            trace.gradient_norms.append(norm)
            trace.zero_losses.append(zero_loss)
            on_step(trace.steps - 1, loss)
        return trace

    @torch.no_grad()
    def _solve(
        self, ridge: float, cached: list[CachedDraw], ranges: list[int], zero_loss: float, on_step: OnStep
    ) -> Trace:
        """The optimum of every range, argmin over d of mean over all draws of mean |r_k - M_k d|^2, plus ridge |d|^2, from each draw's
        sums of r over the tokens; in float64."""
        maps = self.layer.map_of(torch.cat([c.state.time for c in cached]))[:, self.used]  # M: [K, 4C, D]
        residual = torch.cat([c.residual for c in cached])
        sums = residual_sums_reference(residual.double(), cached[0].weight[0].double())
        # What a draw's output weighs in the mean; one that never counts, where an odd side is padded, has a row of zeros.
        share = sums.count / (len(cached) * sums.count.sum(-1, keepdim=True))
        rows = maps * share.sqrt()[:, :, None]
        wanted = share.sqrt() * sums.residual / sums.count.clamp(min=1)

        def loss() -> float:
            return linear_loss_and_gradient(sums, maps, self.layer.d[ranges])[0].item()

        before = loss()
        for index in range(self.settings.ranges):
            chosen = [k for k, of in enumerate(ranges) if of == index]
            self.layer.d[index] = least_squares(rows[chosen].flatten(0, 1), wanted[chosen].flatten(), ridge)
        on_step(0, before)
        self.trace = Trace(steps=1, losses=[before, loss()], zero_losses=[zero_loss] * 2)
        return self.trace

    def change(self) -> Change:
        distance = self.layer.d.detach().norm().item()
        return Change(distance, distance, int((self.layer.d != 0).sum()), self.layer.d.numel())

    def distances(self) -> dict[str, tuple[float, float]]:
        norms = self.layer.d.detach().norm(dim=1).tolist()
        return {f"final_layer.d.{index}": (norm, norm) for index, norm in enumerate(norms)}

    @contextmanager
    def suspended(self) -> Iterator[None]:
        self.model.final_layer = self.base
        try:
            yield
        finally:
            self.model.final_layer = self.layer  # type: ignore[assignment]

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self.layer, name).detach().to("cpu", copy=True) for name in ("d", "edges")}

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> None:
        for row in self.layer.d:
            row.copy_(random_of_equal_norm(row, torch.zeros_like(row), generator))

    @torch.no_grad()
    def restore(self) -> None:
        self.layer.d.zero_()
        self.layer.edges.zero_()

    def detach(self) -> None:
        self.model.final_layer = self.base
        self.masters, self.recorded, self.sampling = Masters([]), None, None
