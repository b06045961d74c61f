"""A frozen linear layer with its low-rank addition, both ways to compute it."""

import pytest
import torch
from torch import Tensor
from vidtta.kernels.lora_linear import (
    extend_weight,
    lora_linear,
    lora_linear_extended,
    lora_linear_reference,
    write_up,
)
from vidtta.kernels.norm_modulate import norm_modulate, norm_modulate_reference

from tests.kernels.accuracy import DTYPES, check, every_dtype, every_mode, rand

SCALE = 0.75
# One of everything; odd sizes past one block each way; the largest rank; the model's width in and out.
SHAPES = [(1, 1, 1, 1), (35, 37, 150, 3), (40, 64, 48, 64), (17, 1152, 72, 16), (17, 72, 1152, 16)]


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    M, K, N, rank = shape
    weight, bias = rand(N, K, dtype=dtype, scale=K**-0.5, seed=1), rand(N, dtype=dtype, seed=2)
    # Not zero as at the start of training: an addition as large as the rest shows every mistake in it.
    down, up = rand(rank, K, dtype=dtype, scale=K**-0.5, seed=3), rand(N, rank, dtype=dtype, scale=rank**-0.5, seed=4)
    return [rand(M, K, dtype=dtype), weight, bias, down, up]


@every_mode
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_linear(shape, dtype, mode):
    def ours(*args: Tensor) -> Tensor:
        return lora_linear(*args, SCALE)

    def reference(*args: Tensor) -> Tensor:
        return lora_linear_reference(*args, SCALE)

    douts = [rand(shape[0], shape[2], dtype=dtype, seed=5)]
    check(ours, reference, tensors(shape, dtype), trained=[0, 3, 4], douts=douts, mode=mode, terms=max(shape))


@every_mode
@every_dtype
@pytest.mark.parametrize("rank", [1, 16, 33])
def test_norm_and_extended_product_are_the_adapted_layer(rank, dtype, mode):
    """The whole chain of the projection of queries, keys and values, against norm and adapter written out."""
    B, N, D = 2, 37, 48
    _, weight, bias, down, up = tensors((1, D, 3 * D, rank), dtype)
    extended = extend_weight(weight, rank)
    write_up(extended, up, SCALE)

    def ours(x: Tensor, shift: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_linear_extended(norm_modulate(x, shift, scale, down), extended, bias, up, SCALE)

    def reference(x: Tensor, shift: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
        w, b = weight.to(x.dtype), bias.to(x.dtype)
        return lora_linear_reference(norm_modulate_reference(x, shift, scale), w, b, down, up, SCALE)

    inputs = [rand(B, N, D, dtype=dtype), *(rand(B, 1, D, dtype=dtype, scale=0.5, seed=s) for s in (6, 7)), down, up]
    douts = [rand(B, N, 3 * D, dtype=dtype, seed=8)]
    check(ours, reference, inputs, trained=[0, 1, 2, 3, 4], douts=douts, mode=mode, terms=3 * D)


def test_an_update_below_half_a_step_of_the_weight_is_kept():
    """Merged into the weight it would be rounded away whole; in the accumulator it is not."""
    dtype = DTYPES[1]
    step = torch.finfo(dtype).eps
    x = torch.ones(16, 64, dtype=dtype, device=rand(1).device)
    weight, bias = torch.ones_like(x), torch.zeros_like(x[0])
    # Only the sum over the 64 inputs reaches a step of the output: 64 * (1 + step / 4) against 64.
    down, up = torch.ones_like(x[:1]), torch.full_like(x[:, :1], step / 4)
    up = torch.cat([up] * 4)[:16] * 4
    weight = weight[:16]
    merged = torch.nn.functional.linear(x, (weight.float() + 0.25 * up.float() @ down.float()).to(dtype))
    assert (merged == 64).all()
    inside = lora_linear(x, weight, bias[:16] - 64, down, up, 0.25)
    assert torch.allclose(inside.float(), torch.full_like(inside.float(), 16 * step), rtol=1e-2)


def test_zero_up_projection_is_the_frozen_layer():
    x, weight, bias, down, up = tensors((9, 32, 32, 4), torch.float32)
    plain = lora_linear_reference(x, weight, bias, down, torch.zeros_like(up), SCALE)
    assert torch.allclose(lora_linear(x, weight, bias, down, torch.zeros_like(up), SCALE), plain, atol=1e-6)


def test_only_few_columns_of_the_input_are_kept():
    """What the extended product saves does not hold the activations' storage."""
    x_ext, up = rand(64, 128 + 16), rand(32, 4).requires_grad_()
    out = lora_linear_extended(x_ext, extend_weight(rand(32, 128), 4), rand(32), up, 1.0)
    saved = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert saved[1].untyped_storage().nbytes() == 64 * 16 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: (4, 31)}, r"x is \[4, 31\]"),
        ({2: (31,)}, r"bias is \[31\]"),
        ({3: (3, 32)}, r"down is \[3, 32\]"),
        ({4: (31, 4)}, r"up is \[31, 4\]"),
        ({3: (65, 32), 4: (32, 65)}, "from 1 to 64, was 65"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {0: (4, 32), 1: (32, 32), 2: (32,), 3: (4, 32), 4: (32, 4)} | change
    with pytest.raises(ValueError, match=message):
        lora_linear(*(rand(*shapes[i]) for i in range(5)), 1.0)


def test_a_weight_that_is_trained_is_refused():
    x, weight, bias, down, up = tensors((4, 32, 32, 4), torch.float32)
    with pytest.raises(ValueError, match="must be frozen"):
        lora_linear(x, weight.requires_grad_(), bias, down, up, 1.0)
