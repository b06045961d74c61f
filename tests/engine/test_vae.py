"""The VAE against the official code's numbers, and the properties that the rest of the engine relies on."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.vae import LATENT_MEAN, LATENT_STD, VAE, VAEConfig, latent_frames, pixel_frames
from vidtta.engine.models.vae_layers import Attention, Norm, ResBlock

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SHARED = Path(__file__).resolve().parents[2] / "../shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared reference folder is not beside the checkout")


TINY = VAEConfig(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1)  # a change of width, and little else


@pytest.fixture(scope="module")
def vae() -> VAE:
    vae = VAE(TINY).requires_grad_(False)
    fill_by_rule(vae)
    return vae


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def test_published_size_has_the_published_parameters():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    assert sum(p.numel() for p in vae.encoder.parameters()) == 100_046_496
    assert sum(p.numel() for p in vae.decoder.parameters()) == 159_117_315
    assert sum(p.numel() for p in vae.parameters()) == 259_163_811
    assert len(vae.state_dict()) == 256
    assert list(vae.buffers()) == []


@needs_shared
def test_keys_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    reference = json.loads((SHARED / "reference/open-sora-v1.3-state-dict.json").read_text())
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == reference["vae"]["keys"]


@pytest.mark.parametrize(
    "path", [FIXTURES / "vae_17.safetensors", pytest.param(SHARED / "parity/vae_33.safetensors", marks=needs_shared)]
)
def test_parity_with_the_official_code(path: Path):
    with safe_open(path, "pt") as file:
        config = VAEConfig.from_dict(json.loads(file.metadata()["config"]))
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    vae = VAE(config).requires_grad_(False)
    fill_by_rule(vae)
    assert relative_error(torch.cat(vae.moments(expected["x"]), dim=1), expected["moments"]) < 1e-5
    assert relative_error(vae.encode(expected["x"]), expected["z"]) < 1e-5
    assert relative_error(vae.decode(expected["z"]), expected["recon"]) < 1e-5


# Fact sheet 9.1, 17 frames being covered by the parity file.
# Mean, standard deviation and three elements of z, then of the pixels.
SHEET = {
    1: [-0.081249, 0.858388, -0.29068, -0.91791, 0.93223, 0.128667, 0.896622, -0.08988, -2.25259, 0.32884],
    22: [-0.035338, 1.104116, 0.31338, -3.48006, 0.09250, 0.077825, 0.731235, 0.01074, -1.28987, 0.49143],
}


def sheet_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def sheet_vae() -> VAE:
    """Filled by the fact sheet's own rule, which is not that of the parity files."""
    vae = VAE(VAEConfig(ch=32)).requires_grad_(False)
    for k, (key, tensor) in enumerate(sorted(vae.state_dict().items())):
        scales = key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight"))
        tensor.copy_(0.05 * sheet_noise(1000 + k, tuple(tensor.shape)) + (1.0 if scales else 0.0))
    return vae


@pytest.mark.parametrize("F", SHEET)
def test_numbers_of_the_fact_sheet(sheet_vae: VAE, F: int):
    z = sheet_vae.encode(sheet_noise(50 + F, (1, 3, F, 32, 40)).clamp(-2, 2) / 2)
    r = sheet_vae.decode(z)
    assert z.shape == (1, 16, {1: 1, 22: 7}[F], 4, 5)
    assert r.shape == (1, 3, {1: 1, 22: 21}[F], 32, 40)
    actual = [z.mean(), z.std(), z[0, 0, 0, 0, 0], z[0, 7, -1, 2, 3], z[0, 15, -1, 3, 4]]
    actual += [r.mean(), r.std(), r[0, 0, 0, 0, 0], r[0, 1, -1, 17, 23], r[0, 2, -1, 31, 39]]
    assert [value.item() for value in actual] == pytest.approx(SHEET[F], abs=1e-4)


