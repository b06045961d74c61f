"""Which frames are known, scored and generated, for the windows that recipes use; and what is refused."""

import re
from dataclasses import asdict
from typing import Any

import pytest
from vidtta.engine.models.vae import latent_frames
from vidtta.engine.window import Window


def test_default_is_22_of_45_frames_sampled_as_49():
    window = Window()
    assert asdict(window) == {
        "total_frames": 45, "known_frames": 22, "model_frames": 49, "known_chunks": "partial",
        "posterior": "mode", "fps": 24.0,
        "scored_from": None,
    }  # fmt: skip
    assert (window.encoded_frames, window.known_latents, window.latent_frames) == (21, 7, 15)
    assert window.scored == range(22, 45) == window.generated


def test_whole_chunks_leave_out_frames_18_to_22():
    window = Window(known_chunks="whole")
    assert (window.encoded_frames, window.known_latents, window.latent_frames) == (17, 5, 15)
    assert window.scored == range(22, 45)


def test_45_frames_by_name():
    window = Window(model_frames=45)
    assert (window.encoded_frames, window.known_latents, window.latent_frames) == (21, 7, 14)


def test_scoring_can_begin_later_than_generating():
    window = Window(known_frames=32, scored_from=33)
    assert (window.encoded_frames, window.known_latents) == (29, 9)
    assert window.scored == range(32, 45)
    early = Window(known_frames=22, scored_from=33)
    assert early.scored == range(32, 45) and early.generated == range(22, 45)
    assert Window(scored_from=45).scored == range(44, 45)


# Known frames; those the VAE sees and their latents, cut to 4 k + 1, then to whole chunks (None: less than one).
KNOWN = [
    (1, (1, 1), None),
    (4, (1, 1), None),
    (5, (5, 2), None),
    (16, (13, 4), None),
    (17, (17, 5), (17, 5)),
    (20, (17, 5), (17, 5)),
    (21, (21, 7), (17, 5)),
    (33, (33, 10), (33, 10)),
    (36, (33, 10), (33, 10)),
    (37, (37, 12), (33, 10)),
    (44, (41, 13), (33, 10)),
]


@pytest.mark.parametrize(("known", "partial", "whole"), KNOWN)
def test_known_frames_and_their_latents(known: int, partial: tuple[int, int], whole: tuple[int, int] | None):
    window = Window(known_frames=known)
    assert (window.encoded_frames, window.known_latents) == partial
    assert window.known_latents < window.latent_frames
    if whole:
        window = Window(known_frames=known, known_chunks="whole")
        assert (window.encoded_frames, window.known_latents) == whole


@pytest.mark.parametrize(
    ("total", "model", "latents"), [(45, 49, 15), (49, 49, 15), (33, 33, 10), (30, 33, 10), (81, 81, 25)]
)
def test_model_length(total: int, model: int, latents: int):
    window = Window(total_frames=total, known_frames=17, model_frames=model)
    assert window.latent_frames == latents == latent_frames(model)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"known_frames": 0}, "known_frames must be at least 1 and below total_frames (45), was 0"),
    ({"known_frames": 45}, "known_frames must be at least 1 and below total_frames (45), was 45"),
    ({"model_frames": 50}, "model_frames must be 49 (the next 16 k + 1) or 45 (total_frames itself), was 50"),
    ({"model_frames": 33}, "model_frames must be 49 (the next 16 k + 1) or 45 (total_frames itself), was 33"),
    ({"model_frames": 65}, "model_frames must be 49 (the next 16 k + 1) or 45 (total_frames itself), was 65"),
    (
        {"total_frames": 44, "model_frames": 44},
        "model_frames must be 4 k + 1, was 44: the VAE would drop the last frames",
    ),
    (
        {"known_frames": 16, "known_chunks": "whole"},
        "known_chunks: whole needs known_frames of at least 17, was 16",
    ),
    ({"fps": 0.0}, "fps must be positive, was 0.0"),
    (
        {"scored_from": 22},
        "scored_from must be after the known frames (22) and at most 45, was 22: a known frame may not be scored",
    ),
    (
        {"scored_from": 46},
        "scored_from must be after the known frames (22) and at most 45, was 46: a known frame may not be scored",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_refuses_an_impossible_window(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Window(**changes)


@pytest.mark.parametrize(
    ("known", "total", "model", "seams"),
    [(22, 45, 49, [33]), (16, 45, 49, [17, 33]), (33, 45, 49, []), (3, 17, 17, [])],
)
def test_chunk_seams_are_the_first_generated_frames_of_a_chunk(known: int, total: int, model: int, seams: list[int]):
    assert Window(known_frames=known, total_frames=total, model_frames=model).chunk_seams == seams
