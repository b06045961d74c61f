"""Positions as Open-Sora v1.3 computes and rounds them, and which frames come first."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vidtta.engine.models.geometry import Geometry, build_geometry
from vidtta.engine.models.rope import Rope, absolute_position, apply_rope, rope_tables

SCALE = 1.0825317547305484  # 480 x 640 pixels: sqrt(480 * 640) / 512


def inverse_frequencies(dim: int) -> Tensor:
    """Of the absolute embedding of width `dim`, [dim / 4]."""
    return 10000.0 ** (-2 * torch.arange(dim // 4) / (dim / 2))


def build(**changes: Any) -> Geometry:
    """Of the published head dimension, 72, and a narrow absolute embedding."""
    arguments: dict[str, Any] = {
        "frames": 4, "latent_size": (20, 22), "pixel_size": (480, 640), "known_frames": (), "freqs": Rope(72).freqs,
        "inv_freq": inverse_frequencies(16), "dtype": torch.float32,
    }  # fmt: skip
    return build_geometry(**(arguments | changes))


def test_rope_frequencies():
    """The fourth is 0.46415889 in the published description: 10000^(-2/24) for the second of twelve."""
    freqs = Rope(72).freqs
    assert freqs.shape == (12,) and freqs.dtype == torch.float32 and not freqs.requires_grad
    assert freqs[[0, 1, 11]].tolist() == pytest.approx([1.0, 0.46415889, 10000 ** (-22 / 24)], rel=1e-6)
    assert Rope(24).freqs.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-6)


def test_rotation_turns_neighbouring_channels():
    """Angle 90 degrees for the first pair, 0 for the second."""
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    assert apply_rope(x, cos, sin).flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]


def test_rotation_keeps_length_and_depends_on_differences_of_position():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 72, dtype=torch.float64)
    freqs = Rope(72).double().freqs

    def at(x: Tensor, time: float, row: float, col: float) -> Tensor:
        tables = rope_tables(freqs, *torch.tensor([[time], [row], [col]], dtype=torch.float64), SCALE)
        return apply_rope(x, *tables).flatten()

    assert at(q, 3, 5, 7).norm().item() == pytest.approx(q.norm().item(), rel=1e-12)
    near, far = at(q, 3, 5, 7) @ at(k, 1, 4, 4), at(q, 13, 25, 37) @ at(k, 11, 24, 34)
    assert near.item() == pytest.approx(far.item(), rel=1e-9)


def test_row_and_column_are_divided_by_scale_and_time_is_not():
    freqs = Rope(72).double().freqs
    cos, sin = rope_tables(freqs, *torch.tensor([[2.0], [3.0], [5.0]], dtype=torch.float64), SCALE)
    expected = torch.cat([2 * freqs, 3 / SCALE * freqs, 5 / SCALE * freqs])
    torch.testing.assert_close(torch.atan2(sin, cos)[0], torch.remainder(expected + math.pi, 2 * math.pi) - math.pi)


def test_bfloat16_positions_round_as_in_training():
    """Columns 36 to 39 at 480 x 640; everything after is bfloat16 too."""
    geometry = build(frames=1, latent_size=(2, 80), dtype=torch.bfloat16, freqs=Rope(72).bfloat16().freqs)
    positions = torch.tensor([33.25, 34.25, 35.0, 36.0], dtype=torch.bfloat16)
    angles = positions[:, None] * Rope(72).freqs.bfloat16()
    assert geometry.spatial_cos.dtype == geometry.spatial_sin.dtype == torch.bfloat16
    assert torch.equal(geometry.spatial_cos[36:40, 24:], angles.cos())
    assert torch.equal(geometry.spatial_sin[36:40, 24:], angles.sin())


def test_positions_take_the_dtype_of_the_queries_and_angles_that_of_freqs():
    """A float32 checkpoint whose freqs were saved rounded keeps them; positions are rounded in the model's dtype first."""
    geometry = build(frames=1, latent_size=(2, 80), dtype=torch.bfloat16)
    angles = torch.tensor([33.25, 34.25, 35.0, 36.0])[:, None] * Rope(72).freqs
    torch.testing.assert_close(geometry.spatial_cos[36:40, 24:], angles.cos(), rtol=0, atol=1e-6)


def test_absolute_position_is_the_official_one():
    """Fact sheet 9.1: D = 1152, 30 x 40 tokens, 480 x 640 pixels."""
    table = absolute_position(inverse_frequencies(1152), 30, 40, SCALE)
    assert table.shape == (1200, 1152) and table.dtype == torch.float32
    elements = [(1, 0), (1, 288), (40, 0), (40, 576), (41, 577), (1199, 3), (1199, 579), (1199, 864)]
    expected = [0.723107, 0.690736, 0.0, 0.880881, 0.864322, -0.357095, -0.120084, 0.986901]
    assert [table[at].item() for at in elements] == pytest.approx(expected, abs=1e-5)


