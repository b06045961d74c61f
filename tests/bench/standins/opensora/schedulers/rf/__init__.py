"""A stand-in, not the official code: v1.3's scheduler by its names and signatures, in vidtta's words."""

from typing import Any

import matplotlib.pyplot as plt  # type: ignore[import-not-found] # noqa: F401 (the official scheduler imports it too)
import torch
from torch import Tensor
from vidtta.engine.flow import add_noise, timestep_transform
from vidtta.engine.sampler import image_weights, oscillated


class RFLOW:
    def __init__(
        self,
        num_sampling_steps=10, num_timesteps=1000, cfg_scale=4.0, use_discrete_timesteps=False, use_timestep_transform=False,
        transform_scale=1.0, scale_temporal=True, use_oscillation_guidance=False, use_flaw_fix=False,
        scale_image_weight=False, initial_image_scale=1.0, force_num=10, drop_condition: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        assert use_timestep_transform and scale_image_weight and initial_image_scale == 1.0
        self.steps, self.force, self.drop = num_sampling_steps, force_num, drop_condition

    def sample(
        self,
        model, text_encoder, z, prompts, device, additional_args=None, mask=None, guidance_scale=None, image_cfg_scale=None,
        progress=True, neg_prompts=None, z_cond=None, z_cond_mask: Any = None, mask_index=None, use_sdedit=False,
        use_oscillation_guidance_for_text=None, use_oscillation_guidance_for_image=None,
    ) -> Tensor:  # fmt: skip
        assert additional_args is not None and z_cond is not None and use_sdedit and mask_index
        assert use_oscillation_guidance_for_text and use_oscillation_guidance_for_image
        text, null = text_encoder.encode(**text_encoder.tokenize_fn(prompts)), text_encoder.null(len(prompts))
        about = {name: float(additional_args[name][0]) for name in ("height", "width", "num_frames")}
        levels = [
            timestep_transform(
                torch.tensor([(1 - i / self.steps) * 1000.0]),
                about["height"], about["width"], int(about["num_frames"]), z.dtype,
            )
            for i in range(self.steps)
        ]  # fmt: skip
        for i, t in enumerate(levels):
            t = t.to(device)
            z = torch.where(z_cond_mask == 1, add_noise(z_cond, torch.randn_like(z_cond), t), z)
            out = model(
                torch.cat([z, z, z]), t.expand(3), y=torch.cat([text["y"], null, null]), mask=text["mask"],
                cond=torch.cat([z_cond, z_cond, torch.zeros_like(z_cond)]), cond_mask=torch.cat([z_cond_mask] * 3),
                mask_index=mask_index, y_null=null.repeat(3, 1, 1, 1), **additional_args,
            )  # fmt: skip
            prompt, without, nothing = out.chunk(2, dim=1)[0].chunk(3)
            image = oscillated(image_cfg_scale, i, self.force, True)
            weight: Any = image_weights(image, i, self.steps, z.shape[2]).to(z) if image > 1 else image
            v = nothing + weight * (without - nothing)
            v = v + oscillated(guidance_scale, i, self.force, True) * (prompt - without)
            after = levels[i + 1] if i + 1 < self.steps else torch.zeros(1)
            z = z + v * ((t - after.to(device)) / 1000)
        return z

    def training_losses(
        self, model, x_start, model_args=None, noise=None, mask=None, weights=None, t=None, mask_index=None,
        text_uncond_prob=None, **kwargs,
    ) -> dict[str, Tensor]:  # fmt: skip
        assert self.drop == {"keep": 1.0} and model_args is not None and noise is not None and mask_index
        known = torch.zeros_like(x_start)
        known[:, :, mask_index] = 1
        null = model.module.y_embedder.y_embedding[None, None].expand_as(model_args["y"])
        x_t = add_noise(x_start, noise, t)
        out = model(x_t, t, cond=x_start * known, cond_mask=known, mask_index=mask_index, y_null=null, **model_args)
        return {"loss": (out.chunk(2, dim=1)[0] - (x_start - noise)).square().mean(dim=(1, 2, 3, 4))}
