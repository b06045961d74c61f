"""The VAE's passes between two convolutions, channels last: group norm, SiLU, nearest upsampling and zero padding in one.

cuDNN's convolutions are fastest channels last and without padding of their own; left apart, norm, SiLU, padding and upsampling
each read and write the whole tensor, and several go back to channels first. Here a norm is two kernels: one read for the
statistics, then one read and one write for all the rest; what is only resampled or padded takes the second alone.

Statistics: each program sums a channel's values less the first it meets (so a large mean does not swallow the variance); the
parts are merged with their own means (Chan's formula), in a fixed order. Forward only: the VAE is never trained here.
Axes: B samples, C channels, T frames, H x W pixels, N = T * H * W; a tensor [B, C, T, H, W] lies in memory as [B, T, H, W, C].
"""

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from .common import cdiv, check, check_runs, jit, power_of_two

GROUPS = 32
TILE = 4096  # elements of a program's tile in the pass that writes
STATISTICS_TILE = 2048
PROGRAMS = 1056  # of the statistics: eight on each multiprocessor of a Hopper card


def norm_silu_pad_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    groups: int = GROUPS,
    pad: bool = True,
    skip: Tensor | None = None,
) -> Tensor:
    """What the layers compute apart (engine/models/vae_layers.py), in whatever dtype the inputs have."""
    out = F.group_norm(x, groups, weight, bias, eps)
    if skip is not None:
        u = F.interpolate(skip, scale_factor=2.0, mode="nearest")
        return F.silu(out + u) + u
    return F.pad(F.silu(out), (1, 1, 1, 1, 2, 0)) if pad else F.silu(out)


