"""AdamW in one pass against float64: truth is the algorithm written out, the yardstick what torch.optim.AdamW errs in float32."""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor operations under private names alone)

import re

import pytest
import torch
from torch import Tensor
from vidtta.kernels.adamw_step import (
    AdamWState,
    Rates,
    adamw_step,
    adamw_step_reference,
    gradient_norm,
    gradient_norm_reference,
)

from tests.kernels.accuracy import DEVICE, DTYPES, assert_as_accurate, every_dtype, rand

# One number; odd; one less than a block; a few more than some; a chunk and a bit.
SMALL = [(1,), (3,), (1023,), (4097,)]
SHAPES = [*SMALL, (16384 + 7,)]
# The interpreter takes seconds for the whole: there the model's width by fewer, some tens of chunks and a part of one.
MODEL = (1152, 3456 if DEVICE == "cuda" else 343)
RATES = Rates(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, decay=0.1)
STEPS = 3


class Kept:
    """Weights and masters on the kernel, and what each step's gradients were."""

    def __init__(self, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> None:
        self.weights = [rand(*s, dtype=d, seed=i) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
        self.masters = [w if w.dtype == torch.float32 else w.float() for w in self.weights]
        self.starts = [m.clone() for m in self.masters]
        self.state = AdamWState(self.weights, self.masters)
        self.grads: list[list[Tensor | None]] = []

    def gradients(self, step: int, missing: tuple[int, ...] = ()) -> list[Tensor | None]:
        return [
            None if i in missing else rand(*w.shape, dtype=w.dtype, scale=10.0**-step, seed=100 * step + i)
            for i, w in enumerate(self.weights)
        ]

    def step(self, grads: list[Tensor | None], divisor: float = 1.0, rates: Rates = RATES) -> None:
        self.state.point(grads)
        adamw_step(self.state, torch.tensor(divisor, device=DEVICE), rates)
        self.grads.append(
            [None if g is None else g / divisor if divisor == 1.0 else g.float() / divisor for g in grads]
        )

    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.masters, *self.state.first, *self.state.second]


def adamw(starts: list[Tensor], grads: list[list[Tensor | None]], rates: Rates, dtype: torch.dtype) -> list[Tensor]:
    """torch.optim.AdamW's masters and moments after these steps, in a dtype: parameters, then first, then second moments."""
    leaves = [start.to(dtype).requires_grad_() for start in starts]
    optimizer = torch.optim.AdamW(leaves, rates.lr, rates.betas, rates.eps, rates.decay)
    for step in grads:
        for leaf, grad in zip(leaves, step, strict=True):
            leaf.grad = None if grad is None else grad.to(dtype)
        optimizer.step()
    states = [
        optimizer.state[leaf] or dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(leaf)) for leaf in leaves
    ]
    return [leaf.detach() for leaf in leaves] + [s[name] for name in ("exp_avg", "exp_avg_sq") for s in states]


def assert_is_adamw(kept: Kept, rates: Rates = RATES) -> None:
    truth, torch32 = (adamw(kept.starts, kept.grads, rates, dtype) for dtype in (torch.float64, torch.float32))
    actual = [*kept.masters, *kept.state.first, *kept.state.second]
    for i, (a, t, b) in enumerate(zip(actual, truth, torch32, strict=True)):
        assert_as_accurate(a, t, b, f"tensor {i}")
    for weight, master in zip(kept.weights, kept.masters, strict=True):
        assert torch.equal(weight, master.to(weight.dtype))  # rounded to nearest even, as torch casts


@every_dtype
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_adamw(dtype, decay):
    kept, rates = Kept(SHAPES, [dtype] * len(SHAPES)), RATES._replace(decay=decay)
    for step in range(STEPS):
        kept.step(kept.gradients(step), rates=rates)
    assert_is_adamw(kept, rates)


def test_steps_at_the_shape_of_the_model():
    kept = Kept([MODEL], DTYPES[-1:])
    for step in range(2):
        kept.step(kept.gradients(step))
    assert_is_adamw(kept)


