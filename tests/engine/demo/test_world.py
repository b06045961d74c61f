"""The world made by code: its clips repeat, move as they should, and the shifted domain is one that training never sees."""

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import pytest
import torch
from vidtta.engine.data.clips import Data, clip_hash, list_clips
from vidtta.engine.data.read import read_clip
from vidtta.engine.demo import textures
from vidtta.engine.demo.train_dit import WORDS
from vidtta.engine.demo.world import (
    DOMAINS,
    bounce,
    build_scene,
    captions,
    clip_numbers,
    frames_of,
    orbit,
    render,
)
from vidtta.engine.errors import UserError
from vidtta.engine.text.encoder import word_rows

TIMES = torch.arange(45) / 24


def scene(domain: str = "familiar", indices: Sequence[int] = range(3), split: str = "tuning"):
    return build_scene(DOMAINS[domain], clip_numbers(domain, split, indices))


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_clip_depends_on_its_name_alone(domain):
    together = frames_of(scene(domain), 5, 24.0, 24, 32)
    assert together.shape == (3, 5, 3, 24, 32) and together.dtype == torch.uint8
    for k in range(3):
        alone = frames_of(scene(domain, [k]), 5, 24.0, 24, 32)[0]
        assert (alone.int() - together[k].int()).abs().max() <= 1  # vectorised sines differ in their last bit
    late = render(scene(domain), TIMES[4:5], 24, 32)  # any frame can be drawn without those before it
    torch.testing.assert_close(late[:, :, 0], render(scene(domain), TIMES[:5], 24, 32)[:, :, 4], rtol=0, atol=1e-5)
    numbers = [clip_numbers(domain, split, [0]) for split in ("training", "tuning", "test")]
    assert len({tuple(row.flatten().tolist()) for row in numbers}) == 3


PINNED = [[123.73, 104.43, 89.71], [128.54, 144.23, 147.77]]


def test_pictures_are_those_of_this_version():
    """When this fails although a change was meant, raise VERSION in world.py: clips' content hashes must change too."""
    found = [frames_of(scene(d, [7], "test"), 45, 24.0, 96, 128)[0] for d in DOMAINS]
    means = [clip[[0, 22, 44]].float().mean((1, 2, 3)).tolist() for clip in found]
    assert means == [pytest.approx(row, abs=0.2) for row in PINNED]


@pytest.mark.parametrize("domain", DOMAINS)
def test_clips_are_worth_continuing(domain):
    """Pixels stay in range, and repeating frame 22 is a poor continuation of most clips."""
    clips = render(scene(domain, range(16)), TIMES, 48, 64)
    assert clips.abs().max() <= 1
    error = (clips[:, :, 22:] - clips[:, :, 21:22]).div(2).square().mean((1, 2, 3, 4))
    psnr = -10 * error.log10()
    assert 10 < psnr.median() < 22


def test_things_bounce_between_walls_and_circle_at_one_speed():
    numbers = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    fine = torch.linspace(0, 4, 4001)
    path = bounce(numbers, fine)
    assert path[..., 0].abs().max() <= 0.62 and path[..., 1].abs().max() <= 0.46
    speed = path.diff(dim=1).abs() / 0.001
    typical = speed.median(1, keepdim=True).values
    assert ((speed - typical).abs() < 1e-2).float().mean() > 0.99  # constant but where a wall is met
    circle = orbit(numbers, fine)
    middle = (numbers[:, :2] * 2 - 1) * torch.tensor([0.45, 0.25])
    radius = (circle - middle[:, None]).norm(dim=-1)
    assert (radius - radius[:, :1]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", ["disc", "square", "triangle", "ring", "cross", "diamond"])
def test_shapes_have_an_inside_and_an_outside(shape):
    distance = getattr(textures, shape)
    far = torch.tensor([[2.0, 2.0], [-2.0, 1.9], [0.0, -2.1]])
    assert (distance(far) > 0.3).all()
    inside = torch.tensor([[0.7, 0.0]]) if shape == "ring" else torch.tensor([[0.0, 0.0]])
    assert distance(inside) < -0.2


def test_training_never_sees_the_shifted_domain():
    familiar, shifted = DOMAINS["familiar"], DOMAINS["shifted"]
    assert not set(familiar.textures.values()) & set(shifted.textures.values())
    assert not set(familiar.colours.values()) & set(shifted.colours.values())
    assert familiar.motion is not shifted.motion
    training = Path(textures.__file__).parent
    for name in ("train_vae.py", "train_dit.py"):
        assert "shifted" not in (training / name).read_text()


@pytest.mark.parametrize("domain", DOMAINS)
def test_captions_say_what_is_there(domain):
    made = scene(domain, range(64))
    for b, sentence in enumerate(captions(made)):
        present = int(sum(thing.present[b] for thing in made.things))
        assert sentence.count("a big ") + sentence.count("a small ") == present >= 2
        assert list(DOMAINS[domain].colours)[int(made.background.colour[b])] in sentence
        assert len(word_rows(sentence, 1000)) <= WORDS


def test_no_two_words_of_the_world_share_a_row():
    words = set()
    for domain in DOMAINS:
        for sentence in captions(scene(domain, range(200))):
            words |= set(sentence.replace(",", "").split())
    assert len({crc32(word.encode()) % 1024 for word in words}) == len(words) > 30


def test_a_recipe_names_clips_of_the_world(tmp_path):
    clips = list_clips(Data(clips="world:shifted/test", limit=3), tmp_path)
    assert [clip.id for clip in clips] == [f"shifted-test-{k:06d}" for k in range(3)]
    assert len({clip_hash(clip) for clip in clips}) == 3
    assert clips[0].caption == captions(scene("shifted", [0], "test"))[0]
    frames = read_clip(clips[1], frames=4, fps=24.0, height=32, width=40)
    assert torch.equal(frames, frames_of(scene("shifted", [1], "test"), 4, 24.0, 32, 40)[0])
    assert len(list_clips(Data(clips="world:familiar/tuning"), tmp_path)) == 64


@pytest.mark.parametrize("name", ["world:mars/test", "world:shifted/validation", "world:shifted"])
def test_a_world_that_is_not_there(name, tmp_path):
    with pytest.raises(UserError) as error:
        list_clips(Data(clips=name), tmp_path)
    assert str(error.value) == (
        f"data.clips is {name!r}; a world is world:DOMAIN/SPLIT with a domain of familiar, shifted and a split of training, "
        "tuning, test"
    )
