"""Windows against zero padding with masked keys, normalisation's order of rounding, captions and known frames."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vidtta.engine.models.attention import (
    CrossAttention,
    RMSNorm,
    SelfAttention,
    TextStates,
    attend,
    windowed_attention,
)
from vidtta.engine.models.geometry import Geometry, build_geometry
from vidtta.engine.models.rope import Rope
from vidtta.engine.models.rule_weights import fill_by_rule


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, N, H, d]; mask: [B, L], True where a key may be seen."""
    logits = torch.einsum("bnhd,blhd->bhnl", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    return torch.einsum("bhnl,blhd->bnhd", logits.softmax(-1), v)


def padded_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The official way: pad rows and columns with zeros to multiples of 8, mask the padded keys, drop the padded queries."""
    B, T, rows, cols, H, d = q.shape
    down, across = -(-rows // 8), -(-cols // 8)
    valid = F.pad(torch.ones(rows, cols, dtype=torch.bool), (0, across * 8 - cols, 0, down * 8 - rows))

    def to_windows(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, across * 8 - cols, 0, down * 8 - rows)).view(B, T, down, 8, across, 8, H, d)
        return x.permute(0, 2, 4, 3, 5, 1, 6, 7).reshape(B * down * across, 64 * T, H, d)  # time runs fastest

    mask = valid.view(down, 8, across, 8).permute(0, 2, 1, 3).reshape(down * across, 64)
    mask = mask.repeat_interleave(T, 1).repeat(B, 1)
    out = written_out(to_windows(q), to_windows(k), to_windows(v), mask)
    out = out.view(B, down, across, 8, 8, T, H, d).permute(0, 5, 1, 3, 2, 4, 6, 7)
    return out.reshape(B, T, down * 8, across * 8, H, d)[:, :, :rows, :cols]


# Less than a window; one; a remainder of both; 14 x 16 leaves what 30 x 40 leaves (six rows, no column); only rows; one token.
@pytest.mark.parametrize("grid", [(6, 5), (8, 8), (15, 20), (14, 16), (7, 3), (16, 3), (1, 1), (9, 17)], ids=str)
def test_windows_at_their_true_size_equal_padded_masked_ones(grid: tuple[int, int]):
    q, k, v = noise(0, 3, 2, 3, *grid, 2, 6).unbind()
    torch.testing.assert_close(windowed_attention(q, k, v), padded_windows(q, k, v), rtol=0, atol=1e-12)


def test_a_window_sees_itself_in_all_frames_and_nothing_else():
    v = torch.zeros(1, 3, 10, 17, 1, 1, dtype=torch.float64)
    v[0, 2, 9, 15] = 1  # in the window of rows 8-9 and columns 8-15
    seen = windowed_attention(torch.zeros_like(v), torch.zeros_like(v), v)[0, :, :, :, 0, 0]
    expected = torch.zeros(3, 10, 17, dtype=torch.float64)
    expected[:, 8:, 8:16] = 1 / (3 * 2 * 8)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("masked", [False, True])
def test_attend(masked: bool):
    q, k, v = noise(1, 2, 5, 3, 4), noise(2, 2, 7, 3, 4), noise(3, 2, 7, 3, 4)
    mask = torch.arange(7) < torch.tensor([[7], [4]]) if masked else None
    actual = attend(q, k, v, None if mask is None else mask[:, None, None])
    torch.testing.assert_close(actual, written_out(q, k, v, mask), rtol=0, atol=1e-12)


def test_rms_norm_rounds_before_the_weight():
    norm = RMSNorm(6).bfloat16()
    norm.weight.data.copy_(1 + 0.1 * noise(4, 6))
    x = noise(5, 40, 6).bfloat16()
    wide = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    actual = norm(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, wide.bfloat16() * norm.weight)
    assert not torch.equal(actual, (wide * norm.weight.float()).bfloat16())


def test_rms_norm_is_the_formula():
    norm = RMSNorm(6).double()
    norm.weight.data.copy_(noise(4, 6))
    x = 1e-3 * noise(5, 4, 6)  # small enough for eps to show
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=0)


def tables(frames: int, size: tuple[int, int], known: tuple[int, ...] = ()) -> Geometry:
    """For a head dimension of 12, in float64."""
    return build_geometry(
        frames=frames,
        latent_size=size,
        pixel_size=(480, 640),
        known_frames=known,
        freqs=Rope(12).double().freqs,
        inv_freq=torch.ones(6, dtype=torch.float64),
        dtype=torch.float64,
    )


@pytest.mark.parametrize("windowed", [False, True], ids=["spatial", "temporal"])
def test_self_attention_groups_tokens(windowed: bool):
    """A change of one token reaches its own frame, or its own window in all frames; nothing else moves by a bit."""
    layer = SelfAttention(24, 2, windowed).double()
    fill_by_rule(layer)
    geometry = tables(2, (20, 6))  # 10 x 3 tokens
    x = noise(6, 1, 2 * 10 * 3, 24)
    other = x.clone()
    other[0, 30 + 9 * 3 + 1] += 1  # frame 1, row 9, column 1
    moved = (layer(x, geometry) != layer(other, geometry)).any(-1).view(2, 10, 3)
    expected = torch.zeros(2, 10, 3, dtype=torch.bool)
    if windowed:
        expected[:, 8:] = True
    else:
        expected[1] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("windowed", [False, True], ids=["spatial", "temporal"])
def test_self_attention_does_not_care_in_which_order_frames_are_listed(windowed: bool):
    layer = SelfAttention(24, 2, windowed).double()
    fill_by_rule(layer)
    x = noise(7, 1, 4, 30, 24)
    plain = layer(x.flatten(1, 2), tables(4, (20, 6))).unflatten(1, (4, 30))
    permuted = layer(x[:, [0, 3, 1, 2]].flatten(1, 2), tables(4, (20, 6), (0, 3))).unflatten(1, (4, 30))
    torch.testing.assert_close(permuted, plain[:, [0, 3, 1, 2]], rtol=0, atol=1e-12)
    if windowed:
        unnamed = layer(x[:, [0, 3, 1, 2]].flatten(1, 2), tables(4, (20, 6))).unflatten(1, (4, 30))
        assert (unnamed - plain[:, [0, 3, 1, 2]]).abs().max() > 1e-3


def text(seed: int, B: int, mask: Tensor | None = None) -> TextStates:
    """Two layers' states of five tokens."""
    keys, values = (tuple(noise(s, 2, B, 5, 2, 6).unbind()) for s in (seed, seed + 1))
    return TextStates(keys, values, None if mask is None else mask[:, None, None])


def test_known_tokens_attend_to_the_null_caption():
    layer = CrossAttention(12, 2).double()
    fill_by_rule(layer)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    prompt, null = text(8, 2, mask), text(10, 2, mask)
    geometry = tables(3, (4, 4), (2,))  # 3 frames of 4 tokens, one known, listed first
    x = noise(12, 2, 12, 12)
    out = layer(x, prompt.at(1), null.at(1), geometry)

    q = layer.q_linear(x).unflatten(-1, (2, -1))
    of_null = layer.proj(written_out(q, null.keys[1], null.values[1], mask).flatten(2))
    of_prompt = layer.proj(written_out(q, prompt.keys[1], prompt.values[1], mask).flatten(2))
    torch.testing.assert_close(out[:, :4], of_null[:, :4], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:, 4:], of_prompt[:, 4:], rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, prompt.at(1), None, geometry), of_prompt, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, prompt.at(1), null.at(1), tables(3, (4, 4))), of_prompt, rtol=0, atol=1e-12)


def test_one_row_of_null_serves_a_batch():
    layer = CrossAttention(12, 2).double()
    fill_by_rule(layer)
    prompt, null = text(8, 3), text(10, 1)
    three = TextStates(*(tuple(t.expand(3, -1, -1, -1) for t in side) for side in (null.keys, null.values)), None)
    x, geometry = noise(12, 3, 12, 12), tables(3, (4, 4), (0,))
    assert torch.equal(layer(x, prompt.at(0), null.at(0), geometry), layer(x, prompt.at(0), three.at(0), geometry))
