"""The trained linear layer of the modulated norm: all gradients, and that the norm's result is not kept."""

import pytest
import torch
from torch import Tensor
from vidtta.kernels.norm_linear import norm_linear, norm_linear_reference

from tests.kernels.accuracy import check, every_dtype, every_mode, rand

# samples, tokens, inputs, outputs: one number; odd, past a block each way; the model's width.
CASES = [(1, 1, 2, 1), (3, 37, 71, 101), (1, 19, 1152, 40)]


def inputs(B: int, N: int, D: int, E: int, dtype: torch.dtype) -> list[Tensor]:
    vectors = (rand(B, 1, D, dtype=dtype, scale=0.3, seed=s) for s in (1, 2))
    weight = rand(E, D, dtype=dtype, scale=D**-0.5, seed=3)
    return [rand(B, N, D, dtype=dtype), *vectors, weight, rand(E, dtype=dtype, seed=4)]


@every_mode
@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_linear(case, dtype, mode):
    B, N, _, E = case
    check(
        norm_linear,
        norm_linear_reference,
        inputs(*case, dtype=dtype),
        trained=[0, 1, 2, 3, 4],
        douts=[rand(B, N, E, dtype=dtype, seed=5)],
        mode=mode,
        largest=4.0 if case[2] == 2 else 0.0,  # of two numbers nothing is left but what was rounded
    )


@every_dtype
def test_the_same_inputs_have_the_same_bits(dtype):
    found = []
    for _ in range(2):
        leaves = [t.requires_grad_() for t in inputs(*CASES[1], dtype=dtype)]
        out = norm_linear(*leaves)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_scale_of_minus_one_is_no_pole():
    """There n is the shift alone, and the scale's gradient is as large as ever."""
    x, shift, scale, weight, bias = (t.double().float() for t in inputs(1, 9, 24, 8, torch.float32))
    tensors = [x, shift, torch.full_like(scale, -1), weight, bias]
    check(norm_linear, norm_linear_reference, tensors, trained=[0, 1, 2, 3, 4], douts=[rand(1, 9, 8, seed=5)])


def test_the_result_of_the_norm_is_not_kept():
    leaves = [t.requires_grad_() for t in inputs(1, 9, 24, 8, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_linear(*leaves)
    assert [t.data_ptr() for t in kept if t.shape == (1, 9, 24)] == [leaves[0].data_ptr()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: (1, 1, 4)}, r"shift is \[1, 1, 4\], x and weight need \[1, 1, 8\]"),
        ({3: (5, 7)}, r"weight is \[5, 7\], x and weight need \[5, 8\]"),
        ({4: (6,)}, r"bias is \[6\], x and weight need \[5\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {0: (1, 6, 8), 1: (1, 1, 8), 2: (1, 1, 8), 3: (5, 8), 4: (5,)} | change
    with pytest.raises(ValueError, match=message):
        norm_linear(*(rand(*shape) for shape in shapes.values()))
