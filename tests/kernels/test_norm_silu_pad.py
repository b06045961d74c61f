"""The VAE's norm, SiLU, upsampling and padding, channels last."""

import pytest
import torch
from torch import Tensor
from vidtta.engine.models.vae_layers import CausalConv3d, ResBlock, UpResidual
from vidtta.kernels.norm_silu_pad import (
    norm_silu_pad,
    norm_silu_pad_reference,
    upsample_pad,
    upsample_pad_reference,
)

from tests.kernels.accuracy import DEVICE, assert_as_accurate, compiled, every_dtype, every_mode, rand

# B, C, T, H, W and groups: one pixel (torch wants two channels a group then); odd sizes, two samples, channels that are no
# power of two; a real width.
CASES = [((1, 64, 1, 1, 1), 32), ((2, 12, 3, 5, 7), 4), ((1, 128, 2, 3, 37), 32)]


def channels_last(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    # A mean well away from zero makes a careless variance fail.
    return (rand(*shape, dtype=dtype, seed=seed) * 2 + 5).contiguous(memory_format=torch.channels_last_3d)


def compare(ours, reference, inputs: list[Tensor], mode: str) -> None:
    before = [t.clone() for t in inputs]
    function = ours if mode == "eager" else compiled(ours)
    with torch.no_grad():
        actual = function(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was overwritten"
    assert actual.is_contiguous(memory_format=torch.channels_last_3d)
    assert_as_accurate(actual, reference(*(t.double() for t in inputs)), reference(*inputs))


@every_mode
@every_dtype
@pytest.mark.parametrize("pad", [True, False], ids=["padded", "plain"])
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_norm_silu_pad(shape, groups, pad, dtype, mode):
    weight, bias = (rand(shape[1], dtype=dtype, seed=s) for s in (1, 2))
    compare(
        lambda *t: norm_silu_pad(*t, groups=groups, pad=pad),
        lambda *t: norm_silu_pad_reference(*t, groups=groups, pad=pad),
        [channels_last(*shape, dtype=dtype), weight, bias],
        mode,
    )


@every_mode
@every_dtype
def test_with_the_upsampled_skip(dtype, mode):
    weight, bias = (rand(12, dtype=dtype, seed=s) for s in (1, 2))
    x, skip = channels_last(2, 12, 4, 6, 10, dtype=dtype), channels_last(2, 12, 2, 3, 5, dtype=dtype, seed=3)
    compare(
        lambda x, w, b, skip: norm_silu_pad(x, w, b, 1e-5, 4, False, skip),
        lambda x, w, b, skip: norm_silu_pad_reference(x, w, b, 1e-5, 4, False, skip),
        [x, weight, bias, skip],
        mode,
    )


@every_mode
@every_dtype
@pytest.mark.parametrize(("time", "front"), [(1, 0), (2, 2)])
def test_upsample_and_pad_move_bits(time, front, dtype, mode):
    x = channels_last(2, 5, 3, 4, 7, dtype=dtype)
    function = upsample_pad if mode == "eager" else compiled(upsample_pad)
    assert torch.equal(function(x, time, front), upsample_pad_reference(x, time, front))


def test_statistics_survive_a_large_mean():
    """Mean 1000, deviation 1: the square of the sum and the sum of the squares would cancel in float32."""
    x = channels_last(1, 32, 4, 40, 50, dtype=torch.float32) / 2 + 1000
    ones = torch.ones(32, device=DEVICE)
    ours = norm_silu_pad(x, ones, 0 * ones, groups=4, pad=False)
    assert torch.allclose(
        ours.double(),
        norm_silu_pad_reference(x.double(), ones.double(), 0 * ones.double(), groups=4, pad=False),
        atol=1e-3,
    )


def test_padding_is_zero_whatever_the_norm_adds():
    out = norm_silu_pad(channels_last(1, 32, 2, 3, 4, dtype=torch.float32), *(rand(32, seed=s) for s in (1, 2)))
    inner = torch.zeros_like(out, dtype=torch.bool)
    inner[:, :, 2:, 1:-1, 1:-1] = True
    assert (out[~inner] == 0).all() and (out[inner] != 0).all()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def convolve(conv: CausalConv3d, padded: Tensor) -> Tensor:
    return torch.nn.functional.conv3d(padded, conv.conv.weight, conv.conv.bias)


@pytest.mark.usefixtures("no_grad")
def test_a_res_block_built_on_it_is_the_models():
    torch.manual_seed(0)
    block = ResBlock(32, 64).to(DEVICE)
    x = channels_last(1, 32, 3, 5, 6, dtype=torch.float32)
    h = convolve(block.conv1, norm_silu_pad(x, block.norm1.weight, block.norm1.bias))
    h = h.contiguous(memory_format=torch.channels_last_3d)
    out = block.nin_shortcut(x) + convolve(block.conv2, norm_silu_pad(h, block.norm2.weight, block.norm2.bias))
    assert torch.allclose(out, block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_grad")
def test_an_upsampling_block_built_on_it_is_the_models():
    torch.manual_seed(0)
    block = UpResidual(32).to(DEVICE)
    x = channels_last(1, 32, 2, 3, 4, dtype=torch.float32)

    def last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last_3d)

    a = last(convolve(block.conv1, upsample_pad(x)))
    y = last(convolve(block.conv2, norm_silu_pad(a, block.norm1.weight, block.norm1.bias, 1e-5)))
    ours = norm_silu_pad(y, block.norm2.weight, block.norm2.bias, 1e-5, pad=False, skip=x)
    plain = block(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do_is_named():
    x, weight = channels_last(1, 32, 2, 3, 4, dtype=torch.float32), rand(32)
    with pytest.raises(ValueError, match="channels_last_3d"):
        norm_silu_pad(x.contiguous(), weight, weight)
    with pytest.raises(ValueError, match="forward only"):
        norm_silu_pad(x.clone().requires_grad_(), weight, weight)
    with pytest.raises(ValueError, match=r"needs \[32\]"):
        norm_silu_pad(x, rand(16), rand(16))
    with pytest.raises(ValueError, match="half of its frames"):
        norm_silu_pad(x, weight, weight, pad=False, skip=x)
