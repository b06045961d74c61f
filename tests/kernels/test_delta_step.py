"""A step of AdamW on the vectors of a delta, from the gradients of its draws to what the next step reads."""

import pytest
import torch
from torch import Tensor
from vidtta.kernels.delta_step import DeltaSteps, Rule, delta_step_reference, first_of_range

from tests.kernels.accuracy import DEVICE, assert_as_accurate, rand

RULE = Rule([0.3, 0.2, 0.1])
ALL = Rule([0.3, 0.2, 0.1], (0.8, 0.95), 1e-6, decay=0.1, ridge=0.05, clip=0.5)
# One of all; ranges of one and of several draws, odd; the model's width, with outputs for two programs and one over.
CASES = [([0], 2, 1, RULE), ([0, 1, 1, 2], 37, 5, ALL), ([0, 0, 1], 37, 5, RULE), ([0, 0], 1152, 9, ALL)]


def by_reference(
    start: Tensor,
    gradients: list[Tensor],
    ranges: list[int],
    maps: Tensor,
    rule: Rule,
    centre: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Deltas before each step and after the last, norms, and what the next step reads."""
    delta, maps = start.to(dtype), maps.to(dtype)
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    deltas, norms = [delta], []
    for step, gradient in enumerate(gradients):
        delta, first, second, norm = delta_step_reference(gradient.to(dtype), ranges, delta, first, second, step, rule)
        deltas.append(delta)
        norms.append(norm)
    of_draws = delta[ranges]
    centred = of_draws - of_draws.mean(-1, keepdim=True)
    return [
        torch.stack(deltas),
        torch.tensor(norms, dtype=dtype, device=DEVICE),
        (maps * (centred if centre else of_draws)[:, None]).sum(-1),
        centred,
    ]


@pytest.mark.parametrize("centre", [False, True], ids=["linear", "pre"])
@pytest.mark.parametrize(("ranges", "D", "C", "rule"), CASES, ids=["one", "all", "plain", "model"])
def test_steps(ranges, D, C, rule, centre):
    K, R = len(ranges), ranges[-1] + 1
    maps, start = rand(K, C, D, scale=D**-0.5, seed=1), rand(R, D, seed=2)
    gradients = [rand(K, D, seed=3 + step) for step in range(3)]
    steps = DeltaSteps(start, ranges, maps, rule, centre)
    for taken in range(4):
        truth, torch32 = (
            by_reference(start, gradients[:taken], ranges, maps, rule, centre, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        ours = [steps.deltas[: taken + 1], steps.norms[:taken], steps.added, steps.centred]
        names = ["deltas", "norms", "added", *(["centred"] if centre else [])]
        for name, actual, exact, baseline in zip(names, ours, truth, torch32, strict=False):
            assert_as_accurate(actual, exact, baseline, name)
        if taken < 3:
            steps.take(gradients[taken])


def test_the_reference_is_torchs():
    """Clipping, AdamW and a ridge, by torch's own functions in float64."""
    ranges, gradients = [0, 0, 1], [rand(3, 7, seed=step).double() for step in range(3)]
    leaf = rand(2, 7, seed=9).double().requires_grad_()
    delta, first, second = leaf.detach().clone(), torch.zeros_like(leaf), torch.zeros_like(leaf)
    optimizer = torch.optim.AdamW([leaf], betas=ALL.betas, eps=ALL.eps, weight_decay=ALL.decay)
    for step, gradient in enumerate(gradients):
        ((gradient * leaf[ranges]).sum() + ALL.ridge * leaf.square().sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_([leaf], ALL.clip)
        optimizer.param_groups[0]["lr"] = ALL.rates[step]
        optimizer.step()
        optimizer.zero_grad()
        delta, first, second, ours = delta_step_reference(gradient, ranges, delta, first, second, step, ALL)
        torch.testing.assert_close(ours, norm)
        torch.testing.assert_close(delta, leaf.detach())


def test_the_same_bits_again():
    found = []
    for _ in range(2):
        steps = DeltaSteps(rand(2, 9), [0, 0, 1], rand(3, 4, 9, seed=1), ALL, True)
        steps.take(rand(3, 9, seed=2))
        found.append([steps.deltas, steps.norms[:1], steps.added, steps.centred])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_where_the_ranges_begin():
    assert first_of_range([0, 0, 1, 2, 2]) == [0, 2, 3, 5]
    for ranges in ([0, 2], [1, 1], [0, 1, 0]):
        with pytest.raises(ValueError, match=r"must rise from 0 without gaps"):
            first_of_range(ranges)


def test_what_does_not_fit_is_named():
    zeros = torch.zeros(3, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"start must be float32 \[ranges, 8\]"):
        DeltaSteps(torch.zeros(1, 7, device=DEVICE), [0, 0, 0], zeros, RULE, False)
    with pytest.raises(ValueError, match=r"the draws are of 1 ranges, start has 2"):
        DeltaSteps(torch.zeros(2, 8, device=DEVICE), [0, 0, 0], zeros, RULE, False)
    steps = DeltaSteps(torch.zeros(1, 8, device=DEVICE), [0, 0, 0], zeros, Rule([0.1]), False)
    with pytest.raises(ValueError, match=r"gradient is \[2, 8\], needs \[3, 8\]"):
        steps.take(torch.zeros(2, 8, device=DEVICE))
    steps.take(torch.zeros(3, 8, device=DEVICE))
    with pytest.raises(ValueError, match=r"all 1 steps are taken"):
        steps.take(torch.zeros(3, 8, device=DEVICE))
