"""Fitting the delta on the kernels takes the same steps as the plain method."""

import pytest
import torch
from torch import Tensor
from vidtta.engine.methods.delta import Delta, Site
from vidtta.engine.models.paths import Paths, use_paths

from tests.engine.tiny import tiny_dit, tiny_latents, tiny_task

SITES: list[Site] = ["pre", "mid", "post"]


def adapted(site: Site, fast: bool, latents: Tensor, **settings) -> tuple[Tensor, list[float], list[float]]:
    model = tiny_dit()
    adapter = Delta(steps=8, site=site, **settings).attach(model, 0)
    if fast:
        use_paths(model, Paths())
    seen: list[float] = []
    trace = adapter.adapt(tiny_task(model, latents=latents), lambda step, loss: seen.append(loss))
    assert seen == trace.losses and len(trace.zero_losses) == 8
    return adapter.state()["d"], trace.losses, trace.gradient_norms


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_the_same_steps(site: Site, odd: bool):
    latents = tiny_latents()[..., : 5 if odd else 6]  # an odd side: outputs that do not count
    settings = {"ranges": 2, "ridge": 0.1, "gradient_clip": 0.01, "weight_decay": 0.1}
    for kwargs in ({}, settings):
        plain, fast = (adapted(site, which, latents, **kwargs) for which in (False, True))
        for a, b in zip(plain, fast, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=2e-4, atol=2e-5)
