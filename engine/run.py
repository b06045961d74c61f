"""A recipe, run: every arm on every clip, each result on disk before the next clip begins."""

import errno
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .clip import Experiment, Known, Outcome, continue_clip, describe, encode_known, timed
from .data.clips import Clip, clip_hash, list_clips
from .data.video import read_window, to_model, to_uint8, write_video
from .environment import describe_environment, device_name
from .errors import Interrupted, UserError
from .files import atomic_path, sha256_json, write_json, write_text
from .methods import AnyMethod
from .methods.protocol import Adapter
from .metrics.lpips import LPIPS
from .metrics.score import score_frames
from .models.checkpoint import state_hash
from .models.load import Models, choose_device, load_models
from .models.stdit3 import Caption
from .progress import RunProgress
from .references import reference_scores
from .rundir import RunDirectory, check_same_settings, read_json
from .stop import stop_flag
from .summary import print_summary, write_comparisons, write_summary
from .text.cache import encode_distinct, text_key
from .text.encoder import load_text_encoder
from .text.prompt import prepare_prompt

if TYPE_CHECKING:
    from .recipe import Recipe


def run(recipe: "Recipe", *, batch_start: int | None = None, batch_end: int | None = None, quiet: bool = False) -> int:
    """Run a recipe on clips batch_start .. batch_end - 1; returns the exit status.

    0: every clip has a result; 1: some clips failed (each is named with its reason); 130: stopped by a signal, and the same
    command goes on where it stopped. Raises UserError for what concerns the whole run.
    """
    directory = RunDirectory(Path(recipe.output_dir))
    clips = list_clips(recipe.data, Path.cwd())[batch_start:batch_end]
    if not clips:
        raise UserError(f"no clip lies in --batch-start {batch_start} --batch-end {batch_end}; the list ends before")
    lpips, lpips_reason = _lpips(recipe)
    models = load_models(recipe.model)
    session = Session(recipe, directory, models, clips, lpips, lpips_reason)
    todo = session.unfinished()
    _write_head(session)
    failed = 0
    with stop_flag() as stop, RunProgress(sum(map(len, todo.values())), quiet) as progress:
        try:
            for arm, waiting in todo.items():
                failed += run_arm(session, arm, waiting, progress, stop.check)
        except Interrupted as reason:
            progress.say(f"{reason}; finished clips are kept, and the same command goes on from here")
            return 130
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(f"{directory.root}: the disk is full; free some space and give the same command again") from error
            raise
        write_comparisons(directory, clips, list(recipe.arms), recipe.window, progress)
    rows = write_summary(directory, clips, list(recipe.arms))
    if not quiet:
        print_summary(rows, list(recipe.arms), models.marks)
        print(f"results: {directory.root}   videos side by side: {directory.root / 'comparisons'}")
    if failed:
        print(f"{failed} clip results are missing; the reasons are above and in {directory.root}/arms/*/clips/*/failure.json")
    return 1 if failed else 0


@dataclass(frozen=True)
class Session:
    """What stays the same from clip to clip."""

    recipe: "Recipe"
    directory: RunDirectory
    models: Models
    clips: list[Clip]
    lpips: LPIPS | None
    lpips_reason: str | None

    @property
    def experiment(self) -> Experiment:
        r = self.recipe
        return Experiment(
            self.models.dit, self.models.vae, r.window, (r.data.height, r.data.width), r.sampler, r.adaptation, r.seed
        )

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that shapes a video except the method and the clip."""
        r = self.recipe
        return {
            "seed": r.seed,
            "window": asdict(r.window),
            "size": [r.data.height, r.data.width],
            "prompt": asdict(r.prompt),
            "sampler": asdict(r.sampler),
            "text": self.text_key,
            "weights": self.models.hashes,
            "dtype": r.model.dtype,
            "device": choose_device(r.model.device).type,
        }

    @property
    def text_key(self) -> str:
        c = self.models.dit.config
        return text_key(
            self.recipe.model.text, channels=c.caption_channels, max_length=c.model_max_length, dtype=torch.float32
        )

    def settings(self, arm: str) -> dict[str, Any]:
        """Everything that shapes an arm's results except the clip, as plain JSON."""
        method = self.recipe.arms[arm]
        adapts = method.kind != "none"
        value = {"protocol": self.protocol, "method": asdict(method)}
        if adapts:
            value["adaptation"] = asdict(self.recipe.adaptation)
        return _plain(value)

    def unfinished(self) -> dict[str, list[Clip]]:
        """Clips without a result, by arm; raises UserError where a result was made under other settings."""
        return {
            arm: [c for c in self.clips if not check_same_settings(self.directory, arm, c.id, self.settings(arm))]
            for arm in self.recipe.arms
        }

    def captions(self, clips: list[Clip]) -> dict[str, Caption]:
        """The network's captions by clip id; the text encoder runs over the distinct new ones and leaves the device."""
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
        )
        return {c: Caption(encoded[prompt].embedding[None].to(device, torch.float32)) for c, prompt in prompts.items()}


