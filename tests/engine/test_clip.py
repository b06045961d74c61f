"""The path of a clip: what a method sees of it, what comes out, and that the network is afterwards as before."""

import re
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from vidtta.engine import clip
from vidtta.engine.adaptation import Task
from vidtta.engine.clip import Experiment, Known, Outcome, continue_clip, describe, encode_known
from vidtta.engine.errors import Interrupted, UserError
from vidtta.engine.flow import sampling_timesteps
from vidtta.engine.methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA, NoAdaptation
from vidtta.engine.methods.none import NoAdapter
from vidtta.engine.methods.optimize import Trace
from vidtta.engine.methods.protocol import Change
from vidtta.engine.models.checkpoint import state_hash
from vidtta.engine.window import Window

from .tiny import FIXED_DRAWS, noise, tiny_caption, tiny_experiment, tiny_known, tiny_pixels, tiny_vae

METHODS: dict[str, AnyMethod] = {
    "none": NoAdaptation(),
    "full": FullFineTuning(steps=2, lr=1e-2),
    "lora": LoRA(steps=2, lr=1e-1, rank=2),
    "delta": Delta(steps=3, lr=1e-1),
}
BFLOAT16 = torch.bfloat16  # what recipes run in
SHORT = Window(total_frames=17, known_frames=13, model_frames=17)  # one chunk, 4 known latents: quick to decode
each_method = pytest.mark.parametrize("name", METHODS)
each_adaptation = pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])


def run(experiment: Experiment, method: AnyMethod, known: Known | None = None, **options) -> Outcome:
    adapter = method.attach(experiment.dit, experiment.seed)
    try:
        return continue_clip(experiment, known or tiny_known(experiment), adapter, **options)
    finally:
        adapter.detach()


def short_experiment(**adaptation) -> Experiment:
    return tiny_experiment(BFLOAT16, replace(FIXED_DRAWS, **adaptation), window=SHORT)


@cache
def on_a_new_network(name: str) -> Outcome:
    """What a method makes of the short clip as the first thing that ever happens to a network."""
    return run(short_experiment(), METHODS[name], keep_state=True)


def assert_same(a: Outcome, b: Outcome) -> None:
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(a.latents, b.latents)
    assert (a.trace, a.change) == (b.trace, b.change)
    assert a.state.keys() == b.state.keys()
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)


@pytest.mark.parametrize("vae_dtype", [torch.float32, BFLOAT16], ids=str)
def test_known_frames_are_encoded_alone(vae_dtype):
    vae, pixels = tiny_vae(vae_dtype), tiny_pixels()
    known = encode_known(vae, pixels, Window())
    assert known.shape == (1, 16, 7, 2, 4) and known.dtype == vae_dtype
    whole_clip = vae.encode(pixels[None])
    assert whole_clip.shape == (1, 16, 14, 2, 4)
    # Frames 1 to 17 are a chunk of their own either way; 17 to 21 share theirs with frames to be predicted.
    assert torch.equal(known[:, :, :5], whole_clip[:, :, :5])
    apart = (known - whole_clip[:, :, :7]).float().square().mean((0, 1, 3, 4)).sqrt() / known.float().std()
    assert all(value > 0.05 for value in apart[5:].tolist())


def test_how_many_frames_are_encoded_follows_the_window():
    vae, pixels = tiny_vae(BFLOAT16), tiny_pixels()
    partial = encode_known(vae, pixels, Window())
    whole = encode_known(vae, pixels, Window(known_chunks="whole"))
    assert partial.shape == (1, 16, 7, 2, 4) and whole.shape == (1, 16, 5, 2, 4)
    assert torch.equal(partial, vae.encode(pixels[None, :, :21]))
    assert torch.equal(whole, vae.encode(pixels[None, :, :17]))
    assert encode_known(vae, pixels, Window(known_frames=17)).shape[2] == 5
    assert encode_known(vae, pixels, Window(known_frames=4)).shape[2] == 1
    assert not partial.requires_grad


@each_method
def test_a_clip_gives_the_same_bits_again_whatever_came_before(name):
    experiment = short_experiment()
    adapter = METHODS[name].attach(experiment.dit, 0)
    torch.manual_seed(1)
    another = continue_clip(experiment, tiny_known(experiment, "another clip"), adapter, keep_state=True)
    again = continue_clip(experiment, tiny_known(experiment), adapter, keep_state=True)
    assert_same(again, on_a_new_network(name))
    assert not torch.equal(another.pixels, again.pixels)
    assert (another.trace == again.trace) == (name == "none")