# Fact sheet 3.3, executed counts: pixel frames, their latent frames, the frames those decode to.
COUNTS = [
    *[(1, 1, 1), (5, 2, 5), (13, 4, 13), (17, 5, 17), (18, 6, 17), (21, 7, 21), (22, 7, 21), (23, 7, 21)],
    *[(33, 10, 33), (44, 13, 41), (45, 14, 45), (49, 15, 49), (65, 20, 65)],
]


def test_frame_counts():
    assert [(F, latent_frames(F), pixel_frames(latent_frames(F))) for F, _, _ in COUNTS] == COUNTS


@pytest.mark.parametrize("F", [2, 18, 20, 34])
def test_frame_counts_are_those_of_the_model(vae: VAE, F: int):
    z = vae.encode(noise(F, 1, 3, F, 8, 16))
    assert z.shape == (1, 16, latent_frames(F), 1, 2)
    assert vae.decode(z).shape == (1, 3, pixel_frames(latent_frames(F)), 8, 16)


@pytest.mark.parametrize("T", [14, 11, 6], ids="T={}".format)
def test_decoding_some_frames_gives_the_same_bits(vae: VAE, T: int):
    latents = noise(0, 1, 16, T, 1, 2)
    whole = vae.decode(latents)
    F = pixel_frames(T)
    # The scored frames; one frame; before, at and after a shared frame; the last frame (shared when T is 5k + 1).
    for frames in [
        range(22, 45),
        range(1),
        range(15, 16),
        range(16, 17),
        range(17, 18),
        range(15, 34),
        range(F - 1, F),
    ]:
        if frames.stop <= F:
            assert torch.equal(vae.decode(latents, frames), whole[:, :, frames.start : frames.stop]), frames


def test_decoding_some_frames_leaves_the_other_chunks_out(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    decoded, forward = [], vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda z: decoded.append(z.shape[2]) or forward(z))
    vae.decode(noise(0, 1, 16, 14, 1, 1), range(22, 45))
    assert decoded == [5, 4]
    decoded.clear()
    vae.decode(noise(0, 1, 16, 14, 1, 1), range(16, 17))
    assert decoded == [5, 5]


def test_shared_frame_is_the_mean_of_both_chunks(vae: VAE):
    latents = noise(1, 1, 16, 7, 1, 2)
    before, after = vae.decode(latents[:, :, :5]), vae.decode(latents[:, :, 5:])
    expected = torch.cat([before[:, :, :16], (before[:, :, 16:] + after[:, :, :1]) / 2, after[:, :, 1:]], dim=2)
    assert torch.equal(vae.decode(latents), expected)


def test_given_frames_encode_in_two_chunks_that_share_no_state(vae: VAE):
    pixels = noise(2, 1, 3, 21, 16, 8)
    z = vae.encode(pixels)
    assert z.shape == (1, 16, 7, 2, 1)
    assert torch.equal(z[:, :, :5], vae.encode(pixels[:, :, :17]))
    assert torch.equal(z[:, :, 5:], vae.encode(pixels[:, :, 16:]))


def test_a_sample_does_not_depend_on_its_batch(vae: VAE):
    pixels = noise(3, 2, 3, 5, 8, 8)
    z = vae.encode(pixels)
    assert torch.equal(z[1:], vae.encode(pixels[1:]))
    assert torch.equal(vae.decode(z)[1:], vae.decode(z[1:]))


