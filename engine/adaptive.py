"""`vidtta adaptive`: whether a clip's benefit from a method can be foreseen, and what adapting only where it is foreseen would give.

Features come from the known frames, the class of the manifest and the loss before the first step; never from a frame to predict. The
benefit is the paired difference in PSNR of an arm to the baseline. A ridge regression is judged by nested cross-validation: the outer
folds leave out whole groups (UCF-101 groups come from one video), the inner ones choose the penalty, and a line through the inner
predictions left out calibrates them. A clip that is not adapted has the baseline's video to the bit, so what selective adaptation
gives follows exactly from results that are there: regret is the mean of the oracle's benefit minus the policy's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .compare import compare_arms, read_results
from .errors import UserError
from .predictor import (
    NUMBERS,
    Fitted,
    Predictor,
    design,
    fitted_settings,
    frame_features,
    group_name,
    save_predictor,
)

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


def policies(
    benefit: Sequence[float] | np.ndarray, predicted: Sequence[float] | np.ndarray, threshold: float = 0.0
) -> dict[str, dict[str, float]]:
    """Mean benefit, regret against the oracle and share of clips adapted, of each policy. Both inputs: [n], in the score's unit."""
    gains, foreseen = np.asarray(benefit, dtype=float), np.asarray(predicted, dtype=float)
    chosen = {
        "never": np.zeros(len(gains), bool),
        "always": np.ones(len(gains), bool),
        "selective": foreseen > threshold,
        "oracle": gains > 0,
    }
    best = np.maximum(gains, 0).mean()
    return {
        name: {
            "benefit": float((gains * adapt).mean()),
            "regret": float(best - (gains * adapt).mean()),
            "adapted": float(adapt.mean()),
        }
        for name, adapt in chosen.items()
    }


def fit(rows: Sequence[Mapping[str, Any]], benefit: np.ndarray, groups: np.ndarray) -> Predictor:
    """Fit on these clips; their groups split the inner folds that choose the penalty and calibrate."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold, cross_val_predict

    numbers = np.array([[row[name] for name in NUMBERS] for row in rows], dtype=float)
    means, scales = numbers.mean(0), np.maximum(numbers.std(0), 1e-9)
    classes = sorted({row["class"] for row in rows} - {""})
    x = design(rows, means.tolist(), scales.tolist(), classes)
    folds = GroupKFold(min(5, len(set(groups))))
    left_out = {
        a: np.asarray(cross_val_predict(Ridge(alpha=a), x, benefit, groups=groups, cv=folds)) for a in PENALTIES
    }
    penalty = min(PENALTIES, key=lambda a: float(((left_out[a] - benefit) ** 2).mean()))
    raw = left_out[penalty]
    spread = float(raw.var())
    # A line that would turn predictions round, or stretch them, has found nothing: then the mean is all that is known.
    slope = float(np.clip(((raw - raw.mean()) * (benefit - benefit.mean())).mean() / spread, 0, 1)) if spread else 0.0
    model = Ridge(alpha=penalty).fit(x, benefit)
    return Predictor(
        means.tolist(),
        scales.tolist(),
        classes,
        model.coef_.tolist(),
        float(model.intercept_),
        slope,
        float(benefit.mean() - slope * raw.mean()),
    )


def left_out_predictions(rows: Sequence[Mapping[str, Any]], benefit: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Predictions for each clip by a predictor that saw no clip of its group, [n]. Raises UserError for fewer than 4 groups."""
    from sklearn.model_selection import GroupKFold

    if len(set(groups)) < 4:
        raise UserError(
            f"{len(set(groups))} independent groups of clips; a predictor takes at least 4, so run more clips"
        )
    predicted = np.zeros(len(rows))
    for train, test in GroupKFold(min(5, len(set(groups)))).split(benefit, groups=groups):
        fitted = fit([rows[i] for i in train], benefit[train], groups[train])
        predicted[test] = fitted.predict([rows[i] for i in test])
    return predicted


def adaptive(root: Path, arm: str, out: Path | None) -> int:
    """Fit on a run's results, print the policies on clips left out, write the predictor; returns the exit status."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError("vidtta adaptive needs scikit-learn; pip install 'vidtta[adaptive]'") from error
    from .data.clips import clip_hash, list_clips
    from .data.read import read_clip
    from .recipe import load_recipe

    compared = {row.arm: row for row in compare_arms({root: read_results(root)})}
    if arm not in compared:
        raise UserError(f"--arm {arm}: {root} has no such arm to compare; it has {', '.join(compared)}")
    recipe, pairs = load_recipe(str(root / "recipe.yaml")), compared[arm].pairs
    clips = {clip.id: clip for clip in list_clips(replace(recipe.data, limit=None), Path.cwd())}
    clips |= {clip.id: clip for clip in list_clips(recipe.data, Path.cwd())}
    window, data, rows, groups = recipe.window, recipe.data, [], []
    benefit = np.array([np.mean(values) for values in (pairs.differences("psnr") or {}).values()])
    treated = {clip: result for (clip, _), result in reversed(pairs.treated.items())}
    for clip_id in pairs.clips:
        clip, result = clips.get(clip_id), treated[clip_id]
        if clip is None or clip_hash(clip) != result["keys"]["clip"]:
            raise UserError(
                f"{root}: the video of clip {clip_id} is not the one its result was made from; prepare it again"
            )
        if "gate" in result:
            raise UserError(f"--arm {arm}: it adapts only where a gate lets it; fit on a run that adapts to every clip")
        if not result["adaptation"]["losses"]:
            raise UserError(f"--arm {arm}: it takes no step, so there is no benefit to foresee")
        frames = read_clip(clip, frames=window.known_frames, fps=window.fps, height=data.height, width=data.width)
        meta = result.get("meta", {})
        found: dict[str, Any] = dict(frame_features(frames.numpy()))
        rows.append(found | {"first_loss": result["adaptation"]["losses"][0], "class": meta.get("class", "")})
        groups.append(group_name(meta, clip_id))
    names = np.array(groups)
    predicted = left_out_predictions(rows, benefit, names)
    print(
        f"{arm}: {len(benefit)} clips in {len(set(groups))} groups, each foreseen by a predictor that saw none of its group"
    )
    for name, row in policies(benefit, predicted).items():
        print(
            f"  {name:9}  benefit {row['benefit']:+.3f} dB  regret {row['regret']:.3f} dB  adapts {row['adapted']:.0%}"
        )
    if out:
        videos = [treated[clip_id]["keys"]["clip"] for clip_id in pairs.clips]
        settings = fitted_settings(treated[pairs.clips[0]]["settings"])
        save_predictor(out, Fitted(fit(rows, benefit, names), arm, settings, videos, sorted(set(groups))))
        print(f"predictor: {out}; vidtta run RECIPE gate.{arm}.predictor={out} adapts only where it foresees a gain")
    return 0