def run_arm(
    session: Session, arm: str, clips: list[Clip], progress: RunProgress, check_stop: Callable[[], None]
) -> int:
    """One method on its clips; returns how many failed. Afterwards the network is bit for bit as before."""
    if not clips:
        return 0
    captions = session.captions(clips)
    try:
        adapter = session.recipe.arms[arm].attach(session.models.dit, session.recipe.seed)
    except ValueError as error:
        raise UserError(f"arm {arm}: {error}") from error
    failed = 0

    def step(phase: str, done: int, total: int) -> None:
        progress.step(phase, done, total)
        check_stop()

    try:
        for clip in clips:
            check_stop()
            progress.clip(arm, clip.id)
            try:
                result = run_clip(session, arm, clip, captions[clip.id], adapter, step)
            except Interrupted:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                failed += 1
                reason = str(error) if isinstance(error, UserError | ValueError | ArithmeticError) else repr(error)
                known = isinstance(error, UserError)
                trace = None if known else traceback.format_exc()
                session.directory.write_failure(arm, clip.id, {"clip": clip.id, "arm": arm, "reason": reason, "traceback": trace})
                progress.finished(f"{arm}  {clip.id}  FAILED: {reason}")
                continue
            progress.finished(_line(arm, clip.id, result))
    finally:
        adapter.detach()
    if state_hash(session.models.dit) != session.models.hashes["dit"]:
        raise RuntimeError(f"arm {arm} did not restore the network's weights; its results cannot be trusted")
    return failed


def run_clip(
    session: Session,
    arm: str,
    clip: Clip,
    caption: Caption,
    adapter: Adapter,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """One clip through one method: read, encode, adapt, sample, decode, score, write."""
    recipe, experiment, device = session.recipe, session.experiment, session.models.dit.device
    seconds: dict[str, float] = {}
    with timed(seconds, "read", device):
        frames = read_window(
            clip.path,
            start=clip.start,
            frames=recipe.window.total_frames,
            fps=recipe.window.fps,
            height=recipe.data.height,
            width=recipe.data.width,
        )
        content = clip_hash(clip)
        pixels = to_model(frames).to(device)
    latents, seconds["encode"] = shared_latents(session, clip, content, pixels)
    outcome = continue_clip(
        experiment,
        Known(clip.id, latents, caption),
        adapter,
        keep_state="adapter" in recipe.keep,
        progress=progress,
    )
    seconds |= outcome.seconds
    with timed(seconds, "score", device):
        scored = recipe.window.scored
        offset = recipe.window.generated.start
        scores = score_frames(
            outcome.pixels[:, scored.start - offset : scored.stop - offset],
            pixels[:, scored.start : scored.stop],
            lpips=session.lpips,
            lpips_reason=session.lpips_reason,
        )
    shared_references(session, clip, content, pixels)
    settings = session.settings(arm)
    result = {
        "clip": clip.id,
        "arm": arm,
        "caption": clip.caption,
        "marks": [*session.models.marks],
        "keys": {
            "settings": sha256_json(settings),
            "protocol": sha256_json(_plain(session.protocol)),
            "clip": content,
        },
        "settings": settings,
        "window": describe_window(session),
        "paths": session_paths(session),
        "adaptation": describe(outcome),
        "scores": scores,
        "cost": {"seconds": seconds, "peak_memory_bytes": outcome.peak_memory_bytes},
    }
    write_kept(session, arm, clip, frames, outcome)
    session.directory.write_result(arm, clip.id, result)
    return result


def shared_latents(session: Session, clip: Clip, content: str, pixels: Tensor) -> tuple[Tensor, float]:
    """Latents of the known frames and the seconds it took to encode them; encoded once for all arms."""
    recipe = session.recipe
    key = sha256_json(
        _plain([content, session.models.hashes["vae"], asdict(recipe.window), session.experiment.pixel_size, recipe.model.dtype])
    )
    path = session.directory.shared / "latents" / f"{clip.id}-{key[:16]}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("latents").to(pixels.device), float(file.metadata()["seconds"])
    except (OSError, SafetensorError, KeyError, TypeError):
        pass
    seconds: dict[str, float] = {}
    with timed(seconds, "encode", pixels.device):
        latents = encode_known(session.models.vae, pixels, recipe.window)
    with atomic_path(path) as temporary:
        save_file({"latents": latents.cpu().contiguous()}, temporary, {"seconds": str(seconds["encode"])})
    return latents, seconds["encode"]


def shared_references(session: Session, clip: Clip, content: str, pixels: Tensor) -> None:
    """Write the scores of the references for a clip, once for all arms."""
    path = session.directory.shared / "references" / f"{clip.id}.json"
    key = sha256_json(
        _plain(
            [
                content,
                session.models.hashes["vae"],
                asdict(session.recipe.window),
                session.experiment.pixel_size,
                session.recipe.model.dtype,
                session.lpips_reason,
            ]
        )
    )
    if (read_json(path) or {}).get("key") == key:
        return
    scores = reference_scores(
        session.models.vae, pixels, session.recipe.window, session.lpips, session.lpips_reason
    )
    write_json(path, {"clip": clip.id, "key": key, "scores": scores})


def write_kept(session: Session, arm: str, clip: Clip, frames: Tensor, outcome: Outcome) -> None:
    """The files that the recipe's `keep` names: the known frames followed by the generated ones, latents, adapted state."""
    folder, keep, window = session.directory.clip(arm, clip.id), session.recipe.keep, session.recipe.window
    if "video" in keep:
        video = torch.cat([frames[: window.known_frames], to_uint8(outcome.pixels).cpu()])
        write_video(folder / "video.mp4", video, window.fps)
    for name, tensors in (("latents", {"latents": outcome.latents}), ("adapter", outcome.state)):
        if name in keep and tensors:
            with atomic_path(folder / f"{name}.safetensors") as temporary:
                save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)