def test_posterior_sample(vae: VAE):
    pixels = noise(4, 1, 3, 5, 8, 8)
    before = pixels.clone()
    mean, logvar = vae.moments(pixels)
    stats = [torch.tensor(values).view(1, 16, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD)]
    expected = (mean + (logvar / 2).exp() * noise(7, 1, 16, 2, 1, 1) - stats[0]) / stats[1]
    torch.testing.assert_close(vae.encode(pixels, torch.Generator().manual_seed(7)), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vae.encode(pixels), (mean - stats[0]) / stats[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(pixels, before)


def test_log_variance_is_clamped(vae: VAE, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vae.encoder, "forward", lambda x: torch.linspace(-99, 99, 32).view(1, 32, 1, 1, 1))
    mean, logvar = vae.moments(torch.zeros(1, 3, 1, 8, 8))
    assert (mean.min(), mean.max()) == (-99, torch.linspace(-99, 99, 32)[15])
    assert (logvar.min(), logvar.max()) == (torch.linspace(-99, 99, 32)[16], 20)


def test_bfloat16_weights_compute_in_bfloat16_and_normalise_in_float32(vae: VAE):
    half = VAE(vae.config).requires_grad_(False).to(torch.bfloat16)
    fill_by_rule(half)
    pixels = noise(5, 1, 3, 5, 16, 16)
    mean, _ = half.moments(pixels)
    z = half.encode(pixels)
    stats = [torch.tensor(values).view(1, 16, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD)]
    assert mean.dtype == z.dtype == half.decode(z).dtype == torch.bfloat16
    assert torch.equal(z, ((mean.float() - stats[0]) / stats[1]).bfloat16())
    # bfloat16 keeps 8 bits; 5 % allows for some thirty layers of them.
    assert relative_error(z.float(), vae.encode(pixels)) < 5e-2
    assert relative_error(half.decode(z).float(), vae.decode(z.float())) < 5e-2


def test_attention_is_causal_in_raster_order():
    attention = Attention(32).double()
    fill_by_rule(attention)
    x = noise(6, 2, 32, 2, 3, 2).double()
    h = attention.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (attention.q, attention.k, attention.v))
    logits = torch.einsum("bcn,bcm->bnm", q, k) / 32**0.5
    weights = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    expected = x + attention.proj_out(torch.einsum("bnm,bcm->bcn", weights, v).view_as(x))
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("layer", [ResBlock(32, 64), Attention(32)], ids=["res block", "attention"])
def test_gradients_against_finite_differences(layer: torch.nn.Module):
    layer = layer.double()
    fill_by_rule(layer)
    names, values = zip(*((name, p.detach().requires_grad_()) for name, p in layer.named_parameters()), strict=True)
    x = noise(8, 1, 32, 2, 2, 2).double().requires_grad_()

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_gradients_reach_the_pixels_and_every_weight():
    vae = VAE(TINY)
    fill_by_rule(vae)
    pixels = noise(9, 1, 3, 5, 16, 16).requires_grad_()
    vae.decode(vae.encode(pixels, torch.Generator().manual_seed(0))).square().mean().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().amin(dim=(0, 1, 3, 4)).min() > 0
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_one_chunk_traces_without_a_graph_break(vae: VAE):
    # The backend that only traces: building kernels takes a minute and tests nothing more of ours.
    encoder = torch.compile(vae.encoder, fullgraph=True, backend="eager")
    decoder = torch.compile(vae.decoder, fullgraph=True, backend="eager")
    pixels, latents = noise(10, 1, 3, 5, 8, 8), noise(11, 1, 16, 2, 1, 1)
    assert torch.equal(encoder(pixels), vae.encoder(pixels))
    assert torch.equal(decoder(latents), vae.decoder(latents))


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 30, 40), (1, 3, 5, 32, 44), (1, 4, 5, 32, 40), (3, 5, 32, 40), (1, 3, 0, 8, 8)]
)
def test_pixels_of_a_wrong_shape(vae: VAE, shape: tuple[int, ...]):
    message = f"VAE: pixels are {list(shape)}; they must be [B, 3, F, H, W], H and W multiples of 8."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vae.encode(torch.zeros(shape))


def test_latents_of_a_wrong_shape(vae: VAE):
    message = "VAE: latents are [1, 8, 5, 1, 1]; they must be [B, 16, T, h, w]."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vae.decode(torch.zeros(1, 8, 5, 1, 1))


