"""Layer norm, modulation and the down projection beside it; the residual sum before it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vidtta.kernels import norm_modulate as module
from vidtta.kernels.norm_modulate import (
    add_norm_modulate,
    add_norm_modulate_reference,
    add_norm_quantize,
    norm_modulate,
    norm_modulate_reference,
)
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
    _, values, scales, low, mean, rstd = add_norm_quantize(x, None, shift, scale, down, 16)
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


# samples, tokens, channels and rank: one number; odd rows and channels, past a block each way; the model's width, few rows and many.
ADDED = [((1, 1, 1), 0), ((2, 3, 200), 3), ((2, 45, 37), 0), ((1, 3, 1152), 0), ((1, 33, 1152), 16)]


def added(shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> list[Tensor]:
    """x, h, shift, scale, and down with a rank."""
    x, shift, scale = inputs(shape, dtype)
    down = [rand(rank, shape[2], dtype=dtype, scale=shape[2] ** -0.5, seed=4)] if rank else []
    return [x, rand(*shape, dtype=dtype, seed=6), shift, scale, *down]


def without_h(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *rest: function(x, None, *rest)


@every_mode
@every_dtype
@pytest.mark.parametrize("sums", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "stream", "norm"])
@pytest.mark.parametrize(("shape", "rank"), ADDED, ids=str)
def test_sum_and_norm(shape, rank, used, sums, dtype, mode):
    """Of all inputs, whether the stream goes on, the norm, or both."""
    tensors = added(shape, rank, dtype)
    if not sums:
        del tensors[1]
    ours, reference = (f if sums else without_h(f) for f in (add_norm_modulate, add_norm_modulate_reference))
    B, N, D = shape
    douts = [rand(*shape, dtype=dtype, seed=7), rand(B, N, D + 16 * bool(rank), dtype=dtype, seed=5)]
    check(
        lambda *t: [ours(*t)[i] for i in used],
        lambda *t: [reference(*t)[i] for i in used],
        tensors,
        trained=list(range(len(tensors) if 1 in used else 1 + sums)),
        douts=[douts[i] for i in used],
        mode=mode,
        **slack(D),
    )


@every_dtype
@pytest.mark.parametrize(("shape", "rank"), ADDED, ids=str)
def test_the_bits_are_those_of_a_sum_and_a_norm(shape, rank, dtype):
    x, h, *rest = (t.requires_grad_() for t in added(shape, rank, dtype))
    s, n = add_norm_modulate(x, h, *rest)
    assert torch.equal(s, x + h) and torch.equal(n, norm_modulate(x + h, *rest))
    dn, ds = rand(*n.shape, dtype=dtype, seed=5), rand(*s.shape, dtype=dtype, seed=7)
    alone = torch.autograd.grad(norm_modulate(s.detach().requires_grad_(), *rest), rest, dn)
    dx, dh, *others = torch.autograd.grad([s, n], [x, h, *rest], [ds, dn])
    assert torch.equal(dx, dh) and all(torch.equal(a, b) for a, b in zip(others, alone, strict=True))
    again = torch.autograd.grad(add_norm_modulate(x, h, *rest), [x, h, *rest], [ds, dn])
    assert all(torch.equal(a, b) for a, b in zip(again, [dx, dh, *others], strict=True))
    # Without another gradient it is the norm's own.
    through = (x + h).detach().requires_grad_()
    found = torch.autograd.grad(add_norm_modulate(x, h, *rest)[1], h, dn)
    assert torch.equal(found[0], torch.autograd.grad(norm_modulate(through, *rest), through, dn)[0])
    assert torch.equal(torch.autograd.grad(add_norm_modulate(x, h, *rest)[0], h, ds)[0], ds)


def test_without_h_the_stream_is_x_itself():
    x, _, shift, scale = added((2, 9, 40), 0, torch.float32)
    for leaf in (x, x.clone().requires_grad_()):
        s, n = add_norm_modulate(leaf, None, shift, scale)
        assert s.data_ptr() == leaf.data_ptr() and s.requires_grad == n.requires_grad == leaf.requires_grad


@pytest.mark.parametrize("sums", [True, False], ids=["sum", "alone"])
def test_what_is_kept_is_the_sum(sums):
    x, h, *rest = (t.requires_grad_() for t in added((2, 9, 40), 3, torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        s, _ = add_norm_modulate(x, h if sums else None, *rest)
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [s.data_ptr()]


@pytest.mark.parametrize("frozen", [(0, 2, 3), (1, 2, 3), (0, 1, 2, 3)], ids=str)
def test_only_what_is_wanted_gets_a_gradient(frozen):
    tensors = added((2, 9, 40), 3, torch.float32)
    for i, t in enumerate(tensors):
        t.requires_grad_(i not in frozen)
    s, n = add_norm_modulate(*tensors)
    (s.sum() + n.square().sum()).backward()
    assert [t.grad is None for t in tensors] == [i in frozen for i in range(5)]


@pytest.mark.parametrize("sums", [True, False], ids=["sum", "alone"])
def test_a_compiler_takes_it_as_one_graph_with_the_same_gradients(sums, monkeypatch):
    """With a stand-in for the kernels, which are compiled on a GPU alone: what is traced is who gets which gradient."""

    def forward(x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, down: Tensor | None, eps: float) -> Any:
        s, n = add_norm_modulate_reference(x, h, shift, scale, down, eps)
        return n, s, s.mean(-1), (s.var(-1, correction=0) + eps).rsqrt()

    def gradients(dout: Tensor, dlow: Tensor, ds: Tensor | None, s: Tensor, shift: Tensor, *_: Any) -> Any:
        return dout * 2 + (0 if ds is None else ds), dout.sum(1, keepdim=True), dout.mean(1, keepdim=True), None

    monkeypatch.setattr(module, "_forward", forward)
    monkeypatch.setattr(module, "norm_gradients", gradients)
    tensors = [t.requires_grad_() for t in added((2, 5, 8), 0, torch.float32)]
    if not sums:
        del tensors[1]
    function = add_norm_modulate if sums else without_h(add_norm_modulate)

    def layer(x: Tensor, *rest: Tensor) -> Tensor:
        s, n = function(x * 1.5, *rest)
        return s + n.sin()

    found = []
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = call(*tensors)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), tensors)])
        with torch.no_grad():
            assert torch.equal(call(*tensors), found[0][0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_dtype
@pytest.mark.usefixtures("float8_cast")
@pytest.mark.parametrize(("shape", "rank"), [((2, 9, 37), 3), ((1, 5, 1152), 0)], ids=str)
def test_rows_in_float8_of_a_sum_are_those_of_the_sum(shape, rank, dtype):
    x, h, *rest = added(shape, rank, dtype)
    found, expected = (add_norm_quantize(*terms, *rest, multiple=16) for terms in ((x, h), (x + h, None)))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(*(t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (a, b)))


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


def test_a_wrong_h_is_named():
    x, h, *rest = added((2, 3, 8), 0, torch.float32)
    with pytest.raises(ValueError, match=r"add_norm_modulate: h is \[2, 3, 7\], x \[2, 3, 8\]"):
        add_norm_modulate(x, h[..., 1:], *rest)
    with pytest.raises(ValueError, match="must share device and dtype"):
        add_norm_modulate(x, h.half(), *rest)
