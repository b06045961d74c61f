"""A stand-in, not the official code: v1.3's names and signatures in front of vidtta's own network."""

import os
from typing import Any

import torch
import xformers.ops  # type: ignore[import-not-found] # noqa: F401 (the official module imports this and the next three, too)
from beartype import beartype  # type: ignore[import-not-found]
from beartype.typing import Optional  # type: ignore[import-not-found]
from timm.models.layers import DropPath  # type: ignore[import-not-found] # noqa: F401
from timm.models.vision_transformer import Mlp  # type: ignore[import-not-found] # noqa: F401
from torch import Tensor
from vidtta.engine.models import stdit3 as ours

from opensora.utils.ckpt_utils import load_checkpoint  # type: ignore[import-not-found] # noqa: F401


@beartype
def valid_tokens(mask: Optional[Tensor]) -> int:
    return 0 if mask is None else int(mask.sum())


class STDiT3Config:
    """Takes the official fields, and no other."""

    def __init__(
        self,
        input_size=(None, None, None), input_sq_size=512, in_channels=16, patch_size=(1, 2, 2), hidden_size=1152, depth=28,
        num_heads=16, mlp_ratio=4.0, class_dropout_prob=0.1, pred_sigma=True, drop_path=0.0, caption_channels=4096,
        model_max_length=300, qk_norm=True, enable_flash_attn=False, enable_layernorm_kernel=False,
        enable_sequence_parallelism=False, only_train_temporal=False, freeze_y_embedder=False, skip_temporal=False,
        skip_y_embedder=False, kernel_size=None, use_spatial_rope=False,
    ) -> None:  # fmt: skip
        assert use_spatial_rope and tuple(kernel_size or ()) == (8, 8, -1) and qk_norm, "not v1.3's network"
        self.sizes = ours.STDiT3Config(
            input_sq_size=input_sq_size, in_channels=in_channels, hidden_size=hidden_size, depth=depth,
            num_heads=num_heads, mlp_ratio=mlp_ratio, caption_channels=caption_channels, model_max_length=model_max_length,
        )  # fmt: skip


class STDiT3(ours.STDiT3):
    def __init__(self, config: STDiT3Config) -> None:
        super().__init__(config.sizes)

    def forward(
        self,
        x, timestep, y, mask: Any = None, x_mask=None, fps: Any = None, height: Any = None, width: Any = None, cond: Any = None,
        cond_mask: Any = None, mask_index=None, y_null: Any = None, text_uncond_prob=None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        assert x_mask is None and mask_index and cond.dtype == self.dtype
        B, valid = x.shape[0], valid_tokens(mask)
        text = self.text_states(ours.Caption(y[:, 0, :valid]))
        null = self.text_states(ours.Caption(y_null[:, 0, :valid]))
        size = (int(height[0]), int(width[0]))
        geometry = self.geometry(x.shape[2], (x.shape[3], x.shape[4]), size, tuple(mask_index))
        condition = ours.Condition(cond, cond_mask)
        if os.environ.get("STANDIN_IS_WRONG"):  # as if a version of it computed the timestep otherwise
            timestep = 1.02 * timestep
        velocity = super().forward(x, timestep, fps.float().expand(B), text, null, geometry, condition)
        return torch.cat([velocity, torch.zeros_like(velocity)], dim=1)