@pytest.mark.parametrize("frames", [range(18), range(-1, 3), range(3, 3), range(0, 4, 2)])
def test_frames_that_do_not_exist(vae: VAE, frames: range):
    message = f"VAE: frames is {frames}; it must be a range with step 1 inside range(0, 17)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vae.decode(torch.zeros(1, 16, 5, 1, 1), frames)


def published_config(**changes: dict) -> dict:
    sizes = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16, "in_channels": 3, "out_ch": 3}
    encoder = sizes | {"type": "VideoEncoder", "double_z": True, "down_sampling_layer": [1, 2]}
    decoder = sizes | {"type": "VideoDecoder", "temporal_up_layers": [2, 3], "micro_batch_size_2d": 4}
    parts = {"encoder": encoder | changes.get("encoder", {}), "decoder": decoder | changes.get("decoder", {})}
    return {"model_type": "OpenSoraVAE_V1_3_Pipline", "micro_frame_size": None, **parts, **changes.get("top", {})}


@pytest.mark.parametrize("decoder_blocks", [2, 3])
def test_published_configuration(decoder_blocks: int):
    config = published_config(decoder={"num_res_blocks": decoder_blocks, "in_channels": 16})
    assert VAEConfig.from_dict(config) == VAEConfig()


def test_flat_configuration():
    flat = {"ch": 32, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 1, "micro_batch_size": 1}
    assert VAEConfig.from_dict(flat) == VAEConfig(ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1)


def test_the_groups_of_every_norm_are_the_configured_ones():
    with torch.device("meta"):
        published, small = VAE(VAEConfig()), VAE(VAEConfig(ch=32, norm_groups=8))
    for vae, groups in ((published, 32), (small, 8)):
        norms = [module for module in vae.modules() if isinstance(module, Norm)]
        assert norms and {norm.num_groups for norm in norms} == {groups}


def test_one_channel_a_group_takes_a_chunks_mean_away():
    """Why norm_groups exists: as many groups as channels, and a picture's brightness does not reach what follows the norm."""
    dark, bright = (torch.randn(1, 32, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + shift for shift in (0, 1))
    bright[:, 1::2] -= 1  # the brightness of every second channel
    gone, kept = (
        (norm(dark) - norm(bright)).square().mean().item()
        for norm in (VAE(TINY).decoder.norm_out, VAE(replace(TINY, norm_groups=8)).decoder.norm_out)
    )
    assert gone < 1e-6 < 0.05 < kept


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"chh": 32},
            "unknown key 'chh'; the sizes are ch, ch_mult, in_channels, norm_groups, num_res_blocks, out_ch, z_channels.",
        ),
        (published_config(encoder={"double_z": False}), "double_z is False; only True is supported."),
        (
            published_config(decoder={"temporal_up_layers": [1, 2]}),
            "temporal_up_layers is (1, 2); only (2, 3) is supported.",
        ),
        (published_config(decoder={"ch": 64}), "ch is 128 and 64 in different parts; they must agree."),
        (
            published_config(decoder={"num_res_blocks": 4}),
            "num_res_blocks is 2 and 4 in different parts; they must agree.",
        ),
        ({"encoder": {}}, "decoder is missing; give both encoder and decoder, or neither."),
        ({"ch": 48}, "ch is 48; it must be a positive multiple of 32."),
        ({"ch_mult": [1, 2]}, "ch_mult is [1, 2]; it must be four positive integers."),
        ({"num_res_blocks": 0}, "num_res_blocks is 0; it must be at least 1."),
        ({"z_channels": 4}, "z_channels is 4; it must be 16."),
        ({"norm_groups": 0}, "norm_groups is 0; it must divide 32."),
        ({"norm_groups": 12}, "norm_groups is 12; it must divide 32."),
        ({"norm_groups": 64}, "norm_groups is 64; it must divide 32."),
    ],
)
def test_configurations_that_are_refused(config: dict, message: str):
    with pytest.raises(ValueError, match=f"^VAE config: {re.escape(message)}$"):
        VAEConfig.from_dict(config)
