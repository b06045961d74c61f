"""Sums down columns: float64 truth, one launch and two, the dtype asked for."""

import pytest
import torch
from vidtta.kernels import column_sums as module
from vidtta.kernels.column_sums import column_sums, column_sums_reference

from tests.kernels.accuracy import DEVICE, rand

SHAPES = [(1, 1), (3, 7, 5), (2, 1, 263, 33), (600, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_are_those_of_float64(shape, dtype):
    x = rand(*shape, dtype=dtype)
    truth = column_sums_reference(x.double())
    for wanted in (None, torch.float32):
        found = column_sums(x, wanted)
        assert found.dtype == (wanted or dtype) and found.shape == truth.shape
        rounding = torch.finfo(found.dtype).eps * truth.abs()  # of the result, once
        terms = 2e-7 * x.double().abs().sum(-2)  # of a float32 sum
        assert ((found.double() - truth).abs() <= rounding + terms).all()


def test_many_rows_are_split_and_added_in_one_fixed_order(monkeypatch):
    launches = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda *a: launches.append(a[1]) or launch(*a))
    x = rand(700, 20)
    assert torch.equal(column_sums(x), column_sums(x))
    assert launches == [module.SPLITS, 1] * 2
    column_sums(x[:512])
    assert launches[4:] == [1]


def test_columns_of_a_slice_and_of_nothing():
    x = rand(2, 40, 30)
    assert torch.allclose(column_sums(x[..., 3:20]), x[..., 3:20].sum(-2), atol=1e-5)
    assert torch.equal(column_sums(x[:, :0]), torch.zeros(2, 30, device=DEVICE))


def test_a_dtype_that_the_kernel_does_not_take_is_named():
    with pytest.raises(ValueError, match="column_sums: dtype must be float32"):
        column_sums(torch.zeros(3, 3, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("shape", [(3,), (2**16, 1, 1)])
def test_a_shape_that_a_launch_does_not_take_is_named(shape):
    with pytest.raises(ValueError, match="needs two axes and at most 65535 matrices"):
        column_sums(torch.zeros(shape, device=DEVICE))
