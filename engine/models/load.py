"""The models of a recipe: where their weights come from, checked and put on the device.

`embedded` names the small models that ship with the package, trained on a world made by code (see the README beside them).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..cluster.place import this_place
from ..determinism import make_deterministic
from ..errors import UserError
from ..text.encoder import embedded_table, is_embedded, trained_width
from .checkpoint import load_strict, open_state, read_config, resolve_source, state_hash
from .settings import ModelSettings
from .stdit3 import STDiT3, STDiT3Config
from .vae import VAE, VAEConfig

EMBEDDED = Path(__file__).parent / "embedded"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Models:
    """The loaded networks, frozen and in evaluation mode. hashes: SHA-256 of each one's weights; marks: what must be said of them."""

    dit: STDiT3
    vae: VAE
    hashes: dict[str, str]
    marks: tuple[str, ...]


def choose_device(name: str) -> torch.device:
    """The device that a recipe names; raises UserError for one that is not there."""
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", this_place().local_rank % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(
            f"model.device was {name!r}, which is not here; use auto or one of {['cpu', *found]}"
        ) from error
    return device


def load_dit(source: str, device: torch.device, dtype: torch.dtype) -> STDiT3:
    """The transformer of a directory, hub id or `embedded`."""
    return _load(source, "dit", lambda config: STDiT3(STDiT3Config.from_dict(config)), device, dtype)


def load_vae(source: str, device: torch.device, dtype: torch.dtype) -> VAE:
    """The autoencoder of a directory, hub id or `embedded`."""
    return _load(source, "vae", lambda config: VAE(VAEConfig.from_dict(config)), device, dtype)


def _load(source: str, kind: str, build: Callable[[dict], Model], device: torch.device, dtype: torch.dtype) -> Model:
    path = EMBEDDED / kind if source == "embedded" else resolve_source(source, "vidtta fetch opensora")
    folder = path if path.is_dir() else path.parent  # beside a single file of weights lies its config.json
    config = read_config(folder)
    try:
        with torch.device("meta"):  # no time and memory for numbers that are loaded over
            model = build(config).to(dtype)  # before the weights, which are checked in the dtype that they get
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    load_strict(model, open_state(path), str(path))
    return model.to(device).eval().requires_grad_(False)


def check_conditioning(dit: STDiT3, source: str) -> None:
    """Raise UserError if the embedding of known frames is all zero: such weights never learned to continue a clip."""
    if not dit.x_embedder_cond.proj.weight.any():
        raise UserError(
            f"model.dit {source!r} cannot continue a clip: x_embedder_cond.proj.weight is all zero (never trained on known "
            "frames); use the image-and-video-conditioned weights, hpcai-tech/OpenSora-STDiT-v4-i2v"
        )


def load_models(settings: ModelSettings) -> Models:
    """Load transformer and autoencoder; raises UserError for anything missing, misshapen, or untrained without leave."""
    if settings.deterministic:
        make_deterministic()
    device, dtype = choose_device(settings.device), getattr(torch, settings.dtype)
    if device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current device, whatever its inputs lie on
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # else cuDNN rounds what float32 convolutions multiply to 10 bits
    if device.type == "cpu" and dtype == torch.bfloat16:
        # Some virtual machines announce AMX and kill a program that uses it; oneDNN then takes AVX-512 or less.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    dit, vae = load_dit(settings.dit, device, dtype), load_vae(settings.vae, device, dtype)
    check_conditioning(dit, settings.dit)
    marks = ()
    if is_embedded(settings.text) and embedded_table(settings.text, dit.config.caption_channels) is None:
        if not settings.allow_untrained:
            raise UserError(
                f"model.text is embedded, whose table of words was trained for {trained_width()} channels and this transformer takes "
                f"{dit.config.caption_channels}; set model.allow_untrained=true to run on an untrained table, or name a T5 encoder"
            )
        marks = ("untrained text: captions are looked up in a table filled by a fixed rule",)
    return Models(dit, vae, {"dit": state_hash(dit), "vae": state_hash(vae)}, marks)
