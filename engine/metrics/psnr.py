"""Mean squared error and peak signal-to-noise ratio, one value a frame."""

from torch import Tensor

from .frames import check_pair, unit_range

PSNR_CAP = 100.0  # dB; stands for identical frames too, whose ratio is infinite and would swallow every mean


def mse(pred_CFHW: Tensor, truth_CFHW: Tensor) -> Tensor:
    """Return the mean squared difference over channels and pixels, [F] float64, in [0, 1]; 0 is equal.

    Both videos are [3, F, H, W] in [-1, 1]; they are clamped and mapped to [0, 1] first.
    """
    check_pair(pred_CFHW, truth_CFHW)
    return (unit_range(pred_CFHW) - unit_range(truth_CFHW)).square().mean(dim=(0, 2, 3))


def psnr(pred_CFHW: Tensor, truth_CFHW: Tensor) -> Tensor:
    """Return -10 log10(mse) in dB, [F] float64, in [0, PSNR_CAP]; more is better.

    The peak is 1, because `mse` is taken on [0, 1]; the error is pooled over RGB before the logarithm.
    """
    return (-10 * mse(pred_CFHW, truth_CFHW).log10()).clamp(max=PSNR_CAP)