def describe_window(session: Session) -> dict[str, Any]:
    """Which frames were seen and which were scored; pixel frames counted from 1, ends included."""
    window = session.recipe.window
    return {
        "known_frames": window.known_frames,
        "encoded_frames": window.encoded_frames,
        "known_latents": window.known_latents,
        "model_frames": window.model_frames,
        "latent_frames": window.latent_frames,
        "scored": [window.scored.start + 1, window.scored.stop],
    }


def session_paths(session: Session) -> dict[str, Any]:
    """Which code paths computed a result."""
    return {
        "device": device_name(session.models.dit.device),
        "dtype": session.recipe.model.dtype,
        "deterministic": session.recipe.model.deterministic,
        "torch": torch.__version__,
        "attention": "torch scaled_dot_product_attention",
        "compile": "none",
        "kernels": "none",
        "posterior": "mode",
    }


def _lpips(recipe: "Recipe") -> tuple[LPIPS | None, str | None]:
    reason = LPIPS.available()
    if reason is None:
        return LPIPS(), None
    if recipe.scores.lpips == "required":
        raise UserError(f"scores.lpips is required, but {reason}; or set scores.lpips=allow_missing to leave the column empty")
    return None, reason


def _write_head(session: Session) -> None:
    """The run's recipe, environment and choices; the first task of a shared run directory writes the choices."""
    from .recipe import dump_recipe

    root = session.directory.root
    write_text(root / "recipe.yaml", dump_recipe(session.recipe))
    write_json(root / "environment.json", describe_environment(session.models.dit.device))
    choices = root / "choices.json"
    ours = session_paths(session)
    theirs = read_json(choices)
    if theirs is None:
        write_json(choices, ours)
    elif theirs != ours:
        print(f"warning: earlier results in {root} took other paths; bits may differ: {theirs} then, {ours} now")


def _line(arm: str, clip_id: str, result: dict[str, Any]) -> str:
    scores, cost = result["scores"], result["cost"]["seconds"]
    return (
        f"{arm}  {clip_id}  PSNR {scores['psnr']['mean']:.2f} dB  SSIM {scores['ssim']['mean']:.4f}  "
        f"adapt {cost['adapt']:.1f} s  sample {cost['sample']:.1f} s"
    )


def _plain(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
