"""The rows of `bench.peers.opensora`: the official code and ours on one clip, with the same weights and the same noise."""

import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.adaptation import AdaptationSettings
from ...engine.clip import encode_known, task_of
from ...engine.denoiser import Denoiser
from ...engine.flow import sampling_timesteps
from ...engine.methods import FullFineTuning, LoRA
from ...engine.models.stdit3 import Condition
from ...engine.models.vae import CHUNK_LATENTS, STRIDE, VAE
from ...engine.sampler import ContinuationGuidance, SamplerSettings, sample
from ..step_rows import channels, on
from ..step_scene import Scene, describe_path
from ..suite import Absent, Row
from .official import FixedText, Official
from .peft import inject

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""By dtype; several steps of a sampler may drift five times as far. In float32 on a CPU the distances are near 1e-6.

A VAE in bfloat16 rounds at every layer, and two that round in another order lie apart by more than either from float32. There the
yardstick is our plain path: twice its distance from itself in float32 is allowed.
"""
# Of the sampler: the last step is odd and after the forced ones, so unguided.
STEPS, FORCED, TEXT, IMAGE = 4, 2, 7.5, 5.0
TILE = 4  # the size of tile that v1.3's configurations give


@dataclass
class Pair:
    """The official code and ours on one clip."""

    official: Official
    scene: Scene
    times: dict[str, float] = field(default_factory=dict)
    truth: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    """What is allowed instead of TOLERANCE, by kind of row."""

    @property
    def device(self) -> torch.device:
        return self.scene.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scene.experiment.dit.dtype

    @cached_property
    def dit(self) -> Any:
        ours = self.scene.experiment.dit
        return self.official.dit(ours.config, ours.state_dict(), self.device, self.dtype)

    @cached_property
    def text(self) -> FixedText:
        return FixedText(self.dit, self.scene.caption().embedding)

    def drop(self) -> None:
        """Forget the official transformer, whose memory a row after it may need."""
        for name in ("dit", "text"):
            self.__dict__.pop(name, None)
        gc.collect()

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of a sampled latent."""
        _, C, _, h, w = self.scene.known.latents.shape
        return (1, C, self.scene.experiment.window.latent_frames, h, w)

    def given(self) -> tuple[Tensor, Tensor]:
        """The known latents and their mask, in a sampled latent's shape."""
        known = self.scene.known.latents
        given = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        mask = torch.zeros_like(given)
        given[:, :, : known.shape[2]], mask[:, :, : known.shape[2]] = known, 1
        return given, mask

    def about(self, frames: int) -> dict[str, Tensor]:
        """Size, rate and length, in the model's dtype as the official scripts pass them."""
        height, width = self.scene.experiment.pixel_size
        values = {"height": height, "width": width, "num_frames": frames, "fps": self.scene.experiment.window.fps}
        return {
            name: torch.tensor([float(value)], device=self.device, dtype=self.dtype) for name, value in values.items()
        }

    def judge(
        self, kind: str, who: str, found: Tensor, ours: Callable[[], Tensor] | None = None, factor: float = 1.0
    ) -> Row:
        """How far a result lies from the official one. The official one itself is held against `ours`, the plain path's."""
        found = found.detach()
        if ours is None and kind not in self.truth:
            raise Absent("there is no official result to hold it against")
        distance = relative(found, ours().detach() if ours else self.truth[kind])
        allowed = self.limits.get(kind, factor * TOLERANCE[self.dtype])
        if not distance <= allowed:
            raise ArithmeticError(
                f"relative distance {distance:.3g} between the official code and ours, allowed {allowed:.3g}"
            )
        if ours:
            self.truth[kind] = found
        return {"who": who, "against": {"distance": distance, "allowed": allowed}, "peer": self.official.label}

    def yardstick(self, kind: str, ours: Callable[[], Tensor], exact: Callable[[], Tensor]) -> None:
        """Allow twice our own result's distance from ours in float32, where the networks are in bfloat16: nothing of the official
        result, which is judged by it."""
        if self.dtype != torch.float32 and kind not in self.limits:
            self.limits[kind] = 2 * relative(ours(), exact())

    def told(self, kind: str, who: str, row: Row) -> Row:
        """The row with how many times longer the official code took."""
        if who == "official":
            self.times[kind] = row["ms"]
        elif kind in self.times:
            row["ratio"] = self.times[kind] / row["ms"]
        return row


