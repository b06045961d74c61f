"""Rows in float8, and the linear layer of them: against float64, whose truth is the unrounded x."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter
from vidtta.engine.models import float8_linear as float8_linear_module
from vidtta.engine.models.float8_linear import (
    MULTIPLE,
    float8_linear,
    float8_linear_reference,
    quantize_weight,
    scaled_product,
)
from vidtta.kernels.common import INTERPRETED
from vidtta.kernels.quantize_rows import (
    LARGEST,
    MOST_COLUMNS,
    SMALLEST,
    dequantized,
    quantize_rows,
    quantize_rows_reference,
)

from tests.kernels.accuracy import (
    DEVICE,
    MODES,
    assert_as_accurate,
    compiled,
    every_dtype,
    every_mode,
    half_a_step,
    rand,
)

# One number; one row; odd sides past one block of rows; the model's widths with a row count that no block divides.
SHAPES = [(1, 1), (1, 48), (3, 5, 37), (33, 1152), (5, 4608)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
CONVERT: Any = interpreter._convert_float if INTERPRETED else None


pytestmark = [
    pytest.mark.usefixtures("float8_cast"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # numpy's, of overflows
]


@pytest.mark.skipif(DEVICE == "cuda" or CONVERT is None, reason="of Triton's interpreter")
def test_why_the_interpreters_own_cast_is_not_used(monkeypatch: pytest.MonkeyPatch):
    """It loses the carry into the exponent: 127 rounds to 128, and it makes 64. When this fails, drop the fixture `float8_cast`."""
    monkeypatch.setattr(interpreter, "_convert_float", CONVERT)
    values, _ = quantize_rows(torch.tensor([[LARGEST, 127.0]]))
    assert values.float().tolist() == [[LARGEST, 64.0]]
    assert quantize_rows_reference(torch.tensor([[LARGEST, 127.0]]))[0].float().tolist() == [[LARGEST, 128.0]]


@every_mode
@every_dtype
@every_shape
def test_every_number_lies_within_half_a_step_of_the_truth(shape, dtype, mode):
    x = rand(*shape, dtype=dtype) * torch.logspace(-3, 3, shape[0], device=DEVICE).view(-1, *[1] * (len(shape) - 1)).to(
        dtype
    )
    kept = x.clone()
    function = quantize_rows if mode == "eager" else compiled(quantize_rows)
    values, scales = function(x)
    assert torch.equal(x, kept) and values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    truth = x.double()
    assert_as_accurate(scales, truth.abs().amax(-1, keepdim=True) / LARGEST, quantize_rows_reference(x)[1])
    assert ((dequantized(values, scales.double()) - truth).abs() <= half_a_step(truth, scales.double())).all()
    assert (values.float().abs().amax(-1) == LARGEST).all()  # the whole range is used


@every_dtype
@every_shape
def test_the_kernel_gives_the_references_bits(shape, dtype):
    x = rand(*shape, dtype=dtype, seed=1)
    for ours, reference in zip(quantize_rows(x), quantize_rows_reference(x), strict=True):
        assert torch.equal(ours.float(), reference.float())


@every_dtype
@every_shape
def test_of_the_activation(shape, dtype):
    x = rand(*shape, dtype=dtype, seed=2) * 3
    truth = F.gelu(x.double(), approximate="tanh")
    values, scales = quantize_rows(x, gelu=True)
    near = (F.gelu(x.float(), approximate="tanh").double() - truth).abs().max() + 2e-7 * truth.abs().max()
    assert (
        (dequantized(values, scales.double()) - truth).abs() <= half_a_step(truth, scales.double()) + 4 * near
    ).all()


def test_rows_that_hurt():
    huge = torch.finfo(torch.float32).max
    rows = torch.zeros(6, 40, device=DEVICE)
    rows[1] = huge  # all of them, without an infinity
    rows[2, 7] = -huge
    rows[3, 3] = 1e-42  # subnormal
    rows[4] = 2.0**-90
    rows[5, 0], rows[5, 1] = LARGEST, LARGEST / 2**20  # far below a step of its row
    values, scales = quantize_rows(rows)
    found = dequantized(values, scales)
    assert found.isfinite().all() and scales.isfinite().all() and (scales >= SMALLEST * 0.999).all()
    assert torch.equal(found[0], rows[0]) and found[3].abs().max() <= 1e-42 and found[5, 1] == 0
    torch.testing.assert_close(found[1:3], rows[1:3], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[4], rows[4], rtol=1e-6, atol=0)
    gelu = dequantized(*quantize_rows(rows, gelu=True))
    torch.testing.assert_close(gelu[1], rows[1], rtol=1e-6, atol=0)
    assert gelu.isfinite().all() and gelu[2].abs().max() == 0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(bad):
    x = rand(3, 40)
    x[1, 5] = bad
    found = dequantized(*quantize_rows(x))
    assert not found[1].isfinite().all() and found[0].isfinite().all() and found[2].isfinite().all()


def test_rows_are_written_where_they_are_wanted():
    x, more = rand(4, 5, 48), rand(4, 5, 48, seed=1)
    out = quantize_rows(x)
    places = [t.data_ptr() for t in out]
    again = quantize_rows(more, out=out)
    assert [t.data_ptr() for t in again] == places
    assert torch.equal(out[0].float(), quantize_rows_reference(more)[0].float())
    assert quantize_rows(x[:0])[0].shape == (0, 5, 48)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (rand(3, MOST_COLUMNS + 1), None, "its rows may have 1 to 16384 columns"),
        (rand(3, 4).double(), None, "dtype must be float32, bfloat16 or float16, was torch.float64"),
        (rand(3, 4), (torch.empty(3, 4), torch.empty(3, 1)), "float8_e4m3fn and"),
        (rand(3, 4), (torch.empty(3, 5).to(torch.float8_e4m3fn), torch.empty(3, 1)), r"out is \[3, 5\]"),
    ],
)
def test_wrong_inputs_are_named(x, out, message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(x, out=out)


# On a GPU the library's product takes bfloat16 alone; on a CPU the reference takes any dtype.
PRODUCT_DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]
# One of everything; an odd number of rows; widths that must be padded (the small model's among them); the model's, up and down.
PRODUCTS = [(1, 1, 1), (1, 16, 32), (7, 37, 39), (9, 216, 648), (33, 1152, 4608), (5, 4608, 1152)]


def layer(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    M, K, N = shape
    x, weight = rand(M, K, dtype=dtype), rand(N, K, dtype=dtype, scale=K**-0.5, seed=1)
    return [x, *quantize_weight(weight), rand(N, dtype=dtype, seed=2), weight]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_the_product_is_that_of_the_dequantised_rows(shape, dtype, gelu, mode):
    """Held against float64 on the same rounded numbers; the yardstick is a product of these in x's own dtype."""
    x, values, scales, bias, weight = layer(shape, dtype)
    function = float8_linear if mode == "eager" else compiled(float8_linear)
    with torch.no_grad():
        found = function(x, values, scales, bias, weight, gelu)
    rows, wide = dequantized(*quantize_rows_reference(x, gelu)), dequantized(values, scales)[: shape[2], : shape[1]]
    truth = F.linear(rows.double(), wide.double(), bias.double())
    assert_as_accurate(found, truth, F.linear(rows.to(dtype), wide.to(dtype), bias))
    assert found.dtype == dtype


