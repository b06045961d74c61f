"""Structural similarity, one value a frame.

Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity",
IEEE Transactions on Image Processing 13(4), 2004, eq. 13 with its own constants and window.
"""

import math

import torch
from torch import Tensor

from .frames import check_pair, unit_range

WINDOW = 11  # pixels a side
SIGMA = 1.5  # pixels, of the Gaussian window
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with data range L = 1


def ssim(pred_CFHW: Tensor, truth_CFHW: Tensor) -> Tensor:
    """Return the mean structural similarity, [F] float64, in [-1, 1]; 1 is equal.

    With means m, variances v and covariance c under the Gaussian window (weights sum to 1, so v and c are biased):
    ((2 m_x m_y + C1) (2 c + C2)) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)), for each channel of RGB on [0, 1] after
    clamping, averaged over the pixels whose whole window lies inside the frame, then over the channels.
    Raises ValueError for frames smaller than the window.
    """
    check_pair(pred_CFHW, truth_CFHW)
    height, width = pred_CFHW.shape[2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"frames are {height}x{width}; SSIM needs at least {WINDOW}x{WINDOW}")
    # One frame at a time: five float64 maps of a whole clip would take gigabytes.
    pairs = zip(pred_CFHW.unbind(1), truth_CFHW.unbind(1), strict=True)
    return torch.stack([_ssim_frame(unit_range(pred_CHW), unit_range(truth_CHW)) for pred_CHW, truth_CHW in pairs])


def _ssim_frame(x_CHW: Tensor, y_CHW: Tensor) -> Tensor:
    maps_MCHW = torch.stack((x_CHW, y_CHW, x_CHW * x_CHW, y_CHW * y_CHW, x_CHW * y_CHW))
    x_mean, y_mean, x_square, y_square, product = _blur(_blur(maps_MCHW, dim=-1), dim=-2)
    x_variance, y_variance = x_square - x_mean**2, y_square - y_mean**2
    covariance = product - x_mean * y_mean
    similar = (2 * x_mean * y_mean + C1) * (2 * covariance + C2)
    return (similar / ((x_mean**2 + y_mean**2 + C1) * (x_variance + y_variance + C2))).mean()


def _blur(maps: Tensor, dim: int) -> Tensor:
    """Weigh WINDOW neighbours along `dim` by the Gaussian; keeps the positions where all of them exist.

    Shifted sums rather than a convolution: exact in float64 on every device, with no choice of algorithm or TF32.
    """
    gaussian = [math.exp(-0.5 * ((i - WINDOW // 2) / SIGMA) ** 2) for i in range(WINDOW)]
    length = maps.shape[dim] - WINDOW + 1
    blurred = torch.zeros_like(maps.narrow(dim, 0, length))
    for i, weight in enumerate(gaussian):
        blurred.add_(maps.narrow(dim, i, length), alpha=weight / sum(gaussian))
    return blurred
