"""Attention to captions: both parts, all gradients."""

import pytest
import torch
from torch import Tensor
from vidtta.engine.models.attention import CrossAttention, LayerText
from vidtta.kernels import caption_attention as module
from vidtta.kernels.caption_attention import caption_attention, caption_attention_reference

from tests.kernels.accuracy import DEVICE, check, every_dtype, every_mode, rand

# samples, tokens, split, heads, channels, keys, known keys. One of everything; the model's head with blocks that do not divide and
# keys past one block; all tokens known; captions of two lengths, and queries past what one program takes.
CASES = [
    (1, 1, 0, 1, 2, 1, 1),
    (2, 75, 10, 3, 10, 5, 5),
    (1, 140, 65, 2, 72, 70, 70),
    (1, 7, 7, 2, 6, 3, 9),
    (1, 300, 270, 2, 16, 33, 2),
]


def tensors(case: tuple[int, ...], dtype: torch.dtype, shared: bool) -> list[Tensor]:
    B, N, _, H, d, L, L_known = case
    both = [rand(B, length, 2, H, d, dtype=dtype, seed=s).unbind(2) for length, s in ((L, 1), (L_known, 2))]
    (k, v), (known_k, known_v) = both
    if shared:
        known_k, known_v = known_k[:1], known_v[:1]
    return [rand(B, N, H, d, dtype=dtype, scale=2), k, v, known_k, known_v]


@every_mode
@every_dtype
@pytest.mark.parametrize("shared", [False, True], ids=["a caption each", "one known caption"])
@pytest.mark.parametrize("trained", [[0], [0, 1, 2, 3, 4]], ids=["queries", "text too"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_gradients(case, trained, shared, dtype, mode):
    split = case[2]

    def ours(*t: Tensor) -> Tensor:
        return caption_attention(*t, split=split)

    def reference(*t: Tensor) -> Tensor:
        out = caption_attention_reference(*t, split=split)
        return out + 0 * sum(x.sum() for x in t)  # a caption that no token attends to has a gradient of zero

    inputs = tensors(case, dtype, shared)
    # A score's gradient is a difference from the mean over the keys: of one key nothing is left but what was rounded.
    slack = 16.0
    check(
        ours,
        reference,
        inputs,
        trained=trained,
        douts=[rand(*inputs[0].shape, dtype=dtype, seed=9)],
        mode=mode,
        terms=128,
        largest=slack,
    )


def test_without_known_frames_one_caption_serves_all():
    q, k, v, *_ = tensors(CASES[2], torch.float32, False)
    assert torch.allclose(caption_attention(q, k, v), caption_attention_reference(q, k, v), atol=1e-5)


def test_gradients_have_the_same_bits_each_time():
    found = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in tensors(CASES[2], torch.float32, False)]
        caption_attention(*leaves, split=65).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_large_scores_do_not_overflow():
    q, k, v, known_k, known_v = tensors(CASES[1], torch.float32, False)
    out = caption_attention(q * 100, k * 100, v, known_k * 100, known_v, 10)
    truth = caption_attention_reference(*(t.double() for t in (q * 100, k * 100, v, known_k * 100, known_v)), split=10)
    assert (out.double() - truth).abs().max() < 1e-2


def test_frozen_text_makes_no_gradients_of_it(monkeypatch):
    asked = []
    whole = module._backward
    monkeypatch.setattr(module, "_backward", lambda *a: asked.append(a[-1]) or whole(*a))
    for trained in (False, True):
        q, *text = tensors(CASES[1], torch.float32, False)
        q.requires_grad_()
        for t in text:
            t.requires_grad_(trained)
        caption_attention(q, *text, split=10).sum().backward()
    assert asked == [False, True]


class Known:
    """As much of a geometry as cross-attention looks at."""

    known, known_tokens = 2, 10


@pytest.mark.parametrize("known", [False, True])
def test_the_models_layer_on_it_is_the_plain_one(known):
    from vidtta.engine.models.attention import DEFAULT

    torch.manual_seed(0)
    layer = CrossAttention(24, 2).to(DEVICE)
    texts = [LayerText(rand(B, 6, 2, 12, seed=s), rand(B, 6, 2, 12, seed=s + 1), None) for B, s in ((2, 1), (1, 3))]
    x, other = rand(2, 40, 24), texts[1] if known else None
    plain = layer(x, texts[0], other, Known(), DEFAULT)  # type: ignore[arg-type]
    ours = layer(x, texts[0], other, Known(), DEFAULT._replace(cross="triton"))  # type: ignore[arg-type]
    assert torch.allclose(plain, ours, atol=1e-5)


def test_a_mask_is_left_to_torch_on_either_path():
    from vidtta.engine.models.attention import DEFAULT

    torch.manual_seed(0)
    layer = CrossAttention(24, 2).to(DEVICE)
    mask = torch.tensor([True, True, False], device=DEVICE).expand(2, 1, 1, 3)
    text = LayerText(rand(2, 3, 2, 12, seed=1), rand(2, 3, 2, 12, seed=2), mask)
    x = rand(2, 40, 24)
    found = [layer(x, text, None, Known(), DEFAULT._replace(cross=name)) for name in (None, "triton")]  # type: ignore[arg-type]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({1: (1, 5, 2, 7)}, 0, r"k is \[1, 5, 2, 7\]"),
        ({3: (3, 5, 2, 8)}, 2, r"known_k is \[3, 5, 2, 8\]"),
        ({2: (2, 4, 2, 8)}, 0, "keys and values differ in shape"),
        ({}, 99, "split must be from 0 to 9 tokens, was 99"),
    ],
)
def test_wrong_shapes_are_named(change, split, message):
    shapes = {0: (2, 9, 2, 8), 1: (2, 5, 2, 8), 2: (2, 5, 2, 8), 3: (2, 5, 2, 8), 4: (2, 5, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        caption_attention(*(rand(*shapes[i]) for i in range(5)), split=split)
    with pytest.raises(ValueError, match="no caption for the tokens before it"):
        caption_attention(*(rand(2, 9, 2, 8) for _ in range(3)), split=3)
