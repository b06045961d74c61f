"""Guidance formulas and schedules, and the loop, on velocities that are known functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vidtta.engine.flow import sampling_timesteps
from vidtta.engine.sampler import (
    ContinuationGuidance,
    SamplerSettings,
    TextGuidance,
    image_weights,
    oscillated,
    sample,
)

SHAPE = (1, 2, 4, 3, 5)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


class Branches:
    """Three velocities that depend on z and t, and a note of which were asked for."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, z: Tensor, t: Tensor, *, all_branches: bool) -> tuple[Tensor, ...]:
        self.asked.append(all_branches)
        three = (z.sin(), (2 * z).cos() * t / 1000, z + t / 500)
        return three if all_branches else three[:1]


def test_default_settings_are_those_of_video_to_video():
    assert SamplerSettings() == SamplerSettings(
        steps=30, text_guidance=7.5, image_guidance=5.0, decreasing_image_weight=True, oscillate_text=True,
        oscillate_image=True, force_steps=10, sdedit=True, cache_every=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, was 0"),
        ("force_steps", -1, "force_steps must be at least 0, was -1"),
        ("cache_every", 0, r"cache_every must be at least 1 \(every layer runs at every step\), was 0"),
        ("cache_first", -1, "cache_first must be at least 0, was -1"),
    ],
)
def test_refuses_impossible_settings(field: str, value: int, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        SamplerSettings(**{field: value})


def test_oscillation():
    assert [oscillated(7.5, step, 2, True) for step in range(6)] == [7.5, 7.5, 7.5, 1.0, 7.5, 1.0]
    assert [oscillated(7.5, step, 0, True) for step in range(3)] == [7.5, 1.0, 7.5]
    assert [oscillated(7.5, step, 0, False) for step in range(3)] == [7.5, 7.5, 7.5]


def test_image_weights_fall_over_the_steps_and_rise_over_the_frames():
    """At step 0 of 5 with scale 5 the last frame weighs 5, at the last step 1; the first frame always 1."""
    expected = {0: [1, 2, 3, 4, 5], 1: [1, 1.75, 2.5, 3.25, 4], 4: [1, 1, 1, 1, 1]}
    for step, weights in expected.items():
        ours = image_weights(5.0, step, 5, 5)
        assert ours.shape == (5, 1, 1) and ours.flatten().tolist() == pytest.approx(weights, abs=1e-6)


def guided(settings: SamplerSettings, step: int, z: Tensor, t: Tensor) -> Tensor:
    """The formula of fact sheet 5.3, frame by frame, in float64."""
    prompt, null, none = (v.double() for v in Branches()(z, t, all_branches=True))
    free = step < settings.force_steps or step % 2 == 0
    text = settings.text_guidance if free or not settings.oscillate_text else 1.0
    image = settings.image_guidance if free or not settings.oscillate_image else 1.0
    out = torch.empty_like(prompt)
    frames = z.shape[2]
    for frame in range(frames):
        weight = image
        if settings.decreasing_image_weight and image > 1:
            last = image + (1 - image) * step / (settings.steps - 1)
            weight = 1 + (last - 1) * frame / (frames - 1)
        at = (slice(None), slice(None), frame)
        out[at] = none[at] + weight * (null[at] - none[at]) + text * (prompt[at] - null[at])
    return out


SETTINGS = {
    "default": {},
    "constant weight": {"decreasing_image_weight": False},
    "text alone oscillates": {"oscillate_image": False},
    "image alone oscillates": {"oscillate_text": False, "force_steps": 3},
    "image guidance below one": {"image_guidance": 0.5},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
def test_guidance_of_every_step(changes: dict[str, Any]):
    settings = SamplerSettings(**changes)
    guidance = ContinuationGuidance(Branches(), settings, SHAPE[2])
    z, t = noise(1), torch.tensor(640.0)
    for step in range(30):
        expected = guided(settings, step, z, t)
        actual = guidance.velocity(step, t, z)
        # Also where only the prompt's branch runs: there the formula collapses to it, up to rounding.
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-6)


def test_ten_of_thirty_steps_need_one_branch():
    branches = Branches()
    guidance = ContinuationGuidance(branches, SamplerSettings(), SHAPE[2])
    assert [guidance.scales(step) for step in (9, 10, 11)] == [(7.5, 5.0), (7.5, 5.0), (1.0, 1.0)]
    for step in range(30):
        guidance.velocity(step, torch.tensor(500.0), noise(1))
    assert [step for step in range(30) if not branches.asked[step]] == list(range(11, 30, 2))
    assert branches.asked.count(True) == 20


@pytest.mark.parametrize("changes", [{"oscillate_text": False}, {"oscillate_image": False}], ids=str)
def test_all_branches_run_where_one_scale_still_guides(changes: dict[str, Any]):
    branches = Branches()
    guidance = ContinuationGuidance(branches, SamplerSettings(**changes), SHAPE[2])
    for step in range(30):
        guidance.velocity(step, torch.tensor(500.0), noise(1))
    assert all(branches.asked)


@pytest.mark.parametrize("flaw_fix", [False, True])
def test_text_guidance(flaw_fix: bool):
    guidance = TextGuidance(lambda z, t: (z.sin(), z + t / 500), scale=4.0, force_steps=2, flaw_fix=flaw_fix)
    z, t = noise(1, 2, *SHAPE[1:]), torch.tensor(300.0)
    for step, scale in enumerate([4.0, 4.0, 4.0, 1.0]):
        prompt, null = z.sin().double(), (z + t / 500).double()
        expected = null + scale * (prompt - null)
        if flaw_fix:
            for sample_, of_prompt in zip(expected, prompt, strict=True):
                sample_ *= 0.7 * of_prompt.std() / sample_.std() + 0.3
        torch.testing.assert_close(guidance.velocity(step, t, z).double(), expected, rtol=0, atol=5e-6)


class Field:
    """A guided velocity given as a function; remembers what it was asked."""

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = velocity
        self.seen: list[tuple[int, float, Tensor]] = []

    def velocity(self, step: int, t: Tensor, z: Tensor) -> Tensor:
        assert t.shape == () and t.dtype == torch.float32
        self.seen.append((step, t.item(), z.clone()))
        return self.function(z, t)


def test_euler_steps():
    field = Field(lambda z, t: z.cos() * t / 1000)
    timesteps = torch.tensor([1000.0, 700.0, 250.0])
    z = noise(1).double()
    for t, width in ((1000.0, 0.3), (700.0, 0.45), (250.0, 0.25)):
        z = z + z.cos() * t / 1000 * width
    actual = sample(field, noise(1), timesteps)
    torch.testing.assert_close(actual.double(), z, rtol=0, atol=1e-6)
    assert [(step, t) for step, t, _ in field.seen] == [(0, 1000.0), (1, 700.0), (2, 250.0)]


def test_exact_velocity_leads_from_noise_to_the_clip():
    x0, start = noise(1), noise(2)
    out = sample(Field(lambda z, t: x0 - start), start, sampling_timesteps(30, 480, 640, 49))
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-5)


