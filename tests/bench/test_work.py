"""The declared work is what PyTorch's own counter sees, on a network small enough to run."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vidtta.bench import work
from vidtta.engine.adaptation import AdaptationSettings
from vidtta.engine.methods import FullFineTuning, LoRA
from vidtta.engine.models.stdit3 import Caption, Condition, STDiT3Config
from vidtta.engine.models.vae import VAEConfig
from vidtta.kernels.windows import Grid

from ..engine.tiny import tiny_caption, tiny_dit, tiny_latents, tiny_task, tiny_vae

XL = STDiT3Config()


def counted(call) -> int:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel([SDPBackend.MATH]), counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("samples", [1, 3])
def test_flops_of_a_forward_are_the_counted_ones(samples: int):
    model, T, h, w = (
        tiny_dit(),
        3,
        18,
        22,
    )  # windows of all four kinds: 8 x 8, and what is left of 9 rows and 11 columns
    geometry = model.geometry(T, (h, w), (144, 176), (0,))
    caption = tiny_caption()
    text = model.text_states(Caption(caption.embedding.expand(samples, -1, -1)))
    x = torch.randn(samples, 16, T, h, w)
    condition = Condition(x, torch.ones_like(x))
    t = torch.full((samples,), 500.0)
    found = counted(lambda: model(x, t, t, text, text, geometry, condition))
    assert work.forward(model.config, samples, Grid(T, 9, 11), 5).flops == found


@pytest.mark.parametrize(("method", "tolerance"), [(LoRA(steps=1, rank=4), 0.1), (FullFineTuning(steps=1), 0.02)])
def test_flops_of_a_step_are_the_counted_ones_but_for_its_ends(method, tolerance: float):
    """A step's first layer needs no gradient of its input, which the declaration leaves in: little, and less in deep networks."""
    model = tiny_dit(depth=4)
    adapter = method.attach(model, 0)
    task = tiny_task(model, AdaptationSettings(), latents=tiny_latents())
    with torch.no_grad():
        fixed = task.captions()
    text = fixed if isinstance(method, LoRA) else None
    found = counted(lambda: task.loss(task.draw(0), text).backward())
    grid, trained = Grid(7, 2, 3), adapter.change().trained
    if isinstance(method, LoRA):
        declared = work.lora_step(model.config, grid, 5, method.rank)
    else:
        declared = work.full_step(model.config, grid, 5, trained)
    assert declared.flops == pytest.approx(found, rel=tolerance)


def test_the_autoencoder_counts_without_storage_what_it_counts_with():
    vae = tiny_vae()
    pixels = torch.zeros(1, 3, 5, 16, 24)
    found = counted(lambda: vae.encode(pixels))
    assert (
        work.autoencoder(vae.config, "encoder", lambda v: v.encode(torch.empty(1, 3, 5, 16, 24)), 0).flops == found > 0
    )


def test_work_at_full_size():
    """Of h200-baseline.md and the fact sheet: 14.4, 20.2 and 44.5 TFLOP with padded windows; 150 TFLOP a decoded chunk."""
    flops = [work.forward(XL, 1, Grid(T, 30, 40), 300).flops / 1e12 for T in (5, 7, 15)]
    assert flops == pytest.approx([14.4, 20.2, 44.5], rel=0.03) and flops < [14.4, 20.2, 44.5]
    decoded = work.autoencoder(VAEConfig(), "decoder", lambda v: v.decode(torch.empty(1, 16, 5, 60, 80)), 0)
    assert decoded.flops / 1e12 == pytest.approx(150, rel=0.03)
    lora, full = work.lora_step(XL, Grid(7, 30, 40), 60, 16), work.full_step(XL, Grid(7, 30, 40), 60, 1_207_959_680)
    assert 1.9 < lora.flops / work.forward(XL, 1, Grid(7, 30, 40), 60).flops < 2.2
    assert 2.8 < full.flops / work.forward(XL, 1, Grid(7, 30, 40), 60).flops < 3.2
    assert full.bytes > 24 * 1_207_959_680 > lora.bytes
