"""What comes before the first clip: the clips listed, the models loaded, the paths chosen that compute them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .choices import put_in_force
from .choose import choose_paths
from .cluster.place import Place
from .continual import share_stretches
from .errors import UserError
from .metrics.lpips import LPIPS
from .metrics.optical_flow import require_flow
from .models.float8 import put_float8_in_force
from .models.load import load_models
from .rundir import RunDirectory
from .search import raise_unless_disjoint
from .session import Session
from .split import clips_of

if TYPE_CHECKING:
    from .recipe import Recipe


def prepare(
    recipe: "Recipe", batch_start: int | None, batch_end: int | None, place: Place, say: Callable[[str], None] = print
) -> Session:
    """List the clips, load the models, choose the paths that compute; whatever is missing for the whole run is said here, before
    the first clip. say: told what takes long."""
    from .recipe import warnings

    folder, output = Path(recipe.data.clips).resolve(), Path(recipe.output_dir)
    if folder.is_dir() and output.resolve().is_relative_to(folder):
        raise UserError(
            f"output_dir {output} lies inside data.clips, {folder}, so its videos would be taken for clips; choose another"
        )
    clips = clips_of(recipe)
    if not clips[batch_start:batch_end]:
        raise UserError(f"--batch-start {batch_start} lies behind the last of {len(clips)} clips; take a smaller one")
    chosen = share_stretches(recipe, clips, batch_start, batch_end, place)
    reason = LPIPS.available()
    if reason and recipe.scores.lpips == "required":
        raise UserError(
            f"scores.lpips is required, but {reason.rstrip('.')}; or set scores.lpips=allow_missing to leave it empty"
        )
    if recipe.scores.flow != "none":
        require_flow(recipe.scores.flow)
    models = load_models(recipe.model)
    cached, layers = recipe.sampler.cache_every > 1, len(models.dit.layers)
    if cached and recipe.sampler.cache_first >= layers:
        raise UserError(
            f"sampler.cache_first should be below the network's {layers} layers, was {recipe.sampler.cache_first}: none would be "
            "cached; lower it, or set sampler.cache_every=1"
        )
    lpips = LPIPS() if reason is None else None
    session = Session(
        recipe, RunDirectory(output), models, clips, chosen, lpips, reason, models.marks, tuple(warnings(recipe))
    )
    if recipe.placebos and len(clips) < 2:
        raise UserError(
            f"placebos needs a second clip to adapt on, and data.clips has {len(clips)}; leave placebos out"
        )
    raise_unless_disjoint(session)
    _ = session.gates  # a predictor that does not fit its arm is said here
    return _with_paths(session, say)


def _with_paths(session: Session, say: Callable[[str], None]) -> Session:
    """The session with its paths chosen and in force."""
    recipe, experiment = session.recipe, session.experiment
    choices = choose_paths(
        recipe.model,
        experiment,
        session.directory.root,
        methods=[
            *(arm.method for arm in session.arms.values()),
            *recipe.arms.values(),
        ],  # a search adds arms of its own
        diagnostics=recipe.diagnostics.wanted,
        describe=lambda choices: replace(session, choices=choices).describe_paths(),
        say=say,
    )
    rows, cols = (-(-side // 16) for side in experiment.pixel_size)
    tokens = recipe.window.known_latents * rows * cols
    strict = recipe.model.kernels == "triton"
    put_in_force(choices, experiment.dit, experiment.vae, features_tokens=tokens, strict=strict)
    put_float8_in_force(experiment.dit, recipe.model, tokens)
    return replace(session, choices=choices)
