"""The final-layer delta: where it joins, its cached objective, and the closed form against AdamW and a direct least squares."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vidtta.engine.adaptation import AdaptationSettings, Task
from vidtta.engine.methods.delta import Delta, DeltaAdapter, DeltaClosedForm, DeltaFinalLayer, least_squares
from vidtta.engine.models.stdit3 import STDiT3

from .tiny import CHANNELS, DTYPES, FIXED_DRAWS, noise, tiny_dit, tiny_task

SITES = ("post", "mid", "pre")
SIX_DRAWS = AdaptationSettings(draws=6, timesteps="sampler")


def ignore(step: int, loss: float) -> None:
    pass


def network(task: Task, k: int) -> Tensor:
    """The whole network's output on draw k."""
    model = task.model
    with torch.no_grad():
        state = model.run_layers(task.embed(task.draw(k)), *task.captions(), task.geometry)
        return model.head(state, task.geometry)


def to_patches(video_BCTHW: Tensor) -> Tensor:
    """[1, T * H / 2 * W / 2, 4 * C]: a token's pixels, each with its channels, as the final layer lists them.

    NaN stands where an odd side leaves a part of a patch outside the picture.
    """
    video_BCTHW = F.pad(video_BCTHW, (0, video_BCTHW.shape[-1] % 2, 0, video_BCTHW.shape[-2] % 2), value=math.nan)
    _, C, T, H, W = video_BCTHW.shape
    return video_BCTHW.reshape(1, C, T, H // 2, 2, W // 2, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(1, -1, 4 * C)


def set_delta(adapter: DeltaAdapter, *rows: Tensor) -> None:
    with torch.no_grad():
        adapter.layer.d.copy_(torch.stack(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES)
def test_a_zero_delta_is_the_base_to_the_bit(site, dtype):
    model = tiny_dit(dtype)
    task = tiny_task(model)
    base = network(task, 0)
    adapter = Delta(site=site, ranges=2).attach(model, 0)
    adapter.layer.set_ranges(task.grid)
    assert torch.equal(network(task, 0), base)
    set_delta(adapter, torch.ones(48), torch.ones(48))
    assert not torch.equal(network(task, 0), base)


@pytest.mark.parametrize("site", SITES)
def test_each_site_adds_its_formula(site):
    base = tiny_dit().final_layer
    layer = DeltaFinalLayer(base, site, ranges=1)
    x, time, d = noise(1, 2, 5, 48), noise(2, 2, 48), noise(3, 1, 48)
    layer.d.data = d
    actual = layer(x, time, torch.zeros(2))

    x, time, d, table, W, b = (
        t.detach().double() for t in (x, time, d, base.scale_shift_table, base.linear.weight, base.linear.bias)
    )
    shift, scale = ((row + time)[:, None] for row in table)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    expected = {
        "post": (norm(x) * (1 + scale) + shift + d) @ W.T + b,
        "mid": ((norm(x) + d) * (1 + scale) + shift) @ W.T + b,
        "pre": (norm(x + d) * (1 + scale) + shift) @ W.T + b,
    }[site]
    torch.testing.assert_close(actual.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_post_is_64_numbers_on_the_velocity_the_same_everywhere():
    model = tiny_dit()
    task = tiny_task(model)
    base = [network(task, k)[:, :CHANNELS] for k in range(3)]
    assert len({task.draw(k).t.item() for k in range(3)}) == 3
    adapter = Delta(site="post").attach(model, 0)
    d = noise(1, 48)
    set_delta(adapter, d)
    # Of the final layer's 128 rows, ordered (pixel of the patch, channel), the first 16 of each pixel's 32 are the velocity.
    bias = (adapter.base.linear.weight @ d).reshape(4, 2 * CHANNELS)[:, :CHANNELS].flatten()
    assert bias.shape == (64,)
    for k in range(3):
        moved = to_patches(network(task, k)[:, :CHANNELS] - base[k])
        assert moved.shape == (1, 7 * 2 * 3, 64)
        torch.testing.assert_close(moved, bias.expand_as(moved), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (3, 5)], ids=["whole patches", "odd sides"])
@pytest.mark.parametrize("objective", ["continuation", "official", "denoise"])
@pytest.mark.parametrize("site", SITES)
def test_the_cached_objective_is_the_loss_of_the_network_with_the_delta(site, objective, size):
    model = tiny_dit()
    task = tiny_task(model, replace(FIXED_DRAWS, objective=objective), latents=noise(0, 1, CHANNELS, 7, *size))
    adapter = Delta(site=site, ranges=2).attach(model, 0)
    adapter.layer.set_ranges(task.grid)
    cached = adapter.cache(task)
    tokens = 6 * {"continuation": 4, "official": 7, "denoise": 7}[objective]
    assert [c.residual.shape for c in cached] == [(1, tokens, 64)] * 3
    for scale in (0.0, 1.0):
        set_delta(adapter, scale * noise(1, 48), scale * noise(2, 48))
        expected = torch.stack([task.error(network(task, k), task.draw(k)) for k in range(3)]).mean()
        assert adapter.loss(cached).item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_are_cached_by_one_run_a_draw():
    model = tiny_dit()
    runs = []
    model.layers[0].register_forward_pre_hook(lambda module, args: runs.append(1))
    Delta(steps=10).attach(model, 0).adapt(tiny_task(model), ignore)
    assert len(runs) == 3


def test_features_belong_to_their_clip():
    model, new = tiny_dit(), tiny_dit()
    adapter = Delta(steps=2).attach(model, 0)
    adapter.adapt(tiny_task(model, clip_id="another"), ignore)
    adapter.restore()
    adapter.adapt(tiny_task(model), ignore)
    fresh = Delta(steps=2).attach(new, 0)
    fresh.adapt(tiny_task(new), ignore)
    assert torch.equal(adapter.layer.d, fresh.layer.d)


def in_range(task: Task, k: int, ranges: int) -> int:
    """The range of draw k, found by its place on the sampler's grid: 0 holds the smallest timesteps."""
    place = sorted(task.grid.tolist()).index(task.draw(k).t.item())
    return sum(place >= len(task.grid) * i // ranges for i in range(1, ranges))


def direct_least_squares(task: Task, site: str, ranges: int, ridge: float) -> Tensor:
    """The optimum, [ranges, D], from one design matrix over every draw, token and output, in float64."""
    final, draws = task.model.final_layer, range(task.settings.draws)  # type: ignore[arg-type]
    W = final.linear.weight.double().reshape(4, 2 * CHANNELS, -1)[:, :CHANNELS].reshape(64, -1)
    D = W.shape[1]
    rows, targets = [], []
    for k in draws:
        draw = task.draw(k)
        velocity = network(task, k)[:, :CHANNELS, task.first_counted :].double()
        residual = to_patches((task.latents.double() - draw.noise.double())[:, :, task.first_counted :] - velocity)[0]
        inside = ~residual.isnan().flatten()
        scale = final.modulation(task.embed(draw).time)[1][0, 0].double()
        M = W if site == "post" else W * (1 + scale)
        weight = (len(draws) * velocity.numel()) ** -0.5
        index = in_range(task, k, ranges)
        block = torch.zeros(residual.numel(), ranges * D, dtype=torch.float64)
        block[:, index * D : (index + 1) * D] = M.repeat(len(residual), 1)
        rows.append(weight * block[inside])
        targets.append(weight * residual.flatten()[inside])
    rows.append(ridge**0.5 * torch.eye(ranges * D, dtype=torch.float64))
    targets.append(torch.zeros(ranges * D, dtype=torch.float64))
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)[:, None], driver="gelsd").solution
    return solution.reshape(ranges, D)


@pytest.mark.parametrize("size", [(4, 6), (3, 5)], ids=["whole patches", "odd sides"])
@pytest.mark.parametrize(("ranges", "objective"), [(1, "continuation"), (2, "continuation"), (3, "official")])
@pytest.mark.parametrize("site", ["post", "mid"])
def test_the_closed_form_is_the_least_squares_solution(site, ranges, objective, size):
    model = tiny_dit()
    task = tiny_task(model, replace(SIX_DRAWS, objective=objective), latents=noise(0, 1, CHANNELS, 7, *size))
    expected = direct_least_squares(task, site, ranges, ridge=1e-3)
    adapter = DeltaClosedForm(site=site, ranges=ranges, ridge=1e-3).attach(model, 0)
    trace = adapter.adapt(task, ignore)
    torch.testing.assert_close(adapter.layer.d.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert trace.losses[1] < trace.losses[0]
    # The losses are of sums in float64; in float32 the objective itself errs by its rounding.
    cached = adapter.cache(task)
    assert trace.losses[1] == pytest.approx(adapter.loss(cached).item(), rel=5e-7)
    adapter.restore()
    assert trace.losses[0] == pytest.approx(adapter.loss(cached).item(), rel=5e-7)
    assert trace.steps == 1


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize(("rows", "width"), [(6, 40), (39, 40), (40, 40), (90, 40)])
def test_either_gram_matrix_gives_the_least_squares_solution(rows, width, ridge):
    """More unknowns than rows, as many, fewer; of the rows two say the same, and one nothing."""
    A, wanted = noise(1, rows, width).double(), noise(2, rows).double()
    A[1], wanted[1], A[2], wanted[2] = A[0], wanted[0] + 1, 0.0, 0.0
    full, right = torch.cat([A, ridge**0.5 * torch.eye(width).double()]), torch.cat([wanted, wanted.new_zeros(width)])
    expected = torch.linalg.lstsq(full, right[:, None], rcond=1e-12, driver="gelsd").solution[:, 0]
    torch.testing.assert_close(least_squares(A, wanted, ridge), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [2, 4, 9], ids=["more unknowns", "as many", "fewer"])
@pytest.mark.parametrize("ridge", [1e-30, 1e-16])
def test_a_ridge_that_rounding_swallows_is_refused(ridge, rows):
    """Also where a factorisation would still go through, and give a solution of another ridge."""
    with pytest.raises(ValueError, match=rf"^ridge {ridge} is lost in the rounding of the normal equations, near \d"):
        least_squares(torch.ones(rows, 4).double(), torch.ones(rows).double(), ridge)


@pytest.mark.parametrize("ranges", [1, 2])
@pytest.mark.parametrize("site", ["post", "mid"])
def test_adamw_arrives_where_the_closed_form_is(site, ranges):
    ridge, model = 1e-2, tiny_dit()
    task = tiny_task(model, SIX_DRAWS)
    exact = DeltaClosedForm(site=site, ranges=ranges, ridge=ridge).attach(model, 0)
    exact.adapt(task, ignore)
    optimum, cached = exact.layer.d.detach().clone(), exact.cache(task)

    def objective(adapter: DeltaAdapter) -> float:
        return (adapter.loss(cached) + ridge * adapter.layer.d.square().sum()).item()

    best = objective(exact)
    exact.restore()
    start = objective(exact)
    exact.detach()
    stepped = Delta(site=site, ranges=ranges, ridge=ridge, steps=250, lr=3e-2, betas=(0.9, 0.99)).attach(model, 0)
    trace = stepped.adapt(task, ignore)
    assert best <= objective(stepped) * (1 + 1e-6)
    assert objective(stepped) == pytest.approx(best, rel=1e-4)
    assert best < 0.999 * start
    assert (stepped.layer.d - optimum).norm() < 0.01 * optimum.norm()
    # The trace holds the mean squared error without the ridge.
    assert trace.losses[0] == pytest.approx(start, rel=1e-6)


def test_without_ridge_the_closed_form_is_the_shortest_solution():
    """Of 96 unknowns at site post only 64 show in the velocity; the rest must stay zero."""
    model = tiny_dit(hidden=96)
    task = tiny_task(model)
    expected = direct_least_squares(task, "post", 1, ridge=0.0)
    adapter = DeltaClosedForm(site="post", ridge=0.0).attach(model, 0)
    adapter.adapt(task, ignore)
    d = adapter.layer.d.double()
    torch.testing.assert_close(d, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    W = adapter.base.linear.weight.double()[adapter.used]
    assert torch.linalg.matrix_rank(W) == 64
    hidden_part = d[0] - torch.linalg.pinv(W) @ (W @ d[0])
    assert hidden_part.norm() < 1e-4 * d.norm()
    # At site post every draw and token has one bias to share: the mean of what is left to explain is explained.
    mean = torch.stack([c.residual.double().mean((0, 1)) for c in adapter.cache(task)]).mean(0)
    torch.testing.assert_close(W @ d[0], mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES)
def test_adamw_brings_the_loss_down_at_every_site(site, dtype):
    model = tiny_dit(dtype)
    trace = Delta(site=site, steps=20, lr=3e-2).attach(model, 0).adapt(tiny_task(model), ignore)
    assert trace.losses[-1] < trace.losses[0] - 0.02
    assert all(later < earlier for earlier, later in zip(trace.losses[:10], trace.losses[1:11], strict=True))


@pytest.mark.parametrize(
    ("steps", "ranges", "sizes"), [(8, 2, [4, 4]), (7, 3, [2, 2, 3]), (5, 5, [1] * 5), (4, 1, [4])]
)
def test_ranges_split_the_samplers_steps_evenly(steps, ranges, sizes):
    model = tiny_dit()
    task = tiny_task(model, sampling_steps=steps)
    layer = Delta(ranges=ranges).attach(model, 0).layer
    layer.set_ranges(task.grid)
    rising = task.grid.sort().values
    assert layer.range_of(rising).tolist() == [i for i, size in enumerate(sizes) for _ in range(size)]
    assert layer.range_of(torch.tensor([0.0, 1000.0])).tolist() == [0, ranges - 1]
    # Half way between two steps of different ranges lies the edge.
    for edge, last in zip(layer.edges.tolist(), torch.tensor(sizes).cumsum(0)[:-1].tolist(), strict=True):
        assert edge == pytest.approx((rising[last - 1] + rising[last]).item() / 2, rel=1e-6)


@pytest.mark.parametrize("site", SITES)
def test_each_timestep_uses_the_row_of_its_range(site):
    model, single = tiny_dit(), tiny_dit()
    task, other = (tiny_task(m, AdaptationSettings(timesteps="sampler"), sampling_steps=6) for m in (model, single))
    rows = [noise(i, 48) for i in range(3)]
    adapter = Delta(site=site, ranges=3).attach(model, 0)
    adapter.layer.set_ranges(task.grid)
    set_delta(adapter, *rows)
    one = Delta(site=site).attach(single, 0)
    expected_range = dict(zip(sorted(task.grid.tolist()), [0, 0, 1, 1, 2, 2], strict=True))
    seen = set()
    for k in range(30):
        expected = expected_range[task.draw(k).t.item()]
        if expected in seen:
            continue
        seen.add(expected)
        set_delta(one, rows[expected])
        assert torch.equal(network(task, k), network(other, k))
    assert seen == {0, 1, 2}


def test_a_batch_may_hold_timesteps_of_several_ranges():
    """The sampler's branches share one timestep; nothing may depend on that."""
    base = tiny_dit().final_layer
    layer = DeltaFinalLayer(base, "mid", ranges=2)
    layer.edges.fill_(500.0)
    layer.d.data = noise(1, 2, 48)
    x, time, t = noise(2, 3, 5, 48), noise(3, 3, 48), torch.tensor([100.0, 900.0, 500.0])
    together = layer(x, time, t)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], layer(x[i : i + 1], time[i : i + 1], t[i : i + 1]))
    added = (together - base(x, time, t)).detach()
    assert not torch.allclose(added[0], added[1])


@pytest.mark.parametrize("method", [Delta(ranges=3, steps=1), DeltaClosedForm(ranges=3)], ids=lambda m: m.kind)
def test_a_range_without_a_draw_is_refused(method):
    model = tiny_dit()
    task = tiny_task(model, AdaptationSettings(draws=2, timesteps="sampler"))
    assert [in_range(task, k, 3) for k in range(2)] == [2, 1]
    message = "adaptation.draws (2) left 1 of 3 ranges of timesteps without a draw; use more draws or fewer ranges"
    adapter = method.attach(model, 0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapter.adapt(task, ignore)
    assert not adapter.layer.d.any()


def test_more_ranges_than_sampler_steps_are_refused():
    model = tiny_dit()
    with pytest.raises(ValueError, match=r"^ranges must be at most the sampler's steps \(4\), was 5$"):
        Delta(ranges=5).attach(model, 0).adapt(tiny_task(model, sampling_steps=4), ignore)


@pytest.mark.parametrize("method", [Delta(), DeltaClosedForm()], ids=lambda m: m.kind)
def test_fresh_draws_are_refused(method):
    message = "a delta needs adaptation.draws to be a number, was fresh: its features are cached for fixed draws"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        method.check(AdaptationSettings(draws="fresh"))
    method.check(AdaptationSettings(draws=1))


@pytest.mark.parametrize("kind", [Delta, DeltaClosedForm])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranges": 0}, "ranges must be at least 1, was 0"),
        ({"ridge": -1.0}, "ridge must not be negative, was -1.0"),
    ],
)
def test_settings_name_what_is_wrong(kind, settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kind(**settings)


def test_change_and_state_are_the_vectors():
    model: STDiT3 = tiny_dit(torch.bfloat16)
    adapter = Delta(ranges=2).attach(model, 0)
    set_delta(adapter, noise(1, 48), torch.zeros(48))
    change = adapter.change()
    assert change.master == change.effective == pytest.approx(noise(1, 48).norm().item(), rel=1e-6)
    assert (change.changed, change.trained) == (48, 96)
    state = adapter.state()
    assert state.keys() == {"d", "edges"}
    assert state["d"].dtype == torch.float32 and state["d"].shape == (2, 48) and state["edges"].shape == (1,)
