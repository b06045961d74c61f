"""What stays the same from clip to clip of a run, and what its arms share: captions, known latents, reference scores."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .arms import Arm, arms_of
from .choices import PLAIN, Choices
from .clip import Experiment, Progress, encode_known, timed
from .data.clips import Clip, clip_hash
from .data.video import to_uint8, write_video
from .environment import describe_code, device_name
from .errors import UserError
from .files import sha256_json, write_json, write_tensors
from .gate import Gate, load_gate
from .methods import adapts
from .methods.optimize import AdamW
from .methods.protocol import Adapter
from .metrics.complexity import compute_complexity
from .metrics.lpips import LPIPS
from .models.load import Models
from .models.stdit3 import Caption
from .processors import usable_cpus
from .references import Scores, begin_reference_scores, begin_scores, begin_truth_flow
from .rundir import RunDirectory, check_same_settings, read_json
from .seeds import generator_for, seed_for
from .text.cache import encode_distinct, text_key
from .text.encoder import load_text_encoder
from .text.prompt import prepare_prompt

if TYPE_CHECKING:
    from .recipe import Recipe


@dataclass(frozen=True)
class Session:
    """A recipe with its models loaded and its clips listed. listed: all of them; clips: those of this task."""

    recipe: "Recipe"
    directory: RunDirectory
    models: Models
    listed: list[Clip]
    clips: list[Clip]
    lpips: LPIPS | None
    lpips_reason: str | None
    marks: tuple[str, ...]
    """What must be said beside every result."""
    warnings: tuple[str, ...] = ()
    choices: Choices = PLAIN
    """Which path computes each kind of work."""

    @cached_property
    def arms(self) -> dict[str, Arm]:
        return arms_of(self.recipe)

    @cached_property
    def gates(self) -> dict[str, Gate]:
        """The gates by the arm that the recipe gives them to. Raises UserError where a predictor does not fit its arm."""
        return {
            name: load_gate(name, settings, self._ungated_settings(name)) for name, settings in self.recipe.gate.items()
        }

    def gate(self, arm: str) -> Gate | None:
        """What decides whether an arm adapts to a clip; None where it always does."""
        name = self.arms[arm].gate
        return None if name is None else self.gates[name]

    @property
    def baseline(self) -> str:
        """The arm of kind none, which runs first."""
        return next(iter(self.arms))

    def other(self, clip: Clip) -> Clip:
        """The clip that a placebo adapts on: the next of the whole list, so that it is the same in every shard."""
        at = [c.id for c in self.listed].index(clip.id)
        return self.listed[(at + 1) % len(self.listed)]

    def steps(self, arm: str) -> int:
        """Gradient steps of an arm; 0 where it takes none."""
        method = self.arms[arm].method
        return method.steps if isinstance(method, AdamW) else 0

    def continual(self, arm: str) -> bool:
        """Whether an arm's weights carry over from clip to clip."""
        return self.recipe.adaptation.reset != "clip" and adapts(self.arms[arm].method)

    def adapted_before(self, arm: str, clip: Clip) -> list[Clip]:
        """The clips of the whole list whose adaptation this one starts from, in order; none where adaptation is episodic."""
        if not self.continual(arm):
            return []
        at, every = [c.id for c in self.listed].index(clip.id), self.recipe.adaptation.reset
        return self.listed[at - at % every if isinstance(every, int) else 0 : at]

    def adapts_on(self, arm: str, clip: Clip) -> list[Clip]:
        """Every clip that shapes the weights which continue this one, in order."""
        last = self.other(clip) if self.arms[arm].placebo == "other_clip" else clip
        return [*self.adapted_before(arm, clip), last]

    def placebo_generator(self, clip_id: str) -> torch.Generator:
        """For the random placebo of a clip, on the network's device; the same for every method."""
        seed = seed_for(self.recipe.seed, clip_id, "placebo")
        return torch.Generator(self.models.dit.device).manual_seed(seed)

    @cached_property
    def experiment(self) -> Experiment:
        r = self.recipe
        return Experiment(
            self.models.dit,
            self.models.vae,
            r.window,
            (r.data.height, r.data.width),
            r.sampler,
            r.adaptation,
            r.seed,
            r.samples,
        )

    @cached_property
    def text_key(self) -> str:
        c = self.models.dit.config
        return text_key(
            self.recipe.model.text, channels=c.caption_channels, max_length=c.model_max_length, dtype=torch.float32
        )

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything that shapes a video except the method and the clip, as plain JSON; what a user writes comes first."""
        r, paths = self.recipe, self.choices.shaping_videos()
        return plain_json(
            {
                "seed": r.seed,
                "window": asdict(r.window),
                "size": [r.data.height, r.data.width],
                "prompt": asdict(r.prompt),
                "sampler": r.sampler.shaping_videos(),
                "text": self.text_key,
                "dtype": r.model.dtype,
                "device": self.models.dit.device.type,
                "weights": self.models.hashes,
                **({"paths": paths} if paths else {}),
                **self._float8,
            }
        )

    @property
    def _float8(self) -> dict[str, str]:
        """Where linear layers compute in float8; nothing where none do, so results from before the key stay valid."""
        return {} if self.recipe.model.float8 == "none" else {"float8": self.recipe.model.float8}

    def settings(self, arm: str) -> dict[str, Any]:
        """Everything that shapes an arm's results except the clip, as plain JSON."""
        gate = self.gate(arm)
        return self._ungated_settings(arm) | ({"gate": gate.describe()} if gate else {})

    def _ungated_settings(self, arm: str) -> dict[str, Any]:
        method = self.arms[arm].method
        value: dict[str, Any] = {"protocol": self.protocol, "method": {"kind": method.kind, **asdict(method)}}
        if adapts(method):
            value["adaptation"] = asdict(self.recipe.adaptation)
            if paths := self.choices.shaping_adaptation():
                value["paths"] = paths
        if placebo := self.arms[arm].placebo:
            value["placebo"] = placebo
        return plain_json(value)

    def unfinished(self) -> dict[str, list[Clip]]:
        """Clips of this task without a result, by arm; those that failed before come last, so that none holds up the others.

        Raises UserError where a result of any listed clip was made under other settings, or, for this task's clips, from
        another video: one table must not mix them.
        """
        chosen, waiting = {clip.id for clip in self.clips}, {}
        contents: dict[str, str] = {}
        for arm in self.arms:
            settings = self.settings(arm)
            waiting[arm] = []
            for clip in self.listed:
                content = self._content(arm, clip, contents) if clip.id in chosen else None
                result = check_same_settings(self.directory, arm, clip, settings, content)
                if result is None and clip.id in chosen and (aside := self.directory.set_aside_damaged(arm, clip.id)):
                    print(f"warning: a damaged result is kept as {aside} and made again", file=sys.stderr)
                if clip.id in chosen and not (result and self._complete(arm, clip, result)):
                    waiting[arm].append(clip)
            waiting[arm].sort(key=lambda clip, arm=arm: self.directory.failure(arm, clip.id) is not None)
        return waiting

    def finished(self, arm: str, clip: Clip) -> bool:
        """Whether a clip that had no result has one by now, of another task whose range overlaps with this one's."""
        result = check_same_settings(self.directory, arm, clip, self.settings(arm))
        return result is not None and self._complete(arm, clip, result)

    def _content(self, arm: str, clip: Clip, contents: dict[str, str]) -> dict[str, Any] | None:
        """What a result of this clip must say of the videos it was made from; None where the clip cannot be read."""
        if not (self.directory.clip(arm, clip.id) / "result.json").exists():
            return None
        used = self.adapts_on(arm, clip)
        try:
            for one in (clip, *used):
                contents[one.id] = contents.get(one.id) or clip_hash(one)
        except UserError:
            return None
        return {"clip": contents[clip.id], "adapted_on": {one.id: contents[one.id] for one in used}}

    def _complete(self, arm: str, clip: Clip, result: dict[str, Any]) -> bool:
        """Whether a result holds all that the recipe now asks for: LPIPS where it can be had, flow, and the files of `keep`."""
        if self.lpips is not None and result["scores"]["lpips"]["mean"] is None:
            return False
        if (flow := self.recipe.scores.flow) != "none" and f"flow_error_{flow}" not in result["scores"]:
            return False
        if len(result.get("samples", [None])) < self.recipe.samples:
            return False
        folder = self.directory.clip(arm, clip.id)
        adapted = adapts(self.arms[arm].method) and result.get("gate", {}).get("adapted", True)
        if adapted and self.recipe.diagnostics.wanted and not (folder / "curves.json").exists():
            return False
        files = {"video": "video.mp4", "latents": "latents.safetensors", "adapter": "adapter.safetensors"}
        return all((folder / files[name]).exists() for name in self.recipe.keep if name != "adapter" or adapted)

    def attach(self, arm: str) -> Adapter:
        """An arm's method on the network; raises UserError where the network cannot take its settings."""
        try:
            return self.arms[arm].method.attach(self.models.dit, self.recipe.seed)
        except ValueError as error:
            raise UserError(f"arm {arm}: {error}") from error

    def captions(self, clips: list[Clip], progress: Progress) -> dict[str, Caption]:
        """Captions by clip id, kept off the device; the text encoder runs over the distinct new ones and leaves the device."""
        p, config, device = self.recipe.prompt, self.models.dit.config, self.models.dit.device
        prompts = {c.id: prepare_prompt(c.caption, p.aesthetic, p.motion, p.camera_motion) for c in clips}
        encoded = encode_distinct(
            lambda: load_text_encoder(
                self.recipe.model.text,
                channels=config.caption_channels,
                max_length=config.model_max_length,
                device=device,
                dtype=torch.float32,
            ),
            list(prompts.values()),
            self.directory.shared / "captions",
            self.text_key,
            lambda done: progress("captions", done, len(set(prompts.values()))),
        )
        return {c: Caption(encoded[prompt].embedding[None].float()) for c, prompt in prompts.items()}

    def known_latents(self, clip: Clip, content: str, pixels_3FHW: Tensor) -> tuple[Tensor, float]:
        """Latents of the known frames and the seconds it took to encode them; encoded once for all arms."""
        path = self.directory.shared / "latents" / f"{clip.id}-{self._vae_key(content)[:16]}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                # A copy, since a file's tensors lie at any address, and on a CPU some operations round by how theirs is aligned.
                latents, seconds = file.get_tensor("latents").clone(), float(file.metadata()["seconds"])
            return latents.to(pixels_3FHW.device), seconds
        except (OSError, SafetensorError, KeyError, TypeError):
            pass  # not there yet, or damaged: made again
        taken: dict[str, float] = {}
        with timed(taken, "encode", pixels_3FHW.device):
            latents = self.encode(clip, pixels_3FHW)
        write_tensors(path, {"latents": latents}, {"seconds": str(taken["encode"])})
        return latents, taken["encode"]

    def encode(self, clip: Clip, pixels_3FHW: Tensor) -> Tensor:
        """Latents of a clip's known frames, of the posterior's mode or its sample, as the recipe says."""
        window, generator = self.recipe.window, None
        if window.posterior == "sample":
            generator = generator_for(self.recipe.seed, clip.id, "posterior")
        return encode_known(self.models.vae, pixels_3FHW, window, generator)

    def write_references(
        self, clip: Clip, content: str, pixels_3FHW: Tensor, truth_flow: Tensor | None
    ) -> Callable[[int], None]:
        """Score the references for a clip, what kind of clip it is, and keep its video where videos are kept; once for all arms.
        What needs the device is done now; the rest, (processors) -> None, writes.
        """
        truth = self.directory.truth(clip.id, content)
        video = to_uint8(pixels_3FHW).cpu() if "video" in self.recipe.keep and not truth.exists() else None
        path = self.directory.reference(clip.id)
        flow = self.recipe.scores.flow
        key = sha256_json([self._vae_key(content), self.lpips_reason, flow])
        held, begun, kind = read_json(path) or {}, None, {}
        if held.get("key") != key or "kind" not in held:
            begun = begin_reference_scores(
                self.models.vae, pixels_3FHW, truth_flow, self.recipe.window, self.lpips, self.lpips_reason, flow
            )
            kind = compute_complexity(pixels_3FHW)

        def write(processors: int) -> None:
            if video is not None:
                write_video(truth, video, self.recipe.window.fps)
            if begun:
                write_json(path, {"clip": clip.id, "key": key, "kind": kind, "scores": begun(processors)})

        return write

    def begin_truth_flow(self, pixels_3FHW: Tensor) -> Callable[[int], Tensor] | None:
        """The flow of a clip's real frames, where the recipe asks for one; see `references.begin_truth_flow`."""
        return begin_truth_flow(pixels_3FHW, self.recipe.window, self.recipe.scores.flow)

    def begin_scores(
        self, generated_3FHW: Tensor, pixels_3FHW: Tensor, truth_flow: Tensor | None
    ) -> Callable[[int], Scores]:
        """Every score of a continuation that the recipe asks for; see `references.begin_scores`."""
        return begin_scores(
            generated_3FHW,
            pixels_3FHW,
            truth_flow,
            self.recipe.window,
            lpips=self.lpips,
            lpips_reason=self.lpips_reason,
            flow=self.recipe.scores.flow,
        )

    def score(self, generated_3FHW: Tensor, pixels_3FHW: Tensor) -> Scores:
        """`begin_scores`, finished."""
        flow, processors = self.begin_truth_flow(pixels_3FHW), usable_cpus()
        return self.begin_scores(generated_3FHW, pixels_3FHW, flow(processors) if flow else None)(processors)

    def _vae_key(self, content: str) -> str:
        """What decides the latents of a clip whose content has this hash."""
        protocol = self.protocol
        parts = [
            content,
            self.models.hashes["vae"],
            *(protocol[n] for n in ("seed", "window", "size", "dtype", "device")),
        ]
        return sha256_json(parts if self.choices.vae == "plain" else [*parts, self.choices.vae])

    def describe_window(self) -> dict[str, Any]:
        """Which frames were seen and which were scored; pixel frames counted from 1, ends included."""
        window = self.recipe.window
        return {
            "known_frames": window.known_frames,
            "encoded_frames": window.encoded_frames,
            "known_latents": window.known_latents,
            "model_frames": window.model_frames,
            "latent_frames": window.latent_frames,
            "scored": [window.scored.start + 1, window.scored.stop],
        }

    def describe_seeds(self, clip_id: str) -> dict[str, int]:
        """The seeds of a clip's draws: draw 0 of the adaptation, the sampler's start, and step 0's noise on known frames."""
        seed = self.recipe.seed
        purposes = ("adaptation", "sampling", "known frames")
        return {"recipe": seed} | {purpose: seed_for(seed, clip_id, purpose) for purpose in purposes}

    def describe_paths(self) -> dict[str, Any]:
        """Which code paths compute this run's results."""
        s = self.recipe.sampler
        return {
            "device": device_name(self.models.dit.device),
            "dtype": self.recipe.model.dtype,
            "deterministic": self.recipe.model.deterministic,
            "threads": torch.get_num_threads() if self.models.dit.device.type == "cpu" else None,
            "vidtta": describe_code(),
            "torch": torch.__version__,
            **self.choices.to_json(),
            **self._float8,
            "posterior": self.recipe.window.posterior,
            **(
                {"feature_cache": f"every {s.cache_every} steps after {s.cache_first} layers"}
                if s.cache_every > 1
                else {}
            ),
        }


def plain_json(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    return [plain_json(item) for item in value] if isinstance(value, list | tuple) else value
