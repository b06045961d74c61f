"""The probes pass every honest window and objective; what they find is planted in test_sabotage.py."""

from functools import partial

import pytest
import torch
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.clip import encode_known
from vidtta.engine.errors import UserError
from vidtta.engine.probes import check_latents, check_task
from vidtta.engine.window import Window

from .tiny import DTYPES, noise, tiny_dit, tiny_latents, tiny_pixels, tiny_task, tiny_vae

WINDOWS = [
    *(Window(known_frames=known) for known in (1, 4, 17, 22)),
    *(Window(known_frames=known, known_chunks="whole") for known in (17, 32)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: f"{window.known_frames} {window.known_chunks}")
def test_honest_windows_pass(window):
    encode = partial(_encode, window)
    latents = encode(tiny_pixels())
    rounded_on_another_card = latents * 1.01
    check_latents(encode, rounded_on_another_card, tiny_pixels(), window)
    with pytest.raises(UserError, match="stored known latents are not those"):
        check_latents(encode, encode(tiny_pixels(seed=5)), tiny_pixels(), window)


def _encode(window, pixels):
    return encode_known(tiny_vae(), pixels, window)


@pytest.mark.parametrize("shift", [1, 4])
def test_one_frame_too_many_is_found(shift):
    """Encoding up to frame 22 or 25 instead of 21: with shift 1 frame 22 counts, which is known; with 4 a later one."""
    window = Window()

    def late(pixels):
        return tiny_vae().encode(pixels[None, :, : window.encoded_frames + shift])[:, :, : window.known_latents]

    with torch.no_grad():
        latents = late(tiny_pixels())
        if shift == 1:
            check_latents(late, latents, tiny_pixels(), window)
        else:
            with pytest.raises(UserError, match="depend on frames after the 22 known ones"):
                check_latents(late, latents, tiny_pixels(), window)


@pytest.mark.parametrize("objective", ["continuation", "denoise", "official"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_objectives_pass_and_leave_the_network_as_it_was(objective, dtype):
    model = tiny_dit(dtype)
    settings = AdaptationSettings(objective=objective)
    check_task(lambda latents: tiny_task(model, settings, latents=latents), tiny_latents(dtype))
    assert not any(layer._forward_pre_hooks for layer in model.layers)
    task = tiny_task(model, settings)
    assert torch.isfinite(task.loss(task.draw(0)))


def test_latents_that_are_not_numbers_are_found():
    window = Window()
    encode = partial(_encode, window)
    with pytest.raises(UserError, match="stored known latents"):
        check_latents(encode, noise(0, 1, 16, 7, 2, 4) * torch.nan, tiny_pixels(), window)
