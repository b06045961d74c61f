"""Check files of the parity format: what the official code computed against what ours computes.

Run: python -m tests.parity DIR_OR_FILE...   (prints a line a file; exits 1 if one is out of tolerance or cannot be checked)

A file carries its inputs and outputs, and in its metadata `kind` (dit, sampler, loss, vae) and the configuration. Weights are
not stored: both sides fill the model by `fill_by_rule`. Everything is read from the metadata, nothing from the file's name.
A .json file is a list of timestep transforms (height, width, num_frames, t -> out). An `out` of a `dit` file may hold the
first channels only.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from vidtta.engine.denoiser import Denoiser, TextDenoiser
from vidtta.engine.flow import add_noise, sampling_timesteps, timestep_transform, training_loss
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import Caption, Condition, STDiT3, STDiT3Config
from vidtta.engine.models.vae import VAE, VAEConfig
from vidtta.engine.sampler import ContinuationGuidance, SamplerSettings, TextGuidance, sample

TOLERANCE = {"timesteps": 1e-5, "dit": 1e-5, "loss": 1e-5, "sampler": 1e-4, "vae": 1e-5}
TOLERANCE_BF16 = 2e-2

Tensors = dict[str, Tensor]
Meta = dict[str, str]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of what is expected; raises ValueError if the shapes differ."""
    if actual.shape != expected.shape:
        raise ValueError(f"ours is {list(actual.shape)}, the file's {list(expected.shape)}")
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def read(path: Path) -> tuple[Tensors, Meta]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def build_dit(meta: Meta) -> STDiT3:
    model = STDiT3(STDiT3Config.from_dict(json.loads(meta["config"])))
    fill_by_rule(model)
    return model.to(getattr(torch, meta.get("dtype", "torch.float32").removeprefix("torch."))).eval()


