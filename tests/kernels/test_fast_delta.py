"""Fitting the delta on the kernels takes the same steps as the plain method."""

import pytest
import torch
from torch import Tensor
from vidtta.engine.methods.delta import Delta, DeltaAdapter, Site
from vidtta.engine.methods.parts import L2ToStart
from vidtta.engine.models.paths import Paths, use_paths
from vidtta.kernels import delta_features

from tests.engine.tiny import tiny_dit, tiny_latents, tiny_task
from tests.kernels.accuracy import DEVICE

SITES: list[Site] = ["pre", "mid", "post"]


STEPS = 5


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, where each takes a while."""
    if DEVICE == "cpu":
        monkeypatch.setattr(delta_features, "BLOCK_N", 16)
        monkeypatch.setattr(delta_features, "PROGRAMS", 3)


def adapted(site: Site, fast: bool, latents: Tensor, **settings) -> tuple[Tensor, list[float], list[float]]:
    model = tiny_dit().to(DEVICE)
    if fast:
        use_paths(model, Paths())
    adapter = Delta(steps=STEPS, site=site, **settings).attach(model, 0)
    assert adapter.on_kernels == fast
    seen: list[float] = []
    trace = adapter.adapt(tiny_task(model, latents=latents), lambda step, loss: seen.append(loss))
    assert seen == trace.losses and len(trace.zero_losses) == STEPS
    found = adapter.state()["d"], trace.losses, trace.gradient_norms
    adapter.detach()
    return found


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_the_same_steps(site: Site, odd: bool):
    latents = tiny_latents()[..., : 5 if odd else 6].to(DEVICE)  # an odd side: outputs that do not count
    settings = {"ranges": 2, "ridge": 0.1, "gradient_clip": 0.01, "weight_decay": 0.1}
    settings |= {"schedule": "cosine", "warmup": 3}
    plain, fast = (adapted(site, which, latents, **(settings if odd else {})) for which in (False, True))
    for a, b in zip(plain, fast, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=2e-4, atol=2e-5)


def test_after_each_step_its_delta_is_in_force_and_the_trace_as_long():
    """What snapshots and diagnostics look at; a run stopped there has the plain method's delta."""
    latents, found = tiny_latents().to(DEVICE), []
    for fast in (False, True):
        model = tiny_dit().to(DEVICE)
        if fast:
            use_paths(model, Paths())
        adapter = Delta(steps=4).attach(model, 0)
        seen: list[Tensor] = []

        def look(step: int, loss: float, adapter: DeltaAdapter = adapter, seen: list[Tensor] = seen) -> None:
            assert adapter.trace.steps == step + 1 == len(adapter.trace.losses) and adapter.trace.losses[-1] == loss
            seen.append(adapter.state()["d"])

        adapter.adapt(tiny_task(model, latents=latents), look)
        adapter.detach()
        found.append(torch.stack(seen))
    assert not torch.equal(found[0][0], found[0][1])
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-5)


def test_what_the_kernels_do_not_take_is_said_or_refused():
    model, settings = tiny_dit(), Delta(l2=L2ToStart(weight=1.0))
    use_paths(model, Paths())
    adapter = settings.attach(model, 0)
    assert not adapter.on_kernels and "do not take l2" in adapter.ways["fit on cached features"]
    adapter.detach()
    use_paths(model, Paths(strict=True))
    with pytest.raises(ValueError, match=r"do not take l2; take model\.kernels: auto"):
        settings.attach(model, 0)
