"""The float8 linear layer of a modulated norm: its product against the reference, its gradients against the unrounded layer's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vidtta.engine.models.float8_linear import quantize_weight
from vidtta.engine.models.norm_float8_linear import add_norm_float8_linear, norm_float8_linear_reference
from vidtta.kernels.norm_modulate import norm_modulate_reference

from tests.kernels.accuracy import DEVICE, assert_as_accurate, every_mode, rand
from tests.kernels.accuracy import compiled as compiled_anew

pytestmark = pytest.mark.usefixtures("float8_cast")

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the library's product gives bfloat16 alone
# samples, tokens, inputs, outputs, rank: widths that are padded, several samples; no addition, the model's width.
CASES = [(2, 9, 37, 40, 3), (1, 5, 1152, 48, 0)]


def norm_float8_linear(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Without a sum before it."""
    return add_norm_float8_linear(x, None, *rest)[1:]


def layer(case: tuple[int, int, int, int, int]) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """x, shift and scale; values, scales, bias and weight; down."""
    B, N, D, E, rank = case
    x = [rand(B, N, D, dtype=DTYPE) * 2 + 3, *(rand(B, 1, D, dtype=DTYPE, seed=seed) for seed in (1, 2))]
    weight = rand(E, D, dtype=DTYPE, scale=D**-0.5, seed=3)
    down = rand(rank, D, scale=D**-0.5, seed=4) if rank else None  # float32 masters
    return x, [*quantize_weight(weight), rand(E, dtype=DTYPE, seed=5), weight], down


@every_mode
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_and_gradients(case, mode):
    (x, shift, scale), frozen, down = layer(case)
    *_, E, rank = case
    function = norm_float8_linear if mode == "eager" else compiled_anew(norm_float8_linear)
    leaves = [t.clone().requires_grad_() for t in (x, shift, scale, *([] if down is None else [down]))]
    y, low = function(*leaves[:3], *frozen, *leaves[3:])
    wide = [t.double() for t in (x, shift, scale)]
    values, scales, bias, weight = frozen
    truth, exact_low = norm_float8_linear_reference(
        *wide, values, scales, bias, None if down is None else down.double()
    )
    # Not number by number: a row may round to 8 bits the other way where another order of sums tips it.
    assert ((y.double() - truth).norm() / truth.norm()).item() < (1e-2 if y.is_cuda else 2e-3)
    if rank:
        assert_as_accurate(low, exact_low, norm_modulate_reference(x, shift, scale, down)[..., case[2] :])
    else:
        assert low.shape[-1] == 0
    dy, dlow = rand(*y.shape, dtype=DTYPE, seed=6), rand(*low.shape, dtype=DTYPE, seed=7)
    found = torch.autograd.grad([y, low] if rank else [y], leaves, [dy, dlow] if rank else [dy])
    assert [t.dtype for t in found] == [t.dtype for t in leaves]

    def unrounded(dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of the layer that nothing is rounded in."""
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        n = norm_modulate_reference(*inputs)
        outs = [F.linear(n[..., : case[2]], weight.to(dtype), bias.to(dtype)), n[..., case[2] :]]
        return torch.autograd.grad(outs[: 1 + bool(rank)], inputs, [dy.to(dtype), dlow.to(dtype)][: 1 + bool(rank)])

    for ours, exact, plain in zip(found, unrounded(torch.float64), unrounded(DTYPE), strict=True):
        assert_as_accurate(ours, exact, plain, terms=E)


@every_mode
@pytest.mark.parametrize("sums", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sum_before_it_and_the_stream_beside_it(case, sums, mode):
    """The layer of the sum, and the sum of both gradients, rounded once where two passes round twice."""
    (x, shift, scale), frozen, down = layer(case)
    h = rand(*x.shape, dtype=DTYPE, seed=8) if sums else None
    function = add_norm_float8_linear if mode == "eager" else compiled_anew(add_norm_float8_linear)
    trained = [t.requires_grad_() for t in (x, h, shift, scale, down) if t is not None]
    s, y, low = function(x, h, shift, scale, *frozen, down)
    through = (x if h is None else x + h).detach().requires_grad_()
    others = [t for t in (shift, scale, down) if t is not None]
    expected, expected_low = norm_float8_linear(through, shift, scale, *frozen, down)
    assert torch.equal(s, through) and torch.equal(low, expected_low)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    ds, dy, dlow = (rand(*t.shape, dtype=DTYPE, seed=seed) for seed, t in enumerate((s, y, low), 5))
    outs = [s, y, low] if case[4] else [s, y]
    found = torch.autograd.grad(outs, trained, [ds, dy, dlow][: len(outs)], retain_graph=True)
    alone = torch.autograd.grad(
        [expected, expected_low][: len(outs) - 1], [through, *others], [dy, dlow][: len(outs) - 1]
    )
    assert all(torch.equal(a, b) for a, b in zip(found[1 + sums :], alone[1:], strict=True))
    for of_stream in found[: 1 + sums]:
        torch.testing.assert_close(of_stream, alone[0] + ds)
    assert torch.equal(torch.autograd.grad(s, trained[0], ds)[0], ds)


def test_without_gradients_of_the_modulation_and_what_it_does_not_take():
    (x, shift, scale), frozen, down = layer(CASES[0])
    x.requires_grad_()
    y, _ = norm_float8_linear(x, shift, scale, *frozen, down)
    y.float().sum().backward()
    assert x.grad is not None and shift.grad is None
    with pytest.raises(ValueError, match=r"weight \[40, 37\] needs \[B, N, 37\], \[48, 48\], \[48, 1\] and \[40\]"):
        norm_float8_linear(x[..., :36], shift, scale, *frozen)
    with pytest.raises(ValueError, match=r"shift is \[2, 1, 36\]"):
        norm_float8_linear(x, shift[..., :36], scale, *frozen)
    with pytest.raises(ValueError, match="must be frozen"):
        norm_float8_linear(x, shift, scale, *frozen[:3], frozen[3].clone().requires_grad_())
