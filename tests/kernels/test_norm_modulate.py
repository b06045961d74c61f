"""Layer norm, modulation and the down projection beside it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vidtta.kernels.norm_modulate import norm_modulate, norm_modulate_reference, norm_quantize
from vidtta.kernels.quantize_rows import LARGEST, dequantized

from tests.kernels.accuracy import DEVICE, assert_as_accurate, check, every_dtype, every_mode, half_a_step, rand

# One number; odd sizes, several samples and blocks of rows; the model's width with a row count that no block divides.
SHAPES = [(1, 1, 1), (2, 45, 37), (1, 33, 1152)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    B, N, D = shape
    # The residual stream is not centred: a mean well away from zero makes a careless variance fail.
    return [rand(B, N, D, dtype=dtype) * 2 + 3, rand(B, 1, D, dtype=dtype, seed=1), rand(B, 1, D, dtype=dtype, seed=2)]


def slack(width: int) -> dict[str, Any]:
    """Of one number nothing is left but what was rounded, times the inverse of the root of eps."""
    return {"terms": width, "largest": 1e3 if width == 1 else 0.0}


@every_mode
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_modulation(shape, dtype, mode):
    douts = [rand(*shape, dtype=dtype, seed=3)]
    check(
        norm_modulate,
        norm_modulate_reference,
        inputs(shape, dtype),
        trained=[0, 1, 2],
        douts=douts,
        mode=mode,
        **slack(shape[2]),
    )


@every_mode
@every_dtype
@pytest.mark.parametrize(
    ("shape", "rank"), [((1, 1, 1), 1), ((2, 45, 37), 3), ((2, 70, 48), 64), ((1, 33, 1152), 16)], ids=str
)
def test_with_down_projection(shape, rank, dtype, mode):
    B, N, D = shape
    down = rand(rank, D, dtype=dtype, scale=D**-0.5, seed=4)
    dout = rand(B, N, D + max(16, 1 << (rank - 1).bit_length()), dtype=dtype, seed=5)
    check(
        norm_modulate,
        norm_modulate_reference,
        [*inputs(shape, dtype), down],
        trained=[0, 1, 2, 3],
        douts=[dout],
        mode=mode,
        **slack(D),
    )


def test_float32_masters_of_the_projection_get_float32_gradients():
    x, shift, scale = inputs((1, 20, 32), torch.float16 if DEVICE == "cpu" else torch.bfloat16)
    down = rand(5, 32).requires_grad_()
    norm_modulate(x, shift, scale, down).float().sum().backward()
    assert down.grad is not None and down.grad.dtype == torch.float32 and down.grad.abs().max() > 0


def test_frozen_modulation_gets_no_gradient():
    x, shift, scale = inputs((1, 20, 32), torch.float32)
    x.requires_grad_()
    norm_modulate(x, shift, scale).sum().backward()
    assert x.grad is not None and shift.grad is None and scale.grad is None


def test_every_row_is_normalised():
    x, shift, scale = inputs((2, 9, 100), torch.float32)
    n = norm_modulate(x, torch.zeros_like(shift), torch.zeros_like(scale))
    assert n.mean(-1).abs().max() < 1e-5 and (n.square().mean(-1) - 1).abs().max() < 1e-4


@every_dtype
@pytest.mark.usefixtures("float8_cast")
@pytest.mark.parametrize(("shape", "rank"), [((2, 9, 37), 3), ((1, 5, 1152), 0)], ids=str)
def test_rows_in_float8_are_those_of_the_unrounded_norm(shape, rank, dtype):
    """Widths that need zeros behind them, and the model's. The projection is as accurate as it is of n in 16 bits."""
    x, shift, scale = inputs(shape, dtype)
    down = rand(rank, shape[2], dtype=dtype, scale=shape[2] ** -0.5, seed=4) if rank else None
    D = shape[2]
    values, scales, low, mean, rstd = norm_quantize(x, shift, scale, down, 16)
    exact = norm_modulate_reference(*(t.double() for t in (x, shift, scale)), None if down is None else down.double())
    truth, near = exact[..., :D], norm_modulate_reference(x.float(), shift.float(), scale.float())
    slack = 2 * (near.double() - truth).abs().max() + 1e-6
    assert values.shape == (*shape[:2], -(-D // 16) * 16) and not values[..., D:].float().any()
    assert_as_accurate(
        scales, truth.abs().amax(-1, keepdim=True) / LARGEST, near.abs().amax(-1, keepdim=True) / LARGEST
    )
    found = dequantized(values, scales.double())[..., :D]
    assert ((found - truth).abs() <= half_a_step(truth, scales.double()) + slack).all()
    if down is not None:
        baseline = norm_modulate_reference(x, shift, scale, down)
        assert_as_accurate(low, exact[..., D:], baseline[..., D:])
    assert_as_accurate(mean, x.double().mean(-1), x.float().mean(-1))
    exact_rstd, near_rstd = ((t.var(-1, correction=0) + 1e-6).rsqrt() for t in (x.double(), x.float()))
    assert_as_accurate(rstd, exact_rstd, near_rstd)


@pytest.mark.parametrize(
    ("shift", "down", "message"),
    [
        ((1, 1, 8), (4, 8), r"shift is \[1, 1, 8\]"),
        ((2, 1, 8), (4, 7), r"down is \[4, 7\]"),
        ((2, 1, 8), (65, 8), "from 1 to 64, was 65"),
    ],
)
def test_wrong_shapes_are_named(shift, down, message):
    with pytest.raises(ValueError, match=message):
        norm_modulate(rand(2, 3, 8), rand(*shift), rand(2, 1, 8), rand(*down))