def relative(found: Tensor, truth: Tensor) -> float:
    """The length of the difference over that of the truth, in float32."""
    found, truth = found.float(), truth.float()
    return ((found - truth).norm() / truth.norm()).item()


def official_path(pair: Pair) -> str:
    kernels = ", ".join(f"{name}: {what}" for name, what in pair.official.replaced.items())
    return f"official code, eager; {kernels}; layer norm {'apex' if pair.official.layernorm_kernel else 'PyTorch'}"


def branches(who: str) -> Callable[[Pair], Row]:
    """One evaluation of the three guidance branches."""

    def run(pair: Pair) -> Row:
        scene, (given, mask) = pair.scene, pair.given()
        z = torch.randn(pair.shape, generator=torch.Generator().manual_seed(2)).to(pair.device)
        t = torch.tensor(600.0, device=pair.device)

        def official() -> Tensor:
            y = torch.cat([pair.text.y, pair.text.null(1), pair.text.null(1)])
            out = pair.dit(
                z.expand(3, -1, -1, -1, -1), t.expand(3), y, mask=pair.text.mask,
                cond=torch.cat([given, given, torch.zeros_like(given)]), cond_mask=mask.repeat(3, 1, 1, 1, 1),
                mask_index=list(range(scene.known.latents.shape[2])), y_null=pair.text.null(3),
                **pair.about(scene.experiment.window.model_frames),
            )  # fmt: skip
            return out.chunk(2, dim=1)[0]

        with torch.no_grad():
            ours = denoiser(pair, given, mask)
            if who.startswith("official"):
                if who == "official, blocks compiled":
                    compile_blocks(pair)
                row, found = scene.watch.measure(official)
                row |= pair.judge("branches", who, found, lambda: torch.cat(ours(z, t, all_branches=True)))
                row["path"] = official_path(pair).replace("eager", "eager" if who == "official" else "blocks compiled")
            else:
                with on(scene, who):
                    step = denoiser(pair, given, mask)
                    row, found = scene.watch.measure(lambda: torch.cat(step(z, t, all_branches=True)))
                row |= pair.judge("branches", who, found) | {"path": path_of(scene, who)}
        return pair.told("branches", who, row)

    return run


def denoiser(pair: Pair, given: Tensor, mask: Tensor) -> Any:
    experiment, known = pair.scene.experiment, tuple(range(pair.scene.known.latents.shape[2]))
    geometry = experiment.dit.geometry(pair.shape[2], pair.shape[3:], experiment.pixel_size, known)  # type: ignore[arg-type]
    return Denoiser(experiment.dit, geometry, experiment.window.fps, pair.scene.caption(), Condition(given, mask))


def path_of(scene: Scene, name: str) -> str:
    return describe_path(scene.paths(name))


def compile_blocks(pair: Pair) -> None:
    """Each block of the official model through torch.compile; the rest of its forward stays as it is."""
    pair.drop()
    for block in (*pair.dit.spatial_blocks, *pair.dit.temporal_blocks):
        block.forward = torch.compile(block.forward, backend=pair.scene.compiler)