def test_absolute_position_uses_rounded_frequencies_in_float32():
    rounded = inverse_frequencies(1152).bfloat16()
    assert torch.equal(absolute_position(rounded, 3, 4, SCALE), absolute_position(rounded.float(), 3, 4, SCALE))
    assert not torch.equal(
        absolute_position(rounded, 3, 4, SCALE), absolute_position(inverse_frequencies(1152), 3, 4, SCALE)
    )


def test_base_of_the_absolute_position_rounds_half_to_even():
    """No grid of integers has a root of exactly one half; 6 x 7 tokens, 6.48, must round down and 6 x 8, 6.93, up."""
    for rows, cols, base in ((6, 7, 6), (6, 8, 7), (1, 1, 1), (30, 40, 35)):
        table = absolute_position(torch.ones(1), rows, cols, 1.0)
        last_col = (cols - 1) * base / cols
        assert table[cols - 1].tolist() == pytest.approx([math.sin(last_col), math.cos(last_col), 0, 1], abs=1e-5)


def test_tables_of_a_shape():
    geometry = build()
    assert (geometry.frames, geometry.rows, geometry.cols, geometry.known) == (4, 10, 11, 0)
    assert (geometry.tokens_per_frame, geometry.known_tokens, geometry.latent_size) == (110, 0, (20, 22))
    assert geometry.order is None and geometry.inverse is None
    assert geometry.position_SD.shape == (110, 16)
    assert geometry.spatial_cos.shape == geometry.spatial_sin.shape == (110, 36)
    assert geometry.window_cos.shape == geometry.window_sin.shape == (440, 36)
    assert (build(latent_size=(1, 3)).rows, build(latent_size=(1, 3)).cols) == (1, 2)  # half patches count


def test_spatial_positions_ignore_time_and_windows_count_from_their_corner():
    geometry, freqs = build(), Rope(72).freqs
    row, col = (axis.flatten() for axis in torch.meshgrid(torch.arange(10), torch.arange(11), indexing="ij"))
    zero = torch.zeros(110)
    torch.testing.assert_close(geometry.spatial_cos, rope_tables(freqs, zero, row.float(), col.float(), SCALE)[0])
    torch.testing.assert_close(geometry.spatial_sin, rope_tables(freqs, zero, row.float(), col.float(), SCALE)[1])
    for frame in range(4):
        local = rope_tables(freqs, zero + frame, (row % 8).float(), (col % 8).float(), SCALE)
        at = slice(frame * 110, frame * 110 + 110)
        torch.testing.assert_close(geometry.window_cos[at], local[0])
        torch.testing.assert_close(geometry.window_sin[at], local[1])


def test_known_frames_come_first_and_keep_their_time():
    geometry, plain = build(known_frames=(0, 3)), build()
    assert geometry.order is not None and geometry.inverse is not None
    assert geometry.order.tolist() == [0, 3, 1, 2] and geometry.inverse.tolist() == [0, 2, 3, 1]
    assert (geometry.known, geometry.known_tokens) == (2, 220)
    for ours, theirs in ((geometry.window_cos, plain.window_cos), (geometry.window_sin, plain.window_sin)):
        assert torch.equal(ours.view(4, -1), theirs.view(4, -1)[geometry.order])
    assert torch.equal(geometry.spatial_cos, plain.spatial_cos)
    assert build(known_frames=(0, 1)).order is None


def test_scale_comes_from_pixels_rounded_to_the_dtype():
    """554 pixels are 552 in bfloat16; the fortieth column then stands at 41.75, not at 41.5."""
    wide = {"frames": 1, "latent_size": (2, 80), "dtype": torch.bfloat16}
    rounded, same = (build(pixel_size=(416, width), **wide).spatial_cos for width in (554, 552))
    assert torch.equal(rounded, same)
    torch.testing.assert_close(rounded[39, 24:], (41.75 * Rope(72).freqs).cos())
    exact, near = build(pixel_size=(416, 554)), build(pixel_size=(416, 552))
    assert not torch.equal(exact.window_cos, near.window_cos)
    half = build(input_sq_size=1024, pixel_size=(960, 1280))
    assert torch.equal(half.window_cos, build().window_cos) and torch.equal(half.position_SD, build().position_SD)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ((0, 1, 2, 3), "known_frames names all 4 latent frames; at least one must be left to predict"),
        ((4,), r"known_frames must be distinct indices below 4, was \[4\]"),
        ((-1,), r"known_frames must be distinct indices below 4, was \[-1\]"),
        ((1, 1), r"known_frames must be distinct indices below 4, was \[1, 1\]"),
    ],
)
def test_refuses_impossible_known_frames(known: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(known_frames=known)
