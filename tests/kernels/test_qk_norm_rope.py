"""Queries, keys and values: norm, rotation and regrouping."""

import pytest
import torch
from torch import Tensor
from vidtta.engine.models.attention import SelfAttention, attend, windowed_attention
from vidtta.engine.models.geometry import build_geometry
from vidtta.engine.models.rope import Rope
from vidtta.kernels.qk_norm_rope import LARGEST_RATIO, qk_norm_rope, qk_norm_rope_reference, turns_back
from vidtta.kernels.windows import Grid, split_windows, ungroup_windows

from tests.kernels.accuracy import DEVICE, DTYPES, check, every_dtype, every_mode, rand

# samples, heads, head dimension, grid. One token and pair; odd; the model's head; windows that do not divide: a right and a
# bottom strip and a corner, and a frame smaller than one window.
CASES = [
    (1, 1, 2, Grid(1, 1, 1)),
    (2, 3, 10, Grid(2, 3, 5)),
    (1, 16, 72, Grid(1, 3, 2)),
    (2, 2, 6, Grid(2, 9, 10)),
]


def tensors(case: tuple[int, int, int, Grid], dtype: torch.dtype) -> list[Tensor]:
    B, H, d, grid = case
    weights = [1 + 0.3 * rand(d, dtype=dtype, seed=s) for s in (1, 2)]
    angle = rand(grid.tokens, d // 2, seed=3) * 3
    # Tables in the model's dtype, as the official rule leaves them.
    return [
        rand(B, grid.tokens, 3 * H * d, dtype=dtype, scale=2),
        *weights,
        angle.cos().to(dtype),
        angle.sin().to(dtype),
    ]


@every_mode
@every_dtype
@pytest.mark.parametrize("windowed", [False, True], ids=["frames", "windows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_norm_rope(case, windowed, dtype, mode):
    B, H, d, grid = case
    windows = grid if windowed else None

    def ours(*args: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(*args, windows=windows)

    def reference(*args: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope_reference(*args, windows=windows)

    douts = [rand(B * grid.tokens, H, d, dtype=dtype, seed=s) for s in (4, 5, 6)]
    check(ours, reference, tensors(case, dtype), trained=[0, 1, 2], douts=douts, mode=mode)


@every_mode
@every_dtype
@pytest.mark.parametrize("windowed", [False, True], ids=["frames", "windows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_may_come_from_the_results(case, windowed, dtype, mode):
    """Turned back by rounded tables; weights of a pair as far apart as is allowed."""
    B, H, d, grid = case
    windows, inputs = grid if windowed else None, tensors(case, dtype)
    for weight in inputs[1:3]:
        weight[::2] = weight[::2].sign() * weight[1::2].abs() * LARGEST_RATIO
    assert turns_back(*inputs[1:3])

    def ours(*args: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(*args, windows=windows, results=True)

    def reference(*args: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope_reference(*args, windows=windows)

    douts = [rand(B * grid.tokens, H, d, dtype=dtype, seed=s) for s in (4, 5, 6)]
    check(ours, reference, inputs, trained=[0], douts=douts, mode=mode)


def test_the_projection_is_not_kept_then():
    inputs = tensors(CASES[1], torch.float32)
    kept: dict[bool, list[int]] = {}
    for results in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, results=results: kept.setdefault(results, []).append(t.numel()) or t, lambda t: t
        ):
            qk_norm_rope(inputs[0].requires_grad_(), *inputs[1:], results=results)
    projection = inputs[0].numel()
    assert projection in kept[False] and projection not in kept[True]
    assert kept[True].count(projection // 3) == 2


def test_weights_that_would_make_rounding_large_are_told():
    even, odd = torch.ones(6), torch.ones(6)
    assert turns_back(even, odd) and turns_back(-3 * even, odd)
    odd[3] = 0.99 / LARGEST_RATIO
    assert not turns_back(even, odd)
    odd[2:4] = 0
    assert not turns_back(even, odd)
    with pytest.raises(ValueError, match="need the projection; leave results off"):
        qk_norm_rope(*(t.requires_grad_() for t in tensors(CASES[1], torch.float32)), results=True)


def test_tables_of_one_frame_serve_all_frames():
    case = (2, 2, 6, Grid(3, 2, 5))
    qkv, q_weight, k_weight, cos, sin = tensors(case, torch.float32)
    cos, sin = cos[:10], sin[:10]
    once = qk_norm_rope(qkv, q_weight, k_weight, cos, sin)
    repeated = qk_norm_rope(qkv, q_weight, k_weight, cos.repeat(3, 1), sin.repeat(3, 1))
    assert all(torch.equal(a, b) for a, b in zip(once, repeated, strict=True))


@pytest.mark.parametrize("grid", [Grid(2, 8, 16), Grid(3, 11, 9), Grid(1, 3, 20), Grid(2, 13, 4)], ids=str)
def test_grouped_rows_are_the_models_windows(grid):
    """Values come back in token order, and attention over the groups' views is the model's windowed attention."""
    B, H, d = 2, 2, 6
    qkv = rand(B, grid.tokens, 3 * H * d)
    ones, table = torch.ones(d, device=DEVICE), torch.zeros(grid.tokens, d // 2, device=DEVICE)
    q, k, v = qk_norm_rope(qkv, ones, ones, table + 1, table, grid)
    assert torch.equal(ungroup_windows(v, B, grid).flatten(2), qkv[..., 2 * H * d :])

    views = zip(*(split_windows(t, B, grid) for t in (q, k, v)), strict=True)
    ours = ungroup_windows(torch.cat([attend(*parts).flatten(0, 1) for parts in views]), B, grid)
    q, k, v = (ungroup_windows(t, B, grid).unflatten(1, grid) for t in (q, k, v))
    assert torch.allclose(ours, windowed_attention(q, k, v).flatten(1, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("windowed", [False, True], ids=["frames", "windows"])
def test_attention_built_on_it_is_the_models(windowed):
    """The model's own tables and layer on the plain path, to rounding."""
    torch.manual_seed(0)
    dim, heads = 24, 2
    geometry = build_geometry(
        frames=3, latent_size=(18, 22), pixel_size=(144, 176), known_frames=(1,),
        freqs=Rope(dim // heads).freqs.detach(), inv_freq=torch.ones(dim // 4), dtype=torch.float32,
    )  # fmt: skip
    layer = SelfAttention(dim, heads, windowed)
    x = torch.randn(2, 3 * 99, dim)
    grid = Grid(geometry.frames, geometry.rows, geometry.cols) if windowed else None
    tables = (geometry.window_cos, geometry.window_sin) if windowed else (geometry.spatial_cos, geometry.spatial_sin)
    tensors = [t.to(DEVICE) for t in (layer.qkv(x), layer.q_norm.weight, layer.k_norm.weight, *tables)]
    with torch.no_grad():
        q, k, v = qk_norm_rope(*tensors, windows=grid)
        if grid is None:
            out = attend(*(t.unflatten(0, (-1, geometry.tokens_per_frame)) for t in (q, k, v))).flatten(0, 1)
        else:
            views = zip(*(split_windows(t, 2, grid) for t in (q, k, v)), strict=True)
            out = ungroup_windows(torch.cat([attend(*parts).flatten(0, 1) for parts in views]), 2, grid)
        ours = layer.proj(out.view(2, -1, dim).cpu())
        assert torch.allclose(ours, layer(x, geometry), rtol=1e-4, atol=1e-5)


def test_values_are_moved_bit_for_bit():
    inputs = tensors((1, 2, 6, Grid(2, 9, 3)), DTYPES[1])
    v = qk_norm_rope(*inputs, windows=Grid(2, 9, 3))[2]
    assert torch.equal(ungroup_windows(v, 1, Grid(2, 9, 3)).flatten(2), inputs[0][..., -12:])


@pytest.mark.parametrize(
    ("change", "windows", "message"),
    [
        ({1: (8,)}, None, "width 36"),
        ({3: (7, 3)}, None, r"tables are \[7, 3\]"),
        ({4: (6, 2)}, None, r"need \[S, 3\]"),
        ({}, Grid(1, 2, 4), "the projection has 6 tokens"),
    ],
)
def test_wrong_shapes_are_named(change, windows, message):
    shapes = {0: (1, 6, 36), 1: (6,), 2: (6,), 3: (6, 3), 4: (6, 3)} | change
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*(rand(*shapes[i]) for i in range(5)), windows=windows)
