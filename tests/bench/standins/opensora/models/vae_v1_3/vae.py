"""A stand-in, not the official code: v1.3's VAE by its names and signatures in front of vidtta's own."""

from typing import Any

import torch
from torch import Tensor
from vidtta.engine.models import vae as ours

from opensora.registry import MODELS  # type: ignore[import-not-found]


class OpenSoraVAE_V1_3_PiplineConfig:
    def __init__(self, **kwargs: Any) -> None:
        self.encoder, self.decoder = kwargs["encoder"], kwargs["decoder"]
        assert (self.encoder["type"], self.decoder["type"]) == ("VideoEncoder", "VideoDecoder")


class OpenSoraVAE_V1_3_Pipline(ours.VAE):
    def __init__(
        self,
        config, micro_batch_size=None, micro_batch_size_2d=None, micro_frame_size=None, use_tiled_conv3d=False, tile_size=16,
        tiled_dim=None, num_tiles=None, temporal_overlap=False, normalization=None,
    ) -> None:  # fmt: skip
        assert micro_batch_size == 1 and micro_frame_size == 17 and temporal_overlap and normalization == "video"
        encoder, decoder = (MODELS.build(part).settings for part in (config.encoder, config.decoder))
        assert encoder.pop("micro_batch_size_2d") == decoder.pop("micro_batch_size_2d") == 4
        super().__init__(ours.VAEConfig.from_dict({"encoder": encoder, "decoder": decoder}))

    def encode(self, x: Tensor, is_training=False, sample_posterior=True, return_posterior=False, **kwargs) -> Tensor:
        return super().encode(x, torch.Generator().manual_seed(0) if sample_posterior else None)

    def decode(self, z: Tensor, is_training=False, **kwargs) -> Tensor:
        return super().decode(z)