def test_the_recipe_seed_chooses_the_draws_and_the_video():
    other_seed, expected = run(replace(short_experiment(), seed=1), METHODS["delta"]), on_a_new_network("delta")
    assert other_seed.trace.losses[0] != expected.trace.losses[0]
    unadapted = run(replace(short_experiment(), seed=1), NoAdaptation())
    assert not torch.equal(unadapted.pixels, on_a_new_network("none").pixels)


def test_adapting_and_sampling_meet_the_same_noise_levels_and_known_frames(monkeypatch):
    class Recorder(NoAdapter):
        steps = 1
        task: Task
        changed = 0

        def adapt(self, task, on_step):
            self.task, self.changed = task, 1
            return Trace(steps=1)

        def change(self):
            return Change(0.0, 0.0, self.changed, 1)

        def restore(self):
            self.changed = 0

    sampled = {}

    def record(guidance, z, timesteps, **options) -> Tensor:
        sampled.update(z=z, timesteps=timesteps, **options)
        return z.float()

    monkeypatch.setattr(clip, "sample", record)
    experiment, adapter = tiny_experiment(BFLOAT16), Recorder()
    known = tiny_known(experiment)
    continue_clip(experiment, known, adapter)
    task, grid = adapter.task, sampling_timesteps(4, 16, 32, 49, BFLOAT16)
    assert torch.equal(task.grid, grid) and torch.equal(sampled["timesteps"], grid)
    assert task.latents is known.latents and task.prompt is known.prompt and task.clip_id == "clip"
    assert task.fps.tolist() == [24]
    geometry = experiment.dit.geometry(7, (2, 4), (16, 32), (0, 1, 2))
    assert torch.equal(task.geometry.position_SD, geometry.position_SD)
    assert sampled["z"].shape == (1, 16, 15, 2, 4)
    assert torch.equal(sampled["known"][:, :, :7], known.latents) and not sampled["known"][:, :, 7:].any()
    assert sampled["known_mask"].float().mean((0, 1, 3, 4)).tolist() == [1] * 7 + [0] * 8
    noises = [sampled["known_noise"](step)[:, :, :7] for step in (0, 1, 0)]
    assert torch.equal(noises[0], noises[2]) and not torch.equal(noises[0], noises[1])
    # One generator would give both the same first numbers, those of channel 0.
    assert not torch.equal(noises[0][:, 0], sampled["z"][:, 0, :7])


@each_adaptation
def test_nothing_depends_on_the_frames_to_be_predicted(name):
    """Frame 22 is known but would need a chunk it shares with later frames, so it is left out as well."""

    def outcome(pixels: Tensor) -> Outcome:
        experiment = tiny_experiment(BFLOAT16)
        known = Known("clip", encode_known(experiment.vae, pixels, experiment.window), tiny_caption())
        return run(experiment, METHODS[name], known, keep_state=True)

    later, last_encoded = tiny_pixels(), tiny_pixels()
    later[:, 21:] = noise(7, 3, 24, 16, 32)
    last_encoded[:, 20] += 0.1
    expected, moved = outcome(tiny_pixels()), outcome(last_encoded)
    assert_same(outcome(later), expected)
    assert not torch.equal(moved.pixels, expected.pixels)
    assert not all(torch.equal(moved.state[key], expected.state[key]) for key in expected.state)


@each_adaptation
def test_a_clip_is_adapted_to_and_the_network_put_back(name):
    experiment = short_experiment()
    base_hash = state_hash(experiment.dit)
    adapter = METHODS[name].attach(experiment.dit, 0)
    attached_hash = state_hash(experiment.dit)
    outcome = continue_clip(experiment, tiny_known(experiment), adapter)
    assert state_hash(experiment.dit) == attached_hash
    assert adapter.change().changed == 0 < outcome.change.changed
    assert outcome.trace.steps == adapter.steps
    assert not torch.equal(outcome.pixels, on_a_new_network("none").pixels)
    adapter.detach()
    assert state_hash(experiment.dit) == base_hash
    assert outcome.state == {}
    assert any(tensor.any() for tensor in on_a_new_network(name).state.values())


@pytest.mark.parametrize(
    "window",
    [Window(), Window(model_frames=45, scored_from=30), Window(known_frames=17), Window(known_chunks="whole")],
    ids=["default", "45 frames", "17 known", "whole chunks"],
)
def test_pixels_are_the_frames_after_the_known_ones(window):
    experiment = tiny_experiment(BFLOAT16, window=window)
    outcome = run(experiment, NoAdaptation())
    assert outcome.latents.shape == (1, 16, 14 if window.model_frames == 45 else 15, 2, 4)
    assert outcome.latents.dtype == outcome.pixels.dtype == torch.float32
    assert outcome.pixels.shape == (3, 45 - window.known_frames, 16, 32)
    every_frame = experiment.vae.decode(outcome.latents)[0].float()
    assert torch.equal(outcome.pixels, every_frame[:, window.known_frames : 45])
    assert outcome.pixels.isfinite().all()