@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_the_librarys_product_takes_the_padded_rows(shape, gelu):
    """What a GPU runs after the kernel; torch has the same call on a CPU."""
    x, values, scales, bias, _ = layer(shape, torch.bfloat16)
    rows = quantize_rows(x, gelu, MULTIPLE)
    assert not rows[0].shape[1] % MULTIPLE and not rows[0][:, shape[1] :].float().any()
    for ours, reference in zip(rows, quantize_rows_reference(x, False, MULTIPLE), strict=True):
        assert gelu or torch.equal(ours.float(), reference.float())
    found = scaled_product(*rows, values, scales, bias, torch.bfloat16)
    wide = [dequantized(v, s)[:, : shape[1]] for v, s in (rows, (values[: shape[2]], scales[: shape[2]]))]
    truth = F.linear(*(t.double() for t in (*wide, bias)))
    assert found.is_contiguous()
    assert_as_accurate(found, truth, F.linear(*(t.bfloat16() for t in (*wide, bias))))


@pytest.mark.parametrize("shape", PRODUCTS[1:], ids=str)
def test_how_far_float8_is_from_the_unrounded_layer(shape):
    """Two roundings to 4 significant bits: about 2**-5 sqrt(2 / 3) each relative to the numbers, less than 5 % of normal rows."""
    x, values, scales, bias, weight = layer(shape, PRODUCT_DTYPES[-1])
    with torch.no_grad():
        found = float8_linear(x, values, scales, bias, weight).double()
    truth = F.linear(x.double(), weight.double(), bias.double())
    part = (truth - bias.double()).norm()
    assert 1e-3 < ((found - truth).norm() / part).item() < 0.08