def test_dtypes_may_be_mixed_and_the_learning_rate_may_change():
    kept = Kept(SMALL * 2, DTYPES * 4)
    assert len(kept.state.groups) == 2
    truth = [(s.double(), torch.zeros_like(s).double(), torch.zeros_like(s).double()) for s in kept.starts]
    one = torch.ones((), device=DEVICE)
    for step, lr in enumerate((1.0, 1e-3, 0.0)):  # 1 and 0 are numbers that Triton could take for constants
        rates = RATES._replace(lr=lr)
        grads = kept.gradients(step)
        kept.step(grads, rates=rates)
        truth = [
            adamw_step_reference(*t, g, step + 1, one, rates)
            for t, g in zip(truth, grads, strict=True)
            if g is not None
        ]
    for master, (exact, _, _) in zip(kept.masters, truth, strict=True):
        torch.testing.assert_close(master.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_reference_is_torchs_algorithm():
    start, grads = rand(31, 5).double(), [rand(31, 5, seed=i + 1).double() for i in range(STEPS)]
    state = start, torch.zeros_like(start), torch.zeros_like(start)
    for i, grad in enumerate(grads):
        state = adamw_step_reference(*state, 2 * grad, i + 1, torch.tensor(2.0), RATES)
    for a, b in zip(state, adamw([start], [[g] for g in grads], RATES, torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every_dtype
def test_a_parameter_without_gradient_keeps_its_state_and_its_count(dtype):
    kept = Kept(SMALL, [dtype] * 4)
    for step, missing in enumerate([(1,), (0, 1), (), (2,)]):
        before = [t.clone() for t in kept.tensors()]
        kept.step(kept.gradients(step, missing))
        for i, (now, then) in enumerate(zip(kept.tensors(), before, strict=True)):
            assert torch.equal(now, then) == (i % 4 in missing)
    assert_is_adamw(kept)


@every_dtype
def test_gradients_are_divided_before_anything_else(dtype):
    kept = Kept(SMALL, [dtype] * 4)
    for step, divisor in enumerate((1.0, 3.7, 1e4)):
        kept.step(kept.gradients(step), divisor)
    assert_is_adamw(kept)


@every_dtype
def test_a_divisor_of_nan_leaves_all_as_it_is(dtype):
    """Moments and counts too: the steps after it are those that would have been taken without it."""
    kept = Kept(SHAPES, [dtype] * len(SHAPES))
    kept.step(kept.gradients(0))
    before = [t.clone() for t in kept.tensors()]
    kept.step(kept.gradients(1), divisor=torch.nan)
    assert all(torch.equal(now, then) for now, then in zip(kept.tensors(), before, strict=True))
    kept.grads.pop()
    kept.step(kept.gradients(2))
    assert_is_adamw(kept)


def test_gradients_may_move_be_strided_or_lie_askew():
    """Addresses are read anew; a transposed gradient is copied; one that is not on 16 bytes is read in narrow loads."""
    kept, other = (Kept([(37, 64), (1023,)], [torch.float32] * 2) for _ in range(2))
    for step in range(STEPS):
        grads = kept.gradients(step)
        askew = [torch.empty(g.numel() + 1, device=DEVICE)[1:].view_as(g).copy_(g) for g in grads if g is not None]
        strided = askew[0].t().contiguous().t()
        assert not strided.is_contiguous() and askew[1].data_ptr() % 16
        kept.step(grads)
        other.step([strided, askew[1]])
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors(), other.tensors(), strict=True))


@every_dtype
def test_the_same_steps_have_the_same_bits(dtype):
    found = []
    for _ in range(2):
        kept, norms = Kept(SHAPES, [dtype] * len(SHAPES)), []
        for step in range(STEPS):
            kept.state.point(kept.gradients(step))
            norms.append(gradient_norm(kept.state))
            kept.step(kept.gradients(step), divisor=1.5)
        found.append([*kept.tensors(), *norms])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("missing", [(), (0, 2)])
@every_dtype
def test_gradient_norm(dtype, missing):
    kept = Kept(SHAPES, [dtype] * len(SHAPES))
    grads = kept.gradients(0, missing)
    kept.state.point(grads)
    given = [g for g in grads if g is not None]
    assert_as_accurate(
        gradient_norm(kept.state),
        gradient_norm_reference(given),
        torch.stack(torch._foreach_norm(given, 2, dtype=torch.float32)).norm(),
    )


def test_the_norm_is_of_all_dtypes_and_zero_without_gradients():
    kept = Kept(SMALL[:2], DTYPES)
    kept.state.point([torch.full_like(kept.weights[0], 3), torch.full_like(kept.weights[1], 4)])
    assert gradient_norm(kept.state).item() == pytest.approx((9 + 3 * 16) ** 0.5, rel=1e-6)
    kept.state.point([None, None])
    assert gradient_norm(kept.state).item() == 0


def test_empty_tensors_are_passed_over():
    kept = Kept([(0, 5), (3,)], [torch.float32] * 2)
    kept.step(kept.gradients(0))
    assert_is_adamw(kept)


@pytest.mark.parametrize(
    ("weight", "master", "grad", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3), None, "dtype must be float32, bfloat16 or float16"),
        (torch.zeros(3), torch.zeros(4), None, "weight 0 is torch.float32 [3]"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float16), None, "its master torch.float16 [3]"),
        (torch.zeros(4, 3).t(), torch.zeros(3, 4), None, "they must be contiguous"),
        (
            torch.zeros(3),
            torch.zeros(3),
            torch.zeros(4),
            "gradient 0 is torch.float32 [4], its weight torch.float32 [3]",
        ),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3).half(), "gradient 0 is torch.float16 [3]"),
    ],
)
def test_what_does_not_fit_is_named(weight, master, grad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AdamWState([weight.to(DEVICE)], [master.to(DEVICE)]).point([grad])