@pytest.mark.parametrize(("phase", "at"), [("adapt", 1), ("sample", 2)])
@each_adaptation
def test_an_interruption_leaves_the_network_as_it_was(name, phase, at):
    def stop(now: str, done: int, total: int) -> None:
        if (now, done) == (phase, at):
            raise Interrupted

    experiment = short_experiment()
    base_hash = state_hash(experiment.dit)
    adapter = METHODS[name].attach(experiment.dit, 0)
    attached_hash = state_hash(experiment.dit)
    with pytest.raises(Interrupted):
        continue_clip(experiment, tiny_known(experiment), adapter, progress=stop)
    assert state_hash(experiment.dit) == attached_hash
    adapter.detach()
    assert state_hash(experiment.dit) == base_hash


def test_a_failure_while_decoding_leaves_the_network_as_it_was(monkeypatch):
    experiment = short_experiment()
    base_hash = state_hash(experiment.dit)

    def fail(*args) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(experiment.vae), "decode", fail)
    adapter = METHODS["full"].attach(experiment.dit, 0)
    with pytest.raises(torch.OutOfMemoryError):
        continue_clip(experiment, tiny_known(experiment), adapter)
    assert state_hash(experiment.dit) == base_hash


def test_a_learning_rate_that_changes_no_weight_is_an_error():
    experiment = short_experiment()
    base_hash = state_hash(experiment.dit)
    message = (
        r"^adapting changed no weight that computes \(3 steps moved the masters by \d\.\de[+-]\d\d\): "
        r"the learning rate is too small for the weights' dtype; raise lr$"
    )
    with pytest.raises(UserError, match=message):
        run(experiment, FullFineTuning(steps=3, lr=1e-9))
    assert state_hash(experiment.dit) == base_hash
    with pytest.raises(UserError, match=message):
        run(tiny_experiment(torch.float32, window=SHORT), FullFineTuning(steps=3, lr=1e-20))


def test_a_window_that_leaves_nothing_to_predict_still_serves_the_baseline():
    experiment = tiny_experiment(BFLOAT16, window=Window(total_frames=17, known_frames=9, model_frames=17))
    assert run(experiment, NoAdaptation()).pixels.shape == (3, 8, 16, 32)
    with pytest.raises(ValueError, match=r"it was 3 of 3 known latent frames$"):
        run(experiment, METHODS["lora"])


@each_method
def test_adapting_the_prompt_branch_alone_is_another_result(name):
    experiment = short_experiment(adapted_branches="conditional")
    base_hash = state_hash(experiment.dit)
    prompt, every = run(experiment, METHODS[name], keep_state=True), on_a_new_network(name)
    assert state_hash(experiment.dit) == base_hash
    # Adapting is the same; sampling is not, unless nothing was adapted: then it differs by rounding alone.
    assert every.trace == prompt.trace
    assert all(torch.equal(every.state[key], prompt.state[key]) for key in every.state)
    apart = ((every.latents - prompt.latents).norm() / every.latents.norm()).item()
    assert apart < 0.01 if name == "none" else apart > 0.02


def test_a_clip_reports_its_progress_time_and_memory():
    experiment, calls = short_experiment(), []
    outcome = run(experiment, METHODS["lora"], progress=lambda *call: calls.append(call))
    assert calls == [("adapt", 1, 2), ("adapt", 2, 2), *(("sample", step, 4) for step in range(1, 5))]
    assert set(outcome.seconds) == {"adapt", "sample", "decode"}
    assert all(0 < seconds < 60 for seconds in outcome.seconds.values())
    calls.clear()
    run(experiment, DeltaClosedForm(), progress=lambda *call: calls.append(call))
    assert calls[0] == ("adapt", 1, 1)
    if sys.platform == "linux":
        assert isinstance(outcome.peak_memory_bytes, int)
        assert outcome.peak_memory_bytes > 50e6  # bytes: PyTorch alone takes more


def test_a_description_is_plain_numbers():
    outcome = run(short_experiment(), METHODS["lora"])
    description = describe(outcome)
    assert description["steps"] == 2 and len(description["losses"]) == len(description["zero_losses"]) == 2
    assert set(description["change"]) == {"master", "effective", "changed", "trained"}
    assert re.fullmatch(r"[\d.e+-]+", str(description["change"]["effective"]))