def upsample_pad_reference(x: Tensor, time: int = 2, front: int = 2) -> Tensor:
    """Nearest neighbour, height and width twice and frames `time` times, then zeros: one around, `front` frames before."""
    up = x.repeat_interleave(time, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    return F.pad(up, (1, 1, 1, 1, front, 0))


@jit
def _sums_kernel(x_ptr, mean_ptr, square_ptr, N, each, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of `each` positions of one sample, every channel's mean and sum of squares about it."""
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    first = tl.program_id(0) * each
    last = tl.minimum(first + each, N)
    base = x_ptr + sample * N * C
    shift = tl.load(base + first.to(tl.int64) * C + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < last)[:, None] & (c < C)
        x = tl.load(base + p.to(tl.int64)[:, None] * C + c, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - shift, 0.0)
        total += x
        square += x * x
    count = (last - first).to(tl.float32)
    moved = tl.sum(total, 0) / count
    at = (sample * tl.num_programs(0) + tl.program_id(0)) * C + c
    tl.store(mean_ptr + at, shift + moved, mask=c < C)
    tl.store(square_ptr + at, tl.sum(square, 0) - count * moved * moved, mask=c < C)


@jit
def _affine_kernel(
    mean_ptr, square_ptr, weight_ptr, bias_ptr, factor_ptr, offset_ptr, N, each, programs,
    C: tl.constexpr, GROUPS: tl.constexpr, EPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one group and turn norm and affine parameters into x * factor + offset for each channel."""
    SIZE: tl.constexpr = C // GROUPS
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) * SIZE + c
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (c < SIZE)
        count = (tl.minimum((p + 1) * each, N) - p * each).to(tl.float32)[:, None]
        part = tl.load(mean_ptr + (sample * programs + p[:, None]) * C + channel, mask=inside, other=0.0)
        total += tl.where(inside, count * part, 0.0)
    mean = tl.sum(tl.sum(total, 1), 0) / N / SIZE
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (c < SIZE)
        count = (tl.minimum((p + 1) * each, N) - p * each).to(tl.float32)[:, None]
        at = (sample * programs + p[:, None]) * C + channel
        part = tl.load(mean_ptr + at, mask=inside, other=0.0) - mean
        total += tl.where(inside, tl.load(square_ptr + at, mask=inside, other=0.0) + count * part * part, 0.0)
    rstd = tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / N / SIZE + EPS)
    weight = tl.load(weight_ptr + channel, mask=c < SIZE, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=c < SIZE, other=0.0).to(tl.float32)
    tl.store(factor_ptr + sample * C + channel, rstd * weight, mask=c < SIZE)
    tl.store(offset_ptr + sample * C + channel, bias - mean * rstd * weight, mask=c < SIZE)


@jit
def _write_kernel(
    x_ptr, factor_ptr, offset_ptr, skip_ptr, out_ptr, T, H, W,
    C: tl.constexpr, NORM: tl.constexpr, SKIP: tl.constexpr, TIMES: tl.constexpr, SIDES: tl.constexpr,
    FRONT: tl.constexpr, AROUND: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of an output row. T, H, W: of the input."""
    sample = tl.program_id(2).to(tl.int64)
    height, width = H * SIDES + 2 * AROUND, W * SIDES + 2 * AROUND
    t = tl.program_id(0) // height
    h = tl.program_id(0) % height
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    c = tl.arange(0, BLOCK_C)
    from_t, from_h, from_w = t - FRONT, h - AROUND, w - AROUND
    real = (from_t >= 0) & (from_h >= 0) & (from_h < H * SIDES) & (from_w >= 0) & (from_w < W * SIDES)
    row = (sample * T + from_t // TIMES) * H + from_h // SIDES
    inside = real[:, None] & (c < C)
    x = tl.load(x_ptr + (row * W + from_w // SIDES)[:, None] * C + c, mask=inside, other=0.0)
    if NORM:
        factor = tl.load(factor_ptr + sample * C + c, mask=c < C, other=0.0)
        offset = tl.load(offset_ptr + sample * C + c, mask=c < C, other=0.0)
        y = x.to(tl.float32) * factor + offset
        if SKIP:
            # The skip is stored at half the size in time, height and width.
            half = ((sample * (T // 2) + from_t // 2) * (H // 2) + from_h // 2) * (W // 2)
            u = tl.load(skip_ptr + (half + from_w // 2)[:, None] * C + c, mask=inside, other=0.0).to(tl.float32)
            y += u
            y = y / (1.0 + tl.exp(-y)) + u
        else:
            y = y / (1.0 + tl.exp(-y))
        x = tl.where(inside, y, 0.0).to(out_ptr.dtype.element_ty)
    frames = T * TIMES + FRONT
    to = ((sample * frames + t) * height + h) * width + w
    tl.store(out_ptr + to[:, None] * C + c, x, mask=(w < width)[:, None] & (c < C))


def _affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """Factor and offset that norm and affine parameters amount to, [B, C] float32 each."""
    B, C, T, H, W = x.shape
    N = T * H * W
    block = power_of_two(C)
    rows = max(1, STATISTICS_TILE // block)
    each = cdiv(cdiv(N, PROGRAMS), rows) * rows
    programs = cdiv(N, each)
    means, squares = (x.new_empty(B, programs, C, dtype=torch.float32) for _ in range(2))
    _sums_kernel[(programs, B)](x, means, squares, N, each, C=C, BLOCK_P=rows, BLOCK_C=block, num_warps=4)
    factor, offset = (x.new_empty(B, C, dtype=torch.float32) for _ in range(2))
    _affine_kernel[(groups, B)](
        means, squares, weight, bias, factor, offset, N, each, programs,
        C=C, GROUPS=groups, EPS=eps, BLOCK_P=min(256, power_of_two(programs)), BLOCK_C=power_of_two(C // groups), num_warps=4,
    )  # fmt: skip
    return factor, offset


def _write(
    x: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    skip: Tensor | None,
    times: int,
    sides: int,
    front: int,
    around: int,
) -> Tensor:
    B, C, T, H, W = x.shape
    shape = (T * times + front, H * sides + 2 * around, W * sides + 2 * around)
    # Made in the order of memory, then named in the order of axes: empty storage stays as it is under any fill mode.
    out = x.new_empty(B, *shape, C).movedim(-1, 1)
    block = power_of_two(C)
    width = max(1, min(TILE // block, power_of_two(shape[2])))
    _write_kernel[(shape[0] * shape[1], cdiv(shape[2], width), B)](
        x, x if affine is None else affine[0], x if affine is None else affine[1], x if skip is None else skip, out, T, H, W,
        C=C, NORM=affine is not None, SKIP=skip is not None, TIMES=times, SIDES=sides, FRONT=front, AROUND=around,
        BLOCK_W=width, BLOCK_C=block, num_warps=4,
    )  # fmt: skip
    return out


def _check_layout(name: str, *tensors: Tensor) -> None:
    for t in tensors:
        check(t.ndim == 5, f"{name}: a tensor is {list(t.shape)}, needs [B, C, T, H, W]")
        check(
            t.is_contiguous(memory_format=torch.channels_last_3d),
            f"{name}: a tensor of {list(t.shape)} has strides {t.stride()}; it must be contiguous in memory format channels_last_3d",
        )
        check(
            not (torch.is_grad_enabled() and t.requires_grad),
            f"{name}: forward only, but its input wants a gradient; use torch.no_grad or the reference",
        )


def norm_silu_pad(
    x: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float = 1e-6,
    groups: int = GROUPS,
    pad: bool = True,
    skip: Tensor | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x)), with `pad` in a frame of zeros: two frames in front, one pixel around. Forward only.

    x: [B, C, T, H, W], channels_last_3d, float32 or 16 bits; so is the result. weight, bias: [C], x's dtype.
    skip: [B, C, T/2, H/2, W/2]; then the result is SiLU(GroupNorm(x) + u) + u with u its nearest upsampling, not padded
    (`pad` must be False). Raises ValueError when shapes, dtypes, devices or memory formats disagree, or for a gradient.
    """
    check_runs("norm_silu_pad", x, weight_C, bias_C, *(() if skip is None else (skip,)))
    _check_layout("norm_silu_pad", x, *(() if skip is None else (skip,)))
    B, C, T, H, W = x.shape
    check(
        weight_C.shape == bias_C.shape == (C,) and C % groups == 0,
        f"norm_silu_pad: weight and bias are {list(weight_C.shape)} and {list(bias_C.shape)}; "
        f"x {[B, C, T, H, W]} needs [{C}], a multiple of {groups} groups",
    )
    if skip is not None:
        check(not pad, "norm_silu_pad: with a skip the result is not padded; pass pad=False")
        check(
            (*skip.shape[:2], *(2 * n for n in skip.shape[2:])) == (B, C, T, H, W),
            f"norm_silu_pad: skip is {list(skip.shape)}; x {[B, C, T, H, W]} needs half of its frames, height and width",
        )
    affine = _affine(x, weight_C.contiguous(), bias_C.contiguous(), eps, groups)
    return _write(x, affine, skip, 1, 1, 2 if pad else 0, 1 if pad else 0)


def upsample_pad(x: Tensor, time: int = 2, front: int = 2) -> Tensor:
    """Nearest upsampling, height and width twice and frames `time` times (1 or 2), framed by zeros: one pixel around, `front`
    frames before. Forward only. x: as in `norm_silu_pad`. Raises ValueError likewise."""
    check_runs("upsample_pad", x)
    _check_layout("upsample_pad", x)
    check(
        time in (1, 2) and front in (0, 2),
        f"upsample_pad: time must be 1 or 2 and front 0 or 2, were {time} and {front}",
    )
    return _write(x, None, None, time, 2, front, 1)
