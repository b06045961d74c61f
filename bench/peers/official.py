"""The official code (hpcaitech/Open-Sora, branch opensora/v1.3): its model, scheduler and VAE, built on our weights.

Only what is timed is imported, four modules and what they import: packages on the way there are entered without running their
`__init__`, which would import datasets, text encoders and older models; and its loader of checkpoints, which is not used here and
needs colossalai, is left out. Of timm it takes two classes, which are imported from timm's own files in the same way: the whole of
timm needs torchvision and seconds. flash-attn and xformers may be replaced by PyTorch's attention (sdpa.py), packages that compute
nothing by what plumbing.py has. Raises Absent, in a sentence, where something cannot be imported.
"""

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.models.stdit3 import STDiT3Config as DiTSizes
from ...engine.models.vae import CHUNK_FRAMES
from ...engine.models.vae import VAEConfig as VAESizes
from ...engine.torchvision_ops import declare_missing_operators
from ..suite import Absent
from . import empty_module, need, plumbing, sdpa, version_of

INSTALL = "pip install --no-deps git+https://github.com/hpcaitech/Open-Sora@opensora/v1.3 timm einops"
ENTERED = (
    "opensora", "opensora.acceleration", "opensora.models", "opensora.models.layers", "opensora.models.stdit",
    "opensora.models.vae", "opensora.models.vae_v1_3", "opensora.schedulers", "opensora.schedulers.iddpm", "opensora.utils",
    "timm", "timm.layers", "timm.models",
)  # fmt: skip
"""Packages whose `__init__` is not run."""
CHECKPOINTS = "opensora.utils.ckpt_utils"
FROM_TIMM = {
    "timm.models.vision_transformer": ("timm.layers.mlp", "Mlp"),
    "timm.models.layers": ("timm.layers.drop", "DropPath"),
}
"""Where the official code looks for a class of timm's, and the file that has it."""