def sampler(who: str) -> Callable[[Pair], Row]:
    """The whole loop for a few steps, by the official scheduler and by ours, from the same noise."""

    def run(pair: Pair) -> Row:
        scene, (given, mask) = pair.scene, pair.given()
        window, size = scene.experiment.window, scene.experiment.pixel_size
        start = torch.randn(pair.shape, generator=torch.Generator().manual_seed(2)).to(pair.device, pair.dtype)
        torch.manual_seed(3)
        fresh = [torch.randn_like(given) for _ in range(STEPS)]  # what the official loop draws from this seed
        scheduler = pair.official.scheduler(STEPS, cfg_scale=TEXT, force_num=FORCED)
        settings = SamplerSettings(steps=STEPS, text_guidance=TEXT, image_guidance=IMAGE, force_steps=FORCED)

        def official() -> Tensor:
            torch.manual_seed(3)
            return scheduler.sample(
                pair.dit, pair.text, z=start, prompts=["a clip"], device=pair.device,
                additional_args=pair.about(window.model_frames), guidance_scale=TEXT, image_cfg_scale=IMAGE, progress=False,
                z_cond=given, z_cond_mask=mask, mask_index=list(range(scene.known.latents.shape[2])), use_sdedit=True,
                use_oscillation_guidance_for_text=True, use_oscillation_guidance_for_image=True,
            )  # fmt: skip

        def ours() -> Tensor:
            return sample(
                ContinuationGuidance(denoiser(pair, given, mask), settings, pair.shape[2]), start,
                sampling_timesteps(STEPS, *size, window.model_frames, size_dtype=pair.dtype),
                known=given, known_mask=mask, known_noise=lambda step: fresh[step],
            )  # fmt: skip

        with torch.no_grad():
            if who == "official":
                row, found = scene.watch.measure(official, runs=2)
                row |= pair.judge("sampler", who, found, ours, factor=5) | {"path": official_path(pair)}
            else:
                with on(scene, who):
                    row, found = scene.watch.measure(ours, runs=2)
                row |= pair.judge("sampler", who, found, factor=5) | {"path": path_of(scene, who)}
        return pair.told("sampler", who, row | {"steps": STEPS})

    return run


def training(who: str, lora: bool) -> Callable[[Pair], Row]:
    """A training step on the official loss: all weights with AdamW in the model's dtype, or peft's LoRA; ours by its own methods."""

    def run(pair: Pair) -> Row:
        kind, watch = "lora" if lora else "full", pair.scene.watch
        experiment = replace(pair.scene.experiment, adaptation=AdaptationSettings(objective="official"))
        if who == "official":
            task = task_of(experiment, pair.scene.known)
            known, draw = pair.scene.known.latents, task.draw(0)
            scheduler = pair.official.scheduler(1, drop_condition={"keep": 1.0})
            context = list(range(experiment.adaptation.context_latents))
            about = pair.about(experiment.window.model_frames)
            pair.drop()
            parameters = lora_of(pair.dit) if lora else trained(pair.dit)
            optimizer = torch.optim.AdamW(parameters, 1e-5, weight_decay=0.0)
            wrapped = Wrapped(pair.dit)

            def loss() -> Tensor:
                model_args = {"y": pair.text.y, "mask": pair.text.mask, **about}
                terms = scheduler.training_losses(
                    wrapped, known.clone(), model_args, draw.noise, t=draw.t, mask_index=context
                )
                return terms["loss"].mean()

            def step() -> Tensor:
                value = loss()
                value.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                return value.detach()

            # Before any step: all runs after this one train.
            if lora:
                told = pair.judge(kind, who, loss().reshape(1), lambda: task.loss(draw).reshape(1))
            else:
                ours = with_gradients(experiment.dit, lambda: task.loss(draw))
                pair.judge("gradients", who, with_gradients(pair.dit, loss), lambda: ours, factor=5)
                told = pair.judge(kind, who, loss().reshape(1), lambda: ours[:1])
            row, _ = watch.measure(step)
            pair.drop()
            return pair.told(
                kind, who, row | told | {"path": official_path(pair), "trained": sum(p.numel() for p in parameters)}
            )
        method = LoRA(steps=6) if lora else FullFineTuning(steps=6)
        with on(pair.scene, who):
            adapter = method.attach(experiment.dit, 0)
            try:
                row, trace = watch.steps(
                    lambda tick: adapter.adapt(task_of(experiment, pair.scene.known), tick), adapter.restore
                )
                told = pair.judge(kind, who, torch.tensor(trace.losses[:1], device=pair.device))
                row |= told | {"path": path_of(pair.scene, who), "trained": adapter.change().trained}
            finally:
                adapter.detach()
        return pair.told(kind, who, row)

    return run