@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
def test_the_gradient_of_x_is_that_of_the_unrounded_layer(dtype, mode, gelu):
    x, values, scales, bias, weight = layer((9, 48, 144), dtype)
    dy = rand(9, 144, dtype=dtype, seed=3)
    function = float8_linear if mode == "eager" else compiled(float8_linear)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf, values, scales, bias, weight, gelu), leaf, dy)

    def unrounded(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        entering = F.gelu(x, approximate="tanh") if gelu else x
        return torch.autograd.grad(F.linear(entering, weight.to(x.dtype)), x, dy.to(x.dtype))[0]

    assert_as_accurate(found, unrounded(x.double()), unrounded(x))
    batched = leaf.unflatten(0, (3, 3))
    (again,) = torch.autograd.grad(function(batched, values, scales, bias, weight, gelu), leaf, dy.unflatten(0, (3, 3)))
    torch.testing.assert_close(again, found)


# Of the schema it cannot: it multiplies every input by a number, which torch does not do in float8.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def test_the_operator_is_one_that_a_compiler_may_trust():
    x, values, scales, bias, weight = layer((9, 48, 144), PRODUCT_DTYPES[0])
    for gelu in (False, True):
        inputs = (x.clone().requires_grad_(), values, scales, bias, weight, gelu)
        torch.library.opcheck(float8_linear_module._float8_linear, inputs, test_utils=CHECKS)


def test_what_the_layer_does_not_take_is_named():
    x, values, scales, bias, weight = layer((4, 48, 32), PRODUCT_DTYPES[0])
    with pytest.raises(ValueError, match=r"weight \[37, 39\] needs \[..., 39\], \[48, 48\], \[48, 1\] and \[37\]"):
        float8_linear(rand(4, 39), *quantize_rows_reference(rand(37, 39)), rand(37), rand(37, 39))
    with pytest.raises(ValueError, match=r"needs \[..., 48\]"):
        float8_linear(x[:, :32], values, scales, bias, weight)
    with pytest.raises(ValueError, match="must be frozen"):
        float8_linear(x, values, scales, bias, weight.clone().requires_grad_())


def test_the_reference_in_float64_is_the_truth_of_the_reference():
    x, values, scales, bias, _ = layer((9, 48, 144), PRODUCT_DTYPES[0])
    truth = float8_linear_reference(x.double(), values, scales, bias)
    found = float8_linear_reference(x, values, scales, bias)
    assert truth.dtype == torch.float64 and ((found.double() - truth).norm() / truth.norm()).item() < 5e-3
