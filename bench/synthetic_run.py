"""Run directories with made-up results in the form that runs write, to try reports of any size on. No score in them is real."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.files import sha256_json
from ..engine.rundir import RunDirectory

CATEGORIES = (
    "Archery",
    "Biking",
    "Diving",
    "Drumming",
    "Fencing",
    "GolfSwing",
    "HorseRiding",
    "Kayaking",
    "PlayingCello",
    "Skiing",
)
METHODS: dict[str, dict[str, Any]] = {
    "baseline": {"kind": "none"},
    "full": {"kind": "full", "steps": 20, "lr": 1e-5},
    "full_5": {"kind": "full", "steps": 5, "lr": 1e-5},
    "lora": {"kind": "lora", "steps": 20, "rank": 16, "lr": 1e-4},
    "delta": {"kind": "delta", "steps": 50, "lr": 1e-2},
}
GAINS = {
    "baseline": 0.0,
    "full": 0.25,
    "full_5": 0.12,
    "lora": 0.45,
    "delta": 0.08,
    "lora-other_clip": 0.1,
    "lora-random": -0.2,
}
SECONDS = {
    "baseline": 0.0,
    "full": 10.4,
    "full_5": 2.6,
    "lora": 7.8,
    "delta": 3.2,
    "lora-other_clip": 7.8,
    "lora-random": 7.8,
}
MEMORY = {
    "baseline": 19.9,
    "full": 55.6,
    "full_5": 55.6,
    "lora": 22.2,
    "delta": 19.9,
    "lora-other_clip": 22.2,
    "lora-random": 22.2,
}
PARAMETERS = {"none": 0, "full": 1_207_959_680, "lora": 6_193_152, "delta": 1152}
FIRST, LAST, SEED = 23, 45, 7


def write_synthetic_run(
    root: Path,
    clips: int,
    *,
    seed: int = 0,
    captions: dict[int, str] | None = None,
    failures: int = 2,
    lpips: bool = True,
) -> Path:
    """Write results of five methods and a method's placebos on so many clips in ten categories, clips of a group alike.

    captions: by clip number, in place of the made-up ones; failures: clips on which `full` fails.
    """
    directory, random = RunDirectory(root), np.random.default_rng((SEED, seed))
    ids = [f"v_{CATEGORIES[k % 10]}_g{k // 40:02d}_c{k // 10 % 4:02d}" for k in range(clips)]
    world = np.random.default_rng(SEED)  # the clips are the same under every sampling seed
    base, motion, detail = world.normal(22, 3, clips), world.uniform(0.02, 0.2, clips), world.uniform(0.2, 0.9, clips)
    liking = {name: world.normal(0, 0.3) for name in CATEGORIES}
    alike = world.normal(0, 0.2, (10, clips // 40 + 1))
    protocol = {
        "seed": seed,
        "window": {"total_frames": LAST, "known_frames": FIRST - 1, "fps": 24.0},
        "size": [480, 640],
    }
    arms = {name: (method, "") for name, method in METHODS.items()}
    arms |= {f"lora-{placebo}": (METHODS["lora"], placebo) for placebo in ("other_clip", "random")}
    for arm, (method, placebo) in arms.items():
        settings = {"protocol": protocol, "method": method} | ({"placebo": placebo} if placebo else {})
        for k, clip in enumerate(ids):
            if arm == "full" and k < failures:
                reason = "the loss or its gradient is not finite at step 7; a smaller lr may help"
                failure = {"clip": clip, "arm": arm, "reason": reason, "traceback": None}
                _write(directory.clip(arm, clip) / "failure.json", failure)
                continue
            gain = GAINS[arm]
            if arm != "baseline":
                gain += 0.7 * liking[CATEGORIES[k % 10]] + alike[k % 10, k // 40] - 2 * (motion[k] - 0.1)
                gain += random.normal(0, 0.15)
            noise = np.random.default_rng((SEED, seed, k)).normal(0, 0.3)
            caption = (captions or {}).get(k, f"a person doing {CATEGORIES[k % 10]}, seen from the side, clip {k}")
            meta = {"class": CATEGORIES[k % 10], "group": f"{k // 40:02d}"}
            result = _result(arm, clip, caption, meta, settings, base[k] + noise, gain, motion[k], random, lpips)
            _write(directory.clip(arm, clip) / "result.json", result)
    for k, clip in enumerate(ids):
        still, ceiling = (_scores(base[k] + more, 0, motion[k], random, lpips) for more in (-1.5, 9))
        kind = {"spatial_information": detail[k], "temporal_information": motion[k]}
        scores = {"copy_last_frame": still, "vae_ceiling": ceiling}
        _write(directory.reference(clip), {"clip": clip, "key": "made up", "kind": kind, "scores": scores})
    (root / "recipe.yaml").write_text(f"output_dir: {root.name}\nseed: {seed}\n")
    _write(root / "environment.json", {"device": "made up", "packages": {"torch": "0"}})
    return root


def _write(path: Path, value: dict[str, Any]) -> None:
    """Without flushing each file to disk, as runs do: thousands of them would take minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _result(
    arm: str,
    clip: str,
    caption: str,
    meta: dict[str, str],
    settings: dict[str, Any],
    base: float,
    gain: float,
    motion: float,
    random: np.random.Generator,
    lpips: bool,
) -> dict[str, Any]:
    method = settings["method"]
    steps = method.get("steps", 0)
    zero = 2.0 + 0.2 * random.standard_normal(steps)
    losses = zero * (0.25 + 0.25 * np.exp(-np.arange(steps) / 8)) if steps else zero
    seconds = {"read": 0.2, "encode": 0.32, "adapt": SECONDS[arm], "sample": 13.0, "decode": 1.4, "score": 5.0}
    return {
        "clip": clip,
        "arm": arm,
        "caption": caption,
        "start": 0.0,
        "meta": meta,
        "marks": ["made-up results: nothing here was measured"],
        "warnings": [],
        "keys": {
            "settings": sha256_json(settings),
            "protocol": sha256_json(settings["protocol"]),
            "clip": sha256_json(clip),
        },
        "settings": settings,
        "seeds": {"recipe": settings["protocol"]["seed"]},
        "window": {"known_frames": FIRST - 1, "scored": [FIRST, LAST]},
        "paths": {"device": "made up", "dtype": "bfloat16", "attention": "none", "kernels": "none"},
        "adaptation": {
            "steps": steps,
            "losses": losses.tolist(),
            "zero_losses": zero.tolist(),
            "gradient_norms": (np.abs(random.standard_normal(steps)) + 0.5).tolist(),
            "change": {"master": 0.1, "effective": 0.1, "changed": steps, "trained": PARAMETERS[method["kind"]]},
        },
        "scores": _scores(base, gain, motion, random, lpips),
        "cost": {"seconds": seconds, "peak_memory_bytes": int(MEMORY[arm] * 2**30)},
    }


def _scores(base: float, gain: float, motion: float, random: np.random.Generator, lpips: bool) -> dict[str, Any]:
    count = LAST - FIRST + 1
    psnr = base + gain - 4 * np.sqrt(np.arange(count) / count) * (1 + 3 * motion) + random.normal(0, 0.1, count)
    ssim = 1 / (1 + np.exp(-(psnr - 15) / 5))
    missing = {"mean": None, "frames": None, "reason": "not asked for"}
    truth = 20 - 60 * motion
    error = {"mean": abs(3 - gain + random.normal(0, 0.2)), "pred": truth + 3, "truth": truth}
    return {
        "psnr": _frames(psnr),
        "mse": _frames(10 ** (-psnr / 10)),
        "ssim": _frames(ssim),
        "lpips": _frames(0.9 - 0.8 * ssim) if lpips else missing,
        "frame_psnr_error": error,
        "seam_error": {"mean": error["mean"] / 2, "pred": 30.0, "truth": 28.0},
    }


def _frames(values: np.ndarray) -> dict[str, Any]:
    assert all(map(math.isfinite, values)), values
    return {"mean": float(values.mean()), "frames": values.tolist()}
