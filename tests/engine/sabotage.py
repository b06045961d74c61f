"""Mistakes as a slip would plant them in the code, each a function that patches it; and a lab in which nothing may be wrong.

`test_sabotage.py` says how each is found.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vidtta.engine import adaptation, session
from vidtta.engine import clip as clip_module
from vidtta.engine import run as run_module
from vidtta.engine.adaptation import AdaptationSettings, Task
from vidtta.engine.files import write_tensors
from vidtta.engine.methods import full
from vidtta.engine.methods.full import FullAdapter
from vidtta.engine.methods.optimize import Masters, Trace
from vidtta.engine.models.load import load_dit, load_vae
from vidtta.engine.models.stdit3 import Caption, Condition, STDiT3
from vidtta.engine.session import Session
from vidtta.engine.window import Window

from .tiny import noise
from .tiny_run import CLIPS, DELTA, DIT, FULL, HEIGHT, WIDTH, Lab, make_clip, tiny_lab

Patch = pytest.MonkeyPatch
TOTAL, KNOWN = 26, 22
ARMS = {"full": FULL, "delta": DELTA}
CPU, FLOAT32 = torch.device("cpu"), torch.float32


def _train(lab: Lab, steps: int = 120) -> None:
    """A network that beats predicting zero on the lab's clips, beside the untrained one."""
    dit, vae = load_dit(str(lab.root / "dit"), CPU, FLOAT32), load_vae(str(lab.root / "vae"), CPU, FLOAT32)
    window = Window(total_frames=TOTAL, known_frames=KNOWN, model_frames=33)
    pixels = [lab.frames(name, TOTAL).transpose(0, 1) / 127.5 - 1 for name in CLIPS]
    latents = [clip_module.encode_known(vae, one, window) for one in pixels]
    options = {"pixel_size": (HEIGHT, WIDTH), "fps": 24.0, "sampled_frames": 33, "sampling_steps": 2}
    optimizer = torch.optim.AdamW(dit.requires_grad_(True).parameters(), 1e-2)
    for step in range(steps):
        name, known = CLIPS[step % 2], latents[step % 2]
        caption = Caption(noise(step, 1, DIT["model_max_length"], DIT["caption_channels"]))
        task = Task(dit, known, caption, AdaptationSettings(), recipe_seed=1, clip_id=name, **options)
        task.loss(task.draw(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    (lab.root / "trained").mkdir()
    (lab.root / "trained/config.json").write_text(json.dumps(DIT))
    save_file(
        {name: value.contiguous() for name, value in dit.state_dict().items()}, lab.root / "trained/model.safetensors"
    )


@contextmanager
def trained_lab(root: Path) -> Iterator[Lab]:
    """A lab whose network is trained, whose window is that of real runs up to the frames to predict, and without leave."""
    with tiny_lab(root) as lab:
        for seed, name in enumerate(CLIPS):
            make_clip(root / "clips" / f"{name}.mp4", seed, frames=TOTAL + 3)
        write_tensors(root / "table.safetensors", {"table": noise(0, 1025, DIT["caption_channels"])})
        _train(lab)
        model = {"dit": str(root / "trained"), "text": f"embedded:{root}/table.safetensors", "allow_untrained": False}
        lab.settings["model"] |= model
        lab.settings |= {
            "window": {"total_frames": TOTAL, "known_frames": KNOWN, "model_frames": 33},
            "adaptation": {"context_latents": 3, "draws": 2, "timesteps": "sampler"},
            "arms": ARMS,
        }
        yield lab


def in_hand(patch: Patch) -> list[str]:
    """A list of the arms whose clips were begun, for mistakes that concern some arms alone."""
    run_clip, arms = run_module.run_clip, [""]

    def follow(session: Session, arm: str, *rest):
        arms.append(arm)
        return run_clip(session, arm, *rest)

    patch.setattr(run_module, "run_clip", follow)
    return arms


def flipped_target(patch: Patch) -> None:
    patch.setattr(adaptation, "velocity_target", lambda x0, noise: noise - x0)


def flipped_output(patch: Patch) -> None:
    head = STDiT3.head
    patch.setattr(STDiT3, "head", lambda self, *inputs: -head(self, *inputs))


def target_in_the_condition(patch: Patch) -> None:
    start = Task.__init__

    def unmasked(self, model, latents, *rest, **options):
        start(self, model, latents, *rest, **options)
        self.condition = Condition(latents, self.condition.mask)

    patch.setattr(Task, "__init__", unmasked)


def target_under_the_noise(patch: Patch) -> None:
    patch.setattr(adaptation, "add_noise", lambda x0, noise, t: x0 + t.reshape(-1, 1, 1, 1, 1) / 1000 * noise)


def no_condition(patch: Patch) -> None:
    patch.setattr(adaptation, "Condition", lambda latents, mask: Condition(0 * latents, 0 * mask))


def scored_frames_encoded(patch: Patch) -> None:
    encode = session.encode_known

    def late(vae, pixels, window, generator):
        return encode(vae, pixels[:, TOTAL - window.encoded_frames :], window, generator)

    patch.setattr(session, "encode_known", late)


def sliced_from_the_whole_clip(patch: Patch) -> None:
    def whole(vae, pixels, window, generator):
        return vae.encode(pixels[None], generator)[:, :, : window.known_latents]

    patch.setattr(session, "encode_known", whole)


def whole_chunks_only(patch: Patch) -> None:
    patch.setattr(Window, "encoded_frames", property(lambda self: (self.known_frames - 1) // 16 * 16 + 1))


def no_step_taken(patch: Patch) -> None:
    patch.setattr(full, "optimize", lambda *inputs, **options: Trace())


def masters_in_bfloat16(patch: Patch) -> None:
    def rounded(self, parameters, on_publish=lambda: None, *, path="plain"):
        self.parameters = self.tensors = list(parameters)
        self.on_publish, self.path = on_publish, path

    patch.setattr(Masters, "__init__", rounded)


def not_restored(patch: Patch) -> None:
    patch.setattr(FullAdapter, "restore", lambda self: None)


def restored_off_by_a_bit(patch: Patch) -> None:
    restore = FullAdapter.restore

    def nearly(self):
        restore(self)
        if self.trace.steps:
            next(iter(self.trained.values())).data.view(-1).view(torch.int32)[0] ^= 1

    patch.setattr(FullAdapter, "restore", nearly)


def adapted_against_the_gate(patch: Patch) -> None:
    run_clip, adapters = run_module.run_clip, []

    def follow(session, arm, clip, captions, adapter, *rest):
        adapters.append(adapter)
        return run_clip(session, arm, clip, captions, adapter, *rest)

    patch.setattr(run_module, "run_clip", follow)
    patch.setattr(run_module, "NoAdapter", lambda: adapters[-1])


def more_changed_than_trained(patch: Patch) -> None:
    adapt = FullAdapter.adapt

    def and_more(self, task, on_step):
        self.model.rope.freqs.data[0] += 1
        return adapt(self, task, on_step)

    patch.setattr(FullAdapter, "adapt", and_more)


def not_in_force_while_sampling(patch: Patch) -> None:
    sample = clip_module.sample_continuation

    def with_base_weights(experiment, known, adapter, progress):
        with adapter.suspended():
            return sample(experiment, known, adapter, progress)

    patch.setattr(clip_module, "sample_continuation", with_base_weights)


def another_clips_frames(patch: Patch) -> None:
    load, arms = run_module.load, in_hand(patch)

    def shuffled(session, clip):
        return load(session, clip if arms[-1] in ("", "baseline") else session.other(clip))

    patch.setattr(run_module, "load", shuffled)


def another_clips_latents(patch: Patch) -> None:
    latents, arms = Session.known_latents, in_hand(patch)

    def shuffled(self, clip, content, pixels):
        if arms[-1] not in ("", "baseline"):
            shown = run_module.read(self, clip := self.other(clip))
            content, pixels = shown.content, shown.pixels
        return latents(self, clip, content, pixels)

    patch.setattr(Session, "known_latents", shuffled)


def noise_of_the_process(patch: Patch) -> None:
    patch.setattr(clip_module, "normal", lambda shape, *names: torch.randn(shape))


def another_sampler_in_the_baseline(patch: Patch) -> None:
    sample = clip_module.sample_continuation

    def fewer_steps(experiment, known, adapter, progress):
        if not adapter.steps:
            experiment = replace(experiment, sampler=replace(experiment.sampler, steps=1))
        return sample(experiment, known, adapter, progress)

    patch.setattr(clip_module, "sample_continuation", fewer_steps)
