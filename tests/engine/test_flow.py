"""The timestep shift, the signs of the flow, and the distribution of training timesteps."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from vidtta.engine.flow import (
    add_noise,
    logit_normal_timestep,
    sampling_timesteps,
    timestep_transform,
    training_loss,
    velocity_target,
)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Fact sheet 5.1, at 480 x 640: pixel frames, r exact, r in bfloat16, then the first three and the last of 30 steps in bfloat16.
SHIFTS = [
    (17, 2.16506, 2.171875, [1000, 984.371, 968.159, 69.674]),
    (21, 2.42061, 2.421875, [1000, 985.962, 971.352, 77.076]),
    (22, 2.42061, 2.421875, [1000, 985.962, 971.352, 77.076]),
    (33, 3.06186, 3.078125, [1000, 988.922, 977.321, 95.957]),
    (45, 3.59035, 3.59375, [1000, 990.496, 980.512, 110.259]),
    (49, 3.75000, 3.765625, [1000, 990.926, 981.385, 114.926]),
]


def ratio(num_frames: int, dtype: torch.dtype, height: float = 480, width: float = 640) -> float:
    """r, from r s / (1 + (r - 1) s) at s = 1 / 2."""
    s = timestep_transform(torch.tensor([500.0]), height, width, num_frames, dtype).double().item() / 1000
    return s / (1 - s)


@pytest.mark.parametrize(("num_frames", "exact", "rounded", "ends"), SHIFTS)
def test_shift_of_the_timesteps(num_frames: int, exact: float, rounded: float, ends: list[float]):
    assert ratio(num_frames, torch.float32) == pytest.approx(exact, abs=1e-5)
    assert ratio(num_frames, torch.bfloat16) == pytest.approx(rounded, abs=1e-5)
    t = sampling_timesteps(30, 480, 640, num_frames, torch.bfloat16)
    assert t.shape == (30,) and t.dtype == torch.float32
    assert t[[0, 1, 2, -1]].tolist() == pytest.approx(ends, abs=1e-3)
    assert (t.diff() < 0).all()


def test_shift_grows_with_the_picture_and_an_image_has_no_time():
    assert ratio(1, torch.float32, 512, 512) == pytest.approx(1.0, abs=1e-6)
    assert ratio(1, torch.float32, 1024, 1024) == pytest.approx(2.0, abs=1e-6)
    assert ratio(5, torch.float32, 512, 512) == pytest.approx(1.0, abs=1e-6)
    assert sampling_timesteps(4, 512, 512, 1).tolist() == pytest.approx([1000, 750, 500, 250], abs=1e-4)
    ends = timestep_transform(torch.tensor([0.0, 1000.0]), 480, 640, 49)
    assert ends.tolist() == [0.0, 1000.0]


def test_noise_and_velocity_have_their_signs():
    x0, eps, t = noise(1, 2, 4, 3), noise(2, 2, 4, 3), torch.tensor([0.0, 1000.0])
    x_t = add_noise(x0, eps, t)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[1], eps[1])  # 0 is clean, 1000 is noise
    assert torch.equal(velocity_target(x0, eps), x0 - eps)
    for level in (torch.tensor(300.0), torch.tensor([300.0, 900.0])):
        s = level.reshape(-1, 1, 1) / 1000
        recovered = add_noise(x0, eps, level) + velocity_target(x0, eps) * s
        torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-6)


def test_noised_latents_are_float32():
    x_t = add_noise(noise(1, 1, 4).bfloat16(), noise(2, 1, 4).bfloat16(), torch.tensor([250.0]))
    assert x_t.dtype == torch.float32
    expected = 0.75 * noise(1, 1, 4).bfloat16().float() + 0.25 * noise(2, 1, 4).bfloat16().float()
    torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-6)


def test_euler_with_the_exact_velocity_recovers_the_clip():
    x0, eps = noise(1, 1, 4, 3, 2, 2), noise(2, 1, 4, 3, 2, 2)
    levels = [*sampling_timesteps(30, 480, 640, 49).tolist(), 0.0]
    z = eps
    for now, after in pairwise(levels):
        z = z + velocity_target(x0, eps) * (now - after) / 1000
        torch.testing.assert_close(z, add_noise(x0, eps, torch.tensor(after)), rtol=0, atol=1e-5)
    torch.testing.assert_close(z, x0, rtol=0, atol=1e-5)


# Fact sheet 5.2: quantiles of the training timesteps of 45 frames at 480 x 640.
QUANTILES = {0.01: 257, 0.10: 498, 0.25: 645, 0.50: 782, 0.75: 875, 0.90: 928, 0.99: 973}


def test_training_timesteps_follow_the_logit_normal():
    levels = torch.tensor(list(QUANTILES))
    exact = torch.special.ndtri(levels).sigmoid() * 1000  # all steps are monotone, so quantiles map to quantiles
    shifted = timestep_transform(exact, 480, 640, 45)
    # The sheet's numbers are counted from draws of the official code; with r of 49 frames the median would be 789.
    assert shifted.tolist() == pytest.approx(list(QUANTILES.values()), abs=3)

    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([logit_normal_timestep(generator) for _ in range(8000)])
    below = (drawn[:, None] < exact).float().mean(0)
    assert drawn.dtype == torch.float32
    assert below.tolist() == pytest.approx(list(QUANTILES), abs=0.015)


def test_a_training_timestep_comes_from_its_generator():
    one, same = (logit_normal_timestep(torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.shape == (1,) and torch.equal(one, same)
    assert not torch.equal(one, logit_normal_timestep(torch.Generator().manual_seed(6)))


def test_training_loss_is_the_mean_squared_error_of_the_velocity():
    x0, eps, v = noise(1, 2, 3, 4), noise(2, 2, 3, 4), noise(3, 2, 3, 4)
    expected = ((v - (x0 - eps)) ** 2).flatten(1).mean(1).mean()
    assert training_loss(v, x0, eps).item() == pytest.approx(expected.item(), rel=1e-6)
    assert training_loss(x0 - eps, x0, eps).item() == 0
    loss = training_loss(v.bfloat16(), x0.bfloat16(), eps.bfloat16())
    assert loss.dtype == torch.float32