def with_gradients(model: Any, loss: Callable[[], Tensor]) -> Tensor:
    """The loss, and the gradients of the first qkv and of the last layer, each in units of its own length; [1 + numbers]."""
    named = dict(model.named_parameters())
    leaves = [
        named[name].requires_grad_(True) for name in ("spatial_blocks.0.attn.qkv.weight", "final_layer.linear.weight")
    ]
    value = loss()
    gradients = torch.autograd.grad(value, leaves)
    if model.__class__.__module__.startswith("vidtta."):
        model.requires_grad_(False)
    return torch.cat([value.detach().reshape(1), *(g.flatten().float() for g in gradients)])


class Wrapped(nn.Module):
    """The official training loss reaches the model through `.module`, as a wrapper for many GPUs has it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter but the frozen frequencies."""
    found = [p for name, p in model.named_parameters() if not name.endswith("rope.freqs")]
    for parameter in found:
        parameter.requires_grad_(True)
    return found


def lora_of(model: nn.Module) -> list[nn.Parameter]:
    """peft's LoRA of rank 16 on qkv and proj of every block; raises Absent without peft."""
    return inject(model, rank=16, alpha=16.0)


def autoencoder(who: str, what: str) -> Callable[[Pair], Row]:
    """Encode the known frames, or decode the chunks that hold the generated ones: the same work on both sides. `official, as
    shipped` does what v1.3's scripts do: tiled convolutions, and all frames of the clip."""

    def run(pair: Pair) -> Row:
        scene, experiment, window = pair.scene, pair.scene.experiment, pair.scene.experiment.window
        latents = torch.randn(pair.shape, generator=torch.Generator().manual_seed(3)).to(pair.device, pair.dtype)
        first = max(window.generated.start - 1, 0) // STRIDE
        shift = STRIDE * first

        def ours(vae: VAE = experiment.vae) -> Tensor:
            if what == "encode":
                return encode_known(vae, scene.pixels, window)
            return vae.decode(latents, window.generated)

        with torch.no_grad():
            if not who.startswith("official"):
                with channels(scene, "last triton" if who == "fused" else "plain"):
                    row, found = scene.watch.measure(ours, runs=3)
                told = pair.judge(f"vae {what}", who, found)
                return pair.told(f"vae {what}", who, row | told | {"path": f"ours, {who}"})
            shipped = who == "official, as shipped"
            vae: Any = pair.official.vae(
                experiment.vae.config, experiment.vae.state_dict(), pair.device, pair.dtype, TILE if shipped else None
            )
            frames = window.encoded_frames
            whole = scene.pixels[None].to(pair.dtype)
            padded = torch.cat(
                [whole, whole[:, :, -1:].expand(-1, -1, window.model_frames - whole.shape[2], -1, -1)], dim=2
            )
            if what == "encode":

                def same() -> Tensor:
                    return vae.encode(whole[:, :, :frames], sample_posterior=False)

                def all_of_it() -> Tensor:
                    return vae.encode(padded)
            else:

                def same() -> Tensor:
                    out = vae.decode(latents[:, :, CHUNK_LATENTS * first :])
                    return out[:, :, window.generated.start - shift : window.generated.stop - shift]

                def all_of_it() -> Tensor:
                    return vae.decode(latents)

            found = same()
            pair.yardstick(f"vae {what}", ours, lambda: ours(deepcopy(experiment.vae).float()))
            told = pair.judge(f"vae {what}", who, found, ours)
            row, _ = scene.watch.measure(all_of_it if shipped else same, runs=3)
            kind = f"vae {what}{', as shipped' if shipped else ''}"
            path = f"official code, convolutions {'tiled, all frames of the clip' if shipped else 'whole, the same frames as ours'}"
            return pair.told(kind, "official", row | told | {"path": path})

    return run


ROWS: dict[str, Callable[[Pair], Row]] = {
    **{f"opensora branches {who}": branches(who) for who in ("official", "eager", "fused")},
    **{f"opensora sampler {who}": sampler(who) for who in ("official", "eager", "fused")},
    **{
        f"opensora vae {what} {who}": autoencoder(who, what)
        for what in ("encode", "decode")
        for who in ("official", "official, as shipped", "eager", "fused")
    },
    **{f"opensora full {who}": training(who, False) for who in ("official", "eager", "fused")},
    **{f"opensora lora {who}": training(who, True) for who in ("official", "eager", "fused")},
    "opensora branches official, blocks compiled": branches("official, blocks compiled"),
}