@dataclass(frozen=True)
class Official:
    """The classes that are timed. label: package and version, as every row names it; replaced: what runs in place of its kernels."""

    label: str
    replaced: dict[str, str]
    STDiT3: Any
    STDiT3Config: Any
    RFLOW: Any
    VAE: Any
    VAEConfig: Any
    layernorm_kernel: bool

    def dit(self, config: DiTSizes, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> nn.Module:
        """STDiT3 of these sizes with v1.3's inference settings; every name and shape of `state` must be the model's own."""
        with device:
            model = self.STDiT3(
                self.STDiT3Config(
                    input_sq_size=config.input_sq_size, in_channels=config.in_channels, patch_size=(1, 2, 2),
                    hidden_size=config.hidden_size, depth=config.depth, num_heads=config.num_heads,
                    mlp_ratio=config.mlp_ratio, class_dropout_prob=0.0, pred_sigma=True,
                    caption_channels=config.caption_channels, model_max_length=config.model_max_length, qk_norm=True,
                    enable_flash_attn=True, enable_layernorm_kernel=self.layernorm_kernel, kernel_size=(8, 8, -1),
                    use_spatial_rope=True,
                )
            )  # fmt: skip
        model = model.to(device, dtype).eval().requires_grad_(False)
        model.load_state_dict(state, strict=True)
        return model

    def vae(
        self, config: VAESizes, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, tile: int | None
    ) -> nn.Module:
        """The VAE with v1.3's inference settings. tile: its convolutions are split into tiles of this size; None: they are not."""
        shared = {
            "z_channels": config.z_channels, "in_channels": config.in_channels, "out_ch": config.out_ch, "ch": config.ch,
            "ch_mult": list(config.ch_mult), "num_res_blocks": config.num_res_blocks, "micro_batch_size_2d": 4,
        }  # fmt: skip
        settings = self.VAEConfig(
            encoder={"type": "VideoEncoder", "double_z": True, "down_sampling_layer": [1, 2], **shared},
            decoder={"type": "VideoDecoder", "temporal_up_layers": [2, 3], **shared},
        )
        with device, contextlib.redirect_stdout(io.StringIO()):  # it prints its configuration
            model = self.VAE(
                settings, micro_batch_size=1, micro_batch_size_2d=4, micro_frame_size=CHUNK_FRAMES,
                use_tiled_conv3d=tile is not None, tile_size=tile or 16, temporal_overlap=True, normalization="video",
            )  # fmt: skip
        model = model.to(device, dtype).eval().requires_grad_(False)
        model.load_state_dict(state, strict=True)
        return model

    def scheduler(self, steps: int, **settings: Any) -> Any:
        """The rectified-flow scheduler with v1.3's video-to-video settings."""
        return self.RFLOW(
            num_sampling_steps=steps,
            use_timestep_transform=True,
            scale_image_weight=True,
            initial_image_scale=1.0,
            **settings,
        )


def load(device: torch.device) -> Official:
    """Import what is timed; raises Absent."""
    need("opensora", INSTALL)
    label = f"opensora {version_of('opensora')}"
    replaced = sdpa.put_in_place(device)
    plumbing.put_in_place()
    declare_missing_operators()  # transformers may import torchvision
    _enter()
    try:
        for module, (file, name) in FROM_TIMM.items():
            vars(empty_module(module))[name] = getattr(importlib.import_module(file), name)
        stdit = importlib.import_module("opensora.models.stdit.stdit3")
        scheduler = importlib.import_module("opensora.schedulers.rf")
        for part in ("encoder", "decoder"):  # the VAE names them to a registry
            importlib.import_module(f"opensora.models.vae_v1_3.{part}")
        vae = importlib.import_module("opensora.models.vae_v1_3.vae")
        return Official(
            label, replaced, stdit.STDiT3, stdit.STDiT3Config, scheduler.RFLOW,
            vae.OpenSoraVAE_V1_3_Pipline, vae.OpenSoraVAE_V1_3_PiplineConfig,
            device.type == "cuda" and importlib.util.find_spec("apex") is not None,
        )  # fmt: skip
    except ImportError as error:
        raise Absent(
            f"{label} cannot be imported: {error}; install that, or see whether it is branch opensora/v1.3"
        ) from error
    except AttributeError as error:
        raise Absent(f"{label} is not branch opensora/v1.3: {error}") from error


def _enter() -> None:
    """Make the packages known without running their `__init__`."""
    roots: list[str] = []
    for name in ENTERED:
        package, *folders = name.split(".")
        if not folders:
            spec = importlib.util.find_spec(package)
            roots = list(spec.submodule_search_locations or ()) if spec else []
        empty_module(name).__path__ = [str(Path(root, *folders)) for root in roots]
    empty_module(CHECKPOINTS).load_checkpoint = _no_checkpoints


def _no_checkpoints(*_: Any, **__: Any) -> None:
    raise NotImplementedError("the weights come from our own model")


class FixedText:
    """Stands where the official code has T5: every prompt has one embedding, the null caption is the model's own."""

    def __init__(self, model: Any, embedding_1LC: Tensor) -> None:
        null = model.y_embedder.y_embedding
        length, width = null.shape
        self.count = embedding_1LC.shape[1]
        self.y = torch.zeros(1, 1, length, width, device=null.device)
        self.y[0, 0, : self.count] = embedding_1LC[0]
        self.mask = (torch.arange(length, device=null.device) < self.count).long()[None]
        self._null = null[None, None]

    def tokenize_fn(self, prompts: list[str]) -> dict[str, int]:
        return {"count": len(prompts)}

    def encode(self, count: int) -> dict[str, Tensor]:
        """The embedding [count, 1, L, C], and which tokens are valid."""
        return {"y": self.y.expand(count, -1, -1, -1), "mask": self.mask.expand(count, -1)}

    def null(self, count: int) -> Tensor:
        return self._null.expand(count, -1, -1, -1)
