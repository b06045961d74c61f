"""Rectified flow in Open-Sora v1.3's convention.

t runs from 0 (clean) to 1000 (noise), s = t / 1000; x_t = (1 - s) x0 + s noise; the network predicts the velocity
v = x0 - noise; from noise one steps x <- x + v ds. Source: arXiv:2209.03003 and the official scheduler.
"""

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000.0


def timestep_transform(
    t: Tensor, height: float, width: float, num_frames: int, size_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Shift timesteps towards noise for large and long videos; t and the result are float32, 0..1000.

    r = sqrt(height width / 512^2) sqrt((num_frames - 1) // 4), s' = r s / (1 + (r - 1) s). height, width: pixels; num_frames:
    pixel frames, 1 is an image (time factor 1). The official scripts hold the sizes in the model's dtype, so r is computed in
    `size_dtype`.
    """
    height_, width_ = (torch.tensor([float(side)], dtype=size_dtype) for side in (height, width))
    space = (height_ * width_ / 512**2).sqrt()
    time = 1 if num_frames == 1 else torch.tensor([float((num_frames - 1) // 4)], dtype=size_dtype).sqrt()
    ratio = (space * time).to(t.device)
    s = t.float() / NUM_TIMESTEPS
    return ratio * s / (1 + (ratio - 1) * s) * NUM_TIMESTEPS


def sampling_timesteps(
    steps: int, height: float, width: float, num_frames: int, size_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sampler's grid, [steps] float32, from 1000 downwards: 1000 (1 - i / steps), transformed."""
    t = torch.tensor([(1.0 - i / steps) * NUM_TIMESTEPS for i in range(steps)])
    return timestep_transform(t, height, width, num_frames, size_dtype)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t in float32; t: [B] or scalar, 0..1000."""
    s = (t.float() / NUM_TIMESTEPS).reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - s) * x0.float() + s * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network should predict: x0 - noise."""
    return x0 - noise


def logit_normal_timestep(generator: torch.Generator) -> Tensor:
    """One training timestep before the transform, [1] float32: 1000 sigmoid(N(0, 1))."""
    return torch.randn(1, generator=generator).sigmoid() * NUM_TIMESTEPS


def training_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """The official training loss: mean over samples of the mean squared error to x0 - noise, every frame with weight 1."""
    return (velocity.float() - velocity_target(x0, noise).float()).square().mean()
