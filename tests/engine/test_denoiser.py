"""The branches that guidance combines, each against a forward pass of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from vidtta.engine.denoiser import Denoiser, TextDenoiser
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import Caption, Condition, STDiT3, STDiT3Config

TINY = STDiT3Config(
    in_channels=4, hidden_size=48, depth=1, num_heads=2, mlp_ratio=2.0, caption_channels=8, model_max_length=6
)
SHAPE = (1, 4, 3, 6, 4)
T = torch.tensor(640.0)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Clip:
    """A small model and what a denoiser of one clip takes; frames 0 and 2 of 3 are known."""

    def __init__(self, mask: Tensor | None = None) -> None:
        self.model = STDiT3(TINY).requires_grad_(False)
        fill_by_rule(self.model)
        self.geometry = self.model.geometry(3, (6, 4), (480, 640), (0, 2))
        self.prompt = Caption(noise(1, 1, 5, 8), mask)
        self.null = self.model.null_caption(self.prompt)
        known = torch.zeros(SHAPE)
        known[:, :, [0, 2]] = 1
        self.condition = Condition(noise(2, *SHAPE) * known, known)
        self.without = Condition(torch.zeros(SHAPE), known)  # the mask stays 1 in the branch without condition
        self.z = noise(3, *SHAPE)

    def forward(self, text: Caption, null: Caption, condition: Condition | None, fps: float = 24.0) -> Tensor:
        states = self.model.text_states(text), self.model.text_states(null)
        return self.model(self.z, T[None], torch.tensor([fps]), *states, self.geometry, condition)

    def branches(self, null: Caption | None = None) -> list[Tensor]:
        """Prompt, null, unconditional."""
        null = null or self.null
        three = [(self.prompt, self.condition), (null, self.condition), (null, self.without)]
        return [self.forward(text, null, condition) for text, condition in three]


def assert_same(actual: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    """Up to the rounding of a batch; the branches themselves differ by more."""
    assert len(actual) == len(expected)
    for ours, alone in zip(actual, expected, strict=True):
        assert ours.shape == SHAPE and ours.dtype == torch.float32
        torch.testing.assert_close(ours, alone, rtol=0, atol=2e-5)
    for a, b in pairwise(expected):
        assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("mask", [None, torch.tensor([[True] * 3 + [False] * 2])], ids=["whole", "padded"])
def test_three_branches(mask: Tensor | None):
    clip = Clip(mask)
    denoiser = Denoiser(clip.model, clip.geometry, 24.0, clip.prompt, clip.condition)
    assert_same(denoiser(clip.z, T, all_branches=True), clip.branches())
    assert_same(denoiser(clip.z, T, all_branches=False), clip.branches()[:1])


def test_a_negative_prompt_takes_the_place_of_the_null_caption():
    clip = Clip()
    negative = Caption(noise(5, 1, 5, 8))
    denoiser = Denoiser(clip.model, clip.geometry, 24.0, clip.prompt, clip.condition, null=negative)
    assert_same(denoiser(clip.z, T, all_branches=True), clip.branches(negative))


def test_fps_reaches_the_network():
    clip = Clip()
    denoiser = Denoiser(clip.model, clip.geometry, 12.0, clip.prompt, clip.condition)
    (ours,) = denoiser(clip.z, T, all_branches=False)
    torch.testing.assert_close(ours, clip.forward(clip.prompt, clip.null, clip.condition, 12.0), rtol=0, atol=2e-5)
    assert (ours - clip.branches()[0]).abs().max() > 1e-2


# One weight after the text's, one that the text's states pass through.
ADAPTED = ["final_layer.linear.weight", "spatial_blocks.0.cross_attn.kv_linear.weight"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapting_the_prompt_branch_alone(name: str):
    clip = Clip()
    weight = dict(clip.model.named_parameters())[name]
    base, adapted = weight.clone(), weight + 0.3 * noise(6, *weight.shape)

    @contextmanager
    def base_weights() -> Iterator[None]:
        weight.copy_(base)
        try:
            yield
        finally:
            weight.copy_(adapted)

    with_base = clip.branches()
    weight.copy_(adapted)
    with_adapted = clip.branches()
    assert (with_base[0] - with_adapted[0]).abs().max() > 1e-2

    conditional = Denoiser(clip.model, clip.geometry, 24.0, clip.prompt, clip.condition, base_weights=base_weights)
    assert_same(conditional(clip.z, T, all_branches=True), [with_adapted[0], *with_base[1:]])
    assert_same(conditional(clip.z, T, all_branches=False), with_adapted[:1])
    assert torch.equal(weight, adapted)
    everywhere = Denoiser(clip.model, clip.geometry, 24.0, clip.prompt, clip.condition)
    assert_same(everywhere(clip.z, T, all_branches=True), with_adapted)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True] * 3 + [False] * 2])], ids=["whole", "padded"])
@pytest.mark.parametrize("negative", [False, True])
def test_text_to_video_has_two_branches_and_no_condition(mask: Tensor | None, negative: bool):
    clip = Clip(mask)
    clip.geometry = clip.model.geometry(3, (6, 4), (480, 640))
    null = Caption(noise(5, 1, 5, 8), mask) if negative else clip.null
    denoiser = TextDenoiser(clip.model, clip.geometry, 24.0, clip.prompt, null if negative else None)
    expected = [clip.forward(text, clip.null, None) for text in (clip.prompt, null)]
    assert_same(denoiser(clip.z, T), expected)
