"""How far the latents of the last known frames lie from those that have seen what follows.

Run: python -m vidtta.bench.window RECIPE [key.sub=value ...]

The known frames are encoded alone, so the latents of an unfinished chunk (frames 17-21 of 22 known ones) miss the frames that
follow in the chunk, whose statistics the VAE's norms would mix in. For each clip of a recipe this prints, for each known latent
frame, the L2 distance to the same latent frame of the whole clip's encoding, relative to the latter's norm.
"""

import argparse
from pathlib import Path

import torch

from ..engine.clip import encode_known
from ..engine.data.clips import list_clips
from ..engine.data.read import read_clip
from ..engine.data.video import to_model
from ..engine.errors import UserError
from ..engine.models.load import choose_device, load_vae
from ..engine.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        vae = load_vae(recipe.model.vae, choose_device(recipe.model.device), getattr(torch, recipe.model.dtype))
        clips = list_clips(recipe.data, Path.cwd())
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    window, distances = recipe.window, []
    for clip in clips:
        try:
            frames = read_clip(
                clip,
                frames=window.total_frames,
                fps=window.fps,
                height=recipe.data.height,
                width=recipe.data.width,
            )
        except UserError as error:
            print(f"{clip.id}: left out: {error}")
            continue
        pixels = to_model(frames).to(next(vae.parameters()).device)
        with torch.no_grad():
            alone, whole = encode_known(vae, pixels, window).float(), vae.encode(pixels[None]).float()
        whole = whole[:, :, : window.known_latents]
        missing, size_of = ((x.square().sum(dim=(0, 1, 3, 4))).sqrt() for x in (alone - whole, whole))
        distance = missing / size_of
        distances.append(distance)
        print(f"{clip.id}: " + " ".join(f"{d:.4f}" for d in distance.tolist()))
    if distances:
        mean = torch.stack(distances).mean(0)
        print(f"mean of {len(distances)} clips: " + " ".join(f"{d:.4f}" for d in mean.tolist()))


if __name__ == "__main__":
    main()
