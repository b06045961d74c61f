"""The trained linear layer of the modulated norm, and the sum before it: all gradients, and that the norm's result is not kept."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vidtta.kernels import norm_linear as module
from vidtta.kernels.norm_linear import add_norm_linear, add_norm_linear_reference, norm_linear_reference

from tests.kernels.accuracy import check, every_dtype, every_mode, rand

# samples, tokens, inputs, outputs: one number; odd, past a block each way; the model's width.
CASES = [(1, 1, 2, 1), (3, 37, 71, 101), (1, 19, 1152, 40)]


def norm_linear(x: Tensor, *rest: Tensor) -> Tensor:
    """Without a sum before it."""
    return add_norm_linear(x, None, *rest)[1]


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


def added(case: tuple[int, int, int, int], sums: bool, dtype: torch.dtype) -> list[Any]:
    """x, h or None, and the rest."""
    x, *rest = inputs(*case, dtype=dtype)
    return [x, rand(*x.shape, dtype=dtype, seed=6) if sums else None, *rest]


@every_mode
@every_dtype
@pytest.mark.parametrize("sums", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "stream", "product"])
@pytest.mark.parametrize("case", [CASES[0], (2, 3, 200, 40), CASES[2]], ids=str)
def test_sum_and_norm_linear(case, used, sums, dtype, mode):
    B, N, D, E = case
    tensors = [t for t in added(case, sums, dtype) if t is not None]
    douts = [rand(B, N, D, dtype=dtype, seed=7), rand(B, N, E, dtype=dtype, seed=5)]

    def some(function: Any) -> Any:
        return lambda x, *rest: [function(x, *([] if sums else [None]), *rest)[i] for i in used]

    check(
        some(add_norm_linear),
        some(add_norm_linear_reference),
        tensors,
        trained=list(range(len(tensors) if 1 in used else 1 + sums)),
        douts=[douts[i] for i in used],
        mode=mode,
        largest=4.0 if D == 2 else 0.0,
    )


@every_dtype
def test_the_bits_are_those_of_a_sum_and_a_norm_linear(dtype):
    x, h, *rest = (t.requires_grad_() for t in added((2, 3, 200, 40), True, dtype))
    s, y = add_norm_linear(x, h, *rest)
    assert torch.equal(s, x + h) and torch.equal(y, norm_linear(x + h, *rest))
    ds, dy = (rand(*t.shape, dtype=dtype, seed=8) for t in (s, y))
    leaf = s.detach().requires_grad_()
    alone = torch.autograd.grad(norm_linear(leaf, *rest), [leaf, *rest], dy)
    dx, dh, *others = torch.autograd.grad([s, y], [x, h, *rest], [ds, dy], retain_graph=True)
    assert torch.equal(dx, dh) and all(torch.equal(a, b) for a, b in zip(others, alone[1:], strict=True))
    assert torch.equal(torch.autograd.grad(y, h, dy)[0], alone[0])


@pytest.mark.parametrize("sums", [True, False], ids=["sum", "alone"])
def test_a_compiler_takes_it_as_one_graph_and_may_trust_its_operators(sums):
    tensors: list[Any] = added((2, 5, 24, 8), sums, torch.float32)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def layer(x: Tensor, *rest: Any) -> Tensor:
        s, y = add_norm_linear(x * 1.5, *rest)
        return s.sin().sum(-1) + y.square().sum(-1)

    found = []
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = call(*tensors)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    detached: list[Any] = [t if t is None else t.detach() for t in tensors]
    x, h, shift, scale, weight, bias = detached
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._apply, (x, h, shift, scale, weight, bias, 1e-6), test_utils=checks)
    numbers = rand(2, 2, 5, seed=9).abs()
    ds = h if h is None else rand(*x.shape, seed=7)
    of = rand(2, 5, 8, seed=8), ds, x, shift, scale, weight, *numbers, 1e-6
    torch.library.opcheck(module._gradients, of, test_utils=checks)


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


@pytest.mark.parametrize("sums", [True, False], ids=["sum", "alone"])
def test_neither_the_result_of_the_norm_is_kept_nor_the_terms_of_the_sum(sums):
    tensors = added((1, 9, 24, 8), sums, torch.float32)
    for t in tensors:
        if t is not None:
            t.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        s, _ = add_norm_linear(*tensors)
    assert [t.data_ptr() for t in kept if t.shape == (1, 9, 24)] == [s.data_ptr()]
    assert (s.data_ptr() == tensors[0].data_ptr()) is not sums


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