def valid_tokens(text: Tensor, mask: Tensor) -> Caption:
    """A caption from the official [B, 1, M, C] embedding and its [B or fewer, M] mask, cut after the last valid token."""
    mask = mask.bool().repeat(text.shape[0] // mask.shape[0], 1)
    length = int(mask.any(0).nonzero().max()) + 1
    return Caption(text[:, 0, :length], None if bool(mask[:, :length].all()) else mask[:, :length])


def first_tokens(text: Tensor, count: int) -> Caption:
    return Caption(text[:, 0, :count])


def check_dit(tensors: Tensors, meta: Meta) -> dict[str, float]:
    model = build_dit(meta)
    x, known = tensors["x"], tuple(json.loads(meta["mask_index"]))
    B = x.shape[0]
    caption = valid_tokens(tensors["y"], tensors["mask"])
    text = model.text_states(caption)
    known_text = condition = None
    if "cond" in tensors:
        condition = Condition(tensors["cond"], tensors["cond_mask"])
        length = caption.embedding.shape[1]
        known_text = model.text_states(Caption(tensors["y_null"][:, 0, :length].expand(B, -1, -1), caption.mask))
    pixels = (int(tensors["height"].flatten()[0]), int(tensors["width"].flatten()[0]))
    geometry = model.geometry(x.shape[2], (x.shape[3], x.shape[4]), pixels, known)
    state = model.embed(x, tensors["timestep"], tensors["fps"].flatten()[:1].expand(B), geometry, condition)
    errors = {}
    for index in range(len(model.layers)):
        state = model.run_layers(state, text, known_text, geometry, index, index + 1)
        name = f"after_{'temporal' if index % 2 else 'spatial'}_{index // 2}"
        if index == len(model.layers) - 1:
            name = "before_final"
        if name in tensors:
            tokens = state.tokens.unflatten(1, (geometry.frames, -1))
            tokens = tokens if geometry.inverse is None else tokens[:, geometry.inverse]
            errors[name] = relative_error(tokens.flatten(1, 2), tensors[name])
    errors["out"] = relative_error(model.head(state, geometry)[:, : tensors["out"].shape[1]], tensors["out"])
    return errors


def check_loss(tensors: Tensors, meta: Meta) -> dict[str, float]:
    model = build_dit(meta)
    x, noise, known = tensors["x"], tensors["noise"], tuple(json.loads(meta["mask_index"]))
    named = dict(model.named_parameters())
    grad_norms = json.loads(meta["grad_norms"])
    named["rope.freqs"].requires_grad_("rope.freqs" in grad_norms)
    t = torch.full((x.shape[0],), float(meta["t"]))
    caption = first_tokens(tensors["y"], int(meta["text_tokens"]))
    condition, known_text = None, None
    if known:
        mask = torch.zeros_like(x)
        mask[:, :, list(known)] = 1
        condition, known_text = Condition(x * mask, mask), model.text_states(model.null_caption(caption))
    geometry = model.geometry(x.shape[2], (x.shape[3], x.shape[4]), (int(meta["height"]), int(meta["width"])), known)
    fps = torch.full_like(t, float(meta["fps"]))
    velocity = model(add_noise(x, noise, t), t, fps, model.text_states(caption), known_text, geometry, condition)
    loss = training_loss(velocity, x, noise)
    loss.backward()
    errors = {"loss": relative_error(loss.detach().reshape(1), tensors["loss"])}
    for name, parameter in (
        ("g_qkv", "spatial_blocks.0.attn.qkv.weight"),
        ("g_final", "final_layer.linear.weight"),
        ("g_tproj", "temporal_blocks.1.attn.proj.weight"),
    ):
        if name in tensors:
            grad = named[parameter].grad
            assert grad is not None
            errors[name] = relative_error(grad, tensors[name])
    largest = max(grad_norms.values())
    differences = [
        abs((0.0 if (g := named[name].grad) is None else g.norm().item()) - norm) / max(norm, 1e-3 * largest)
        for name, norm in grad_norms.items()
    ]
    errors["grad_norms"] = torch.tensor(differences).max().item()  # unlike Python's max, keeps a NaN
    return errors


def check_sampler(tensors: Tensors, meta: Meta) -> dict[str, float]:
    """Ours samples one clip at a time; the rows of a batch are sampled one after the other."""
    model = build_dit(meta)
    with torch.no_grad():
        rows = [sample_row(model, tensors, meta, slice(row, row + 1)) for row in range(tensors["z"].shape[0])]
    return {"out": relative_error(torch.cat(rows), tensors["out"])}


def sample_row(model: STDiT3, tensors: Tensors, meta: Meta, row: slice) -> Tensor:
    settings, k, steps = json.loads(meta["settings"]), int(meta["k"]), int(meta["n_steps"])
    z, size, fps = tensors["z"][row], (int(meta["height"]), int(meta["width"])), float(meta["fps"])
    timesteps = sampling_timesteps(steps, *size, int(meta["num_frames"]))
    prompt, null = (
        Caption(text.expand(tensors["z"].shape[0], -1, -1, -1)[row, 0, : int(meta["text_tokens"])])
        for text in (tensors["y"], tensors["y_null"])
    )
    force = settings.get("force_num", 10)
    geometry = model.geometry(z.shape[2], (z.shape[3], z.shape[4]), size, tuple(range(k)))
    if k == 0:
        text_guidance = TextGuidance(
            TextDenoiser(model, geometry, fps, prompt, null),
            scale=float(meta["cfg_scale"]),
            oscillate=settings.get("use_oscillation_guidance", False),
            force_steps=force,
            flaw_fix=settings.get("use_flaw_fix", False),
        )
        return sample(text_guidance, z, timesteps)
    if (initial := settings.get("initial_image_scale", 1.0)) != 1.0:
        raise ValueError(f"only an image weight that starts at 1 is built, initial_image_scale is {initial}")
    mask = torch.zeros_like(z)
    mask[:, :, :k] = 1
    known = tensors["ref"][row] * mask
    continuation = SamplerSettings(
        steps=steps,
        text_guidance=float(meta["cfg_scale"]),
        image_guidance=float(meta["image_cfg_scale"]),
        decreasing_image_weight=settings.get("scale_image_weight", False),
        oscillate_text=settings.get("use_oscillation_guidance_for_text", False),
        oscillate_image=settings.get("use_oscillation_guidance_for_image", False),
        force_steps=force,
        sdedit=settings.get("use_sdedit", False),
    )
    return sample(
        ContinuationGuidance(
            Denoiser(model, geometry, fps, prompt, Condition(known, mask), null=null), continuation, z.shape[2]
        ),
        z,
        timesteps,
        known=known,
        known_mask=mask,
        known_noise=(lambda step: tensors["noise"][step][row]) if continuation.sdedit else None,
    )


def check_vae(tensors: Tensors, meta: Meta) -> dict[str, float]:
    built = {"micro_frame_size": "17", "temporal_overlap": "True", "normalization": "video"}
    if (asked := {name: meta.get(name) for name in built}) != built:
        raise ValueError(f"only {built} is built, the file has {asked}")
    vae = VAE(VAEConfig.from_dict(json.loads(meta["config"]))).eval()
    fill_by_rule(vae)
    with torch.no_grad():
        moments = torch.cat(vae.moments(tensors["x"]), dim=1)
        z = vae.encode(tensors["x"])
        recon = vae.decode(tensors["z"])
    return {
        "moments": relative_error(moments, tensors["moments"]),
        "z": relative_error(z, tensors["z"]),
        "recon": relative_error(recon, tensors["recon"]),
    }


def check_timesteps(rows: list[dict[str, float]]) -> dict[str, float]:
    ours = [
        timestep_transform(torch.tensor([row["t"]]), row["height"], row["width"], int(row["num_frames"])).item()
        for row in rows
    ]
    return {"timesteps": relative_error(torch.tensor(ours), torch.tensor([row["out"] for row in rows]))}


CHECKS: dict[str, Callable[[Tensors, Meta], dict[str, float]]] = {
    "dit": check_dit,
    "loss": check_loss,
    "sampler": check_sampler,
    "vae": check_vae,
}


def check_file(path: Path) -> tuple[dict[str, float], float]:
    """Relative L2 errors by output name, and the tolerance they must meet. Raises if the file cannot be read or compared."""
    if path.suffix == ".json":
        return check_timesteps(json.loads(path.read_text())), TOLERANCE["timesteps"]
    tensors, meta = read(path)
    if (kind := meta.get("kind")) not in CHECKS:
        raise ValueError(f"kind must be one of {sorted(CHECKS)}, was {kind!r}")
    bf16 = meta.get("dtype", "torch.float32") == "torch.bfloat16"
    return CHECKS[kind](tensors, meta), TOLERANCE_BF16 if bf16 else TOLERANCE[kind]


def report(path: Path) -> bool:
    """Print the line of one file; whether all its errors are within tolerance."""
    try:
        errors, tolerance = check_file(path)
    except Exception as error:  # whatever a file may hold, the others are still to be checked
        print(f"FAIL {path.name}  {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        return False
    good = all(error <= tolerance for error in errors.values())  # NaN fails
    listed = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"{'ok  ' if good else 'FAIL'} {path.name}  (tolerance {tolerance:.0e})  {listed}", flush=True)
    return good


def main(arguments: list[str]) -> int:
    paths: list[Path] = []
    for argument in map(Path, arguments):
        in_folder = sorted(p for p in argument.glob("*") if p.suffix in (".safetensors", ".json"))
        paths += in_folder if argument.is_dir() else [argument]
    if not paths:
        print("no .safetensors or .json file to check; usage: python -m tests.parity DIR_OR_FILE...")
        return 1
    failed = sum(not report(path) for path in paths)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