def test_the_walk_is_in_float32():
    out = sample(Field(lambda z, t: z), noise(1).bfloat16(), torch.tensor([1000.0, 500.0]))
    assert out.dtype == torch.float32


def test_known_frames_are_noised_afresh_before_each_step():
    mask = torch.zeros(SHAPE)
    mask[:, :, [0, 3]] = 1
    known, field = noise(1) * mask, Field(lambda z, t: torch.ones_like(z))
    timesteps = torch.tensor([1000.0, 800.0, 300.0])
    out = sample(field, noise(2), timesteps, known=known, known_mask=mask, known_noise=lambda step: noise(10 + step))
    walked = noise(2)
    for step, t, seen in field.seen:
        expected = (1 - t / 1000) * known + t / 1000 * noise(10 + step)
        torch.testing.assert_close(seen[:, :, [0, 3]], expected[:, :, [0, 3]], rtol=0, atol=1e-6)
        assert torch.equal(seen[:, :, [1, 2]], walked[:, :, [1, 2]])
        walked = seen + (0.2, 0.5, 0.3)[step]
    torch.testing.assert_close(out, walked, rtol=0, atol=1e-6)  # the last step's known frames are the network's own


@pytest.mark.parametrize("without", ["known", "known_mask", "known_noise"])
def test_nothing_is_noised_where_a_part_is_missing(without: str):
    parts: dict[str, Any] = {
        "known": noise(3), "known_mask": torch.ones(SHAPE), "known_noise": lambda step: noise(4),
    }  # fmt: skip
    field = Field(lambda z, t: torch.zeros_like(z))
    assert torch.equal(sample(field, noise(1), torch.tensor([900.0]), **(parts | {without: None})), noise(1))


def test_on_step_can_stop_the_walk():
    class Stop(Exception):
        pass

    steps: list[int] = []

    def stop_after_two(step: int) -> None:
        steps.append(step)
        if step == 1:
            raise Stop

    field = Field(lambda z, t: z)
    with pytest.raises(Stop):
        sample(field, noise(1), torch.tensor([1000.0, 700.0, 400.0, 200.0]), on_step=stop_after_two)
    assert steps == [0, 1] and len(field.seen) == 2


def test_whole_walk_with_three_branches():
    """Guidance, schedule, renewal of known frames and Euler together, against the formula written out in float64."""
    settings = SamplerSettings(steps=6, force_steps=2)
    mask = torch.zeros(SHAPE)
    mask[:, :, :2] = 1
    known, timesteps = noise(1) * mask, sampling_timesteps(6, 480, 640, 49)
    z, levels = noise(2).double(), [*timesteps.double().tolist(), 0.0]
    for step in range(6):
        s = levels[step] / 1000
        z = torch.where(mask.bool(), (1 - s) * known.double() + s * noise(20 + step).double(), z)
        z = z + guided(settings, step, z, timesteps[step].double()) * (levels[step] - levels[step + 1]) / 1000
    guidance = ContinuationGuidance(Branches(), settings, SHAPE[2])
    out = sample(guidance, noise(2), timesteps, known=known, known_mask=mask, known_noise=lambda step: noise(20 + step))
    torch.testing.assert_close(out.double(), z, rtol=0, atol=1e-4)
