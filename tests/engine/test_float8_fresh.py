"""Which work is in float8, and that the copies are of the weights as they are then."""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor operations under private names alone)

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vidtta.engine import recorded
from vidtta.engine.clip import continue_clip
from vidtta.engine.methods import AnyMethod, Delta, FullFineTuning, LoRA, NoAdaptation
from vidtta.engine.methods.adamw import FusedAdamW, OnePassAdamW, PlainAdamW
from vidtta.engine.methods.optimize import Masters
from vidtta.engine.models import float8 as float8_module
from vidtta.engine.models.checkpoint import state_hash
from vidtta.engine.models.float8 import LEARNING, Linear, use_float8
from vidtta.kernels.common import INTERPRETED
from vidtta.kernels.quantize_rows import quantize_rows_reference

from .float8_by_hand import KNOWN_TOKENS, by_hand, distance
from .test_recorded_loss import StandIn
from .tiny import noise, tiny_experiment, tiny_known, tiny_task

LORA = LoRA(steps=2, rank=4, lr=1e-2, targets=("attn.qkv", "mlp.fc1"))
METHODS: dict[str, AnyMethod] = {"full": FullFineTuning(steps=2, lr=1e-3), "lora": LORA, "delta": Delta(steps=2)}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="for Triton's interpreter alone")


@pytest.mark.parametrize("where", ["sampling", "all"])
@pytest.mark.parametrize("name", METHODS)
def test_which_work_is_in_float8(name: str, where: Any, monkeypatch: pytest.MonkeyPatch):
    """Sampling always; the MLP's in steps and features where all is asked for, unless the method trains them."""
    experiment = tiny_experiment()
    use_float8(experiment.dit, where, KNOWN_TOKENS)
    learning = {id(layer.get_submodule(name)) for layer in experiment.dit.layers for name in LEARNING}
    seen: set[tuple[str, bool, bool]] = set()
    forward = Linear.forward

    def watched(self: Linear, x: Tensor) -> Tensor:
        if self.float8 is not None:
            sampling = x.shape[1] > KNOWN_TOKENS
            work = "sampling" if sampling else "training" if torch.is_grad_enabled() else "features"
            seen.add((work, id(self) in learning, float8_module.in_float8(self, x)))
        return forward(self, x)

    monkeypatch.setattr(Linear, "forward", watched)
    adapter = METHODS[name].attach(experiment.dit, 0)
    outcome = continue_clip(experiment, tiny_known(experiment), adapter)
    learns = "features" if name == "delta" else "training"
    mlp = where == "all" and name != "full"
    assert seen == {("sampling", False, True), ("sampling", True, True), (learns, False, False), (learns, True, mlp)}
    if name != "delta":
        with torch.no_grad():
            tiny = tiny_task(experiment.dit)
            seen.clear()
            tokens = tiny.geometry.frames * tiny.geometry.tokens_per_frame
            for _, copy in experiment.dit.float8.pairs():  # type: ignore[union-attr]
                copy.rule = replace(copy.rule, features_tokens=tokens)
            tiny.held_out_loss(1)
        assert {found[1:] for found in seen} == {(False, False), (True, mlp)}
    assert outcome.seconds["quantise"] > 0
    if name == "full" and where == "all":
        assert outcome.ways["float8"] == "sampling alone, as every weight is trained"
    if name == "lora":
        assert outcome.ways["lora"] == "three products" + "; a float8 product and two" * (where == "all")


def test_adapted_weights_are_quantised_anew_and_back_after_the_clip(monkeypatch: pytest.MonkeyPatch):
    """Sampling sees the weights as adapted, in the storage that was there; with copies kept from before it would not."""
    experiment = tiny_experiment()
    use_float8(experiment.dit, "sampling", KNOWN_TOKENS)
    known, dit = tiny_known(experiment), experiment.dit
    assert dit.float8 is not None
    storage = [t.data_ptr() for linear in dit.float8.linears for t in (linear.float8.values, linear.float8.scales)]  # type: ignore[union-attr]
    before = state_hash(dit)
    base = continue_clip(experiment, known, NoAdaptation().attach(dit, 0)).latents

    def adapted() -> tuple[Tensor, Tensor]:
        """What a clip gives, and what the reference gives on the adapted weights."""
        adapter = FullFineTuning(steps=2, lr=1e-2).attach(dit, 0)
        found = continue_clip(experiment, known, adapter, restore=False).latents
        truth = continue_clip(replace(experiment, dit=by_hand(dit)), known, NoAdaptation().attach(dit, 0)).latents
        adapter.detach()
        return found, truth

    found, truth = adapted()
    moved = distance(truth, base)
    assert distance(found, truth) < 1e-4 < 1e-2 < moved
    assert state_hash(dit) == before
    again = continue_clip(experiment, known, NoAdaptation().attach(dit, 0))
    assert torch.equal(again.latents, base)
    assert dit.float8.refresh() == 0  # nothing is left to do: once a change
    assert storage == [
        t.data_ptr() for linear in dit.float8.linears for t in (linear.float8.values, linear.float8.scales)
    ]  # type: ignore[union-attr]
    monkeypatch.setattr(float8_module.Copy, "refresh", lambda self, weight: False)
    found, truth = adapted()
    assert distance(found, truth) > moved / 4  # stale copies are seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [PlainAdamW, FusedAdamW, pytest.param(OnePassAdamW, marks=interpreted)])
def test_every_write_that_a_method_makes_is_seen(dtype, way):
    """Steps of both optimizers (on a float32 weight in place, on a rounded one by its master), publishing, and going back."""
    parameter = nn.Parameter(noise(0, 32, 48).to(dtype))
    copy_of = float8_module.Copy(parameter, float8_module.Rule("all", 0))
    base = [parameter.detach().clone()]
    masters = Masters([parameter])

    def seen() -> bool:
        found = copy_of.refresh(parameter)
        values, scales = quantize_rows_reference(parameter.detach())
        assert torch.equal(copy_of.values.float(), values.float()) and torch.equal(copy_of.scales, scales)
        return found

    assert not seen()
    parameter.grad = torch.ones_like(parameter)
    optimizer = way(masters, FullFineTuning(lr=0.1))
    optimizer.step(optimizer.gradient_norm(), 0.1)
    assert seen() and not seen()
    torch._foreach_copy_([parameter.detach()], base)
    assert seen() and torch.equal(parameter, base[0])
    masters.reset([base[0].float() + 1])
    masters.publish()
    assert seen() and not seen()


def test_each_branch_of_guidance_has_the_copies_of_its_weights():
    """adapted_branches: conditional swaps the weights inside a step; full fine-tuning copies them in place."""
    experiment = tiny_experiment()
    experiment = replace(experiment, adaptation=replace(experiment.adaptation, adapted_branches="conditional"))
    known, found = tiny_known(experiment), []
    for dit in (experiment.dit, by_hand(experiment.dit)):
        if dit is experiment.dit:
            use_float8(dit, "sampling", KNOWN_TOKENS)
        adapter = FullFineTuning(steps=1).attach(dit, 0)
        adapter.steps = 0  # the weights are moved by hand, as the reference has no gradients
        weights = sorted(
            (name.replace(".linear.", "."), p) for name, p in dit.named_parameters() if name != "rope.freqs"
        )
        with torch.no_grad():
            for index, (_, parameter) in enumerate(weights):
                parameter.add_(noise(index, *parameter.shape) * 0.05 * parameter.std(unbiased=False))
        found.append(continue_clip(replace(experiment, dit=dit), known, adapter).latents)
        adapter.detach()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


class Replayed(StandIn):
    """A graph's replay runs no Python, so it brings no copy up to its weight."""

    def __call__(self, *inputs: Tensor) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(float8_module.Copy, "refresh", lambda self, weight: False)
            return super().__call__(*inputs)


@pytest.mark.parametrize("branches", ["all", "conditional"])
def test_recorded_sampling_has_fresh_copies_too(branches: Any, monkeypatch: pytest.MonkeyPatch):
    """Records outlive a clip, and each clip's weights are others."""
    found: dict[bool, list[Tensor]] = {}
    for recorded_too in (False, True):
        if recorded_too:
            StandIn.made = []
            monkeypatch.setattr(recorded, "Recorded", Replayed)
            monkeypatch.setattr("vidtta.engine.clip.records", lambda model, work: True)
        experiment = tiny_experiment()
        experiment = replace(experiment, adaptation=replace(experiment.adaptation, adapted_branches=branches))
        use_float8(experiment.dit, "sampling", KNOWN_TOKENS)
        adapter = FullFineTuning(steps=2, lr=1e-2).attach(experiment.dit, 0)
        clips = [tiny_known(experiment, name) for name in ("a", "b", "a")]
        found[recorded_too] = [continue_clip(experiment, known, adapter).latents for known in clips]
        assert bool(adapter.sampling) == recorded_too
        adapter.detach()
    assert StandIn.made
    assert all(torch.equal(*pair) for pair in zip(found[False], found[True], strict=True))
    assert torch.equal(found[True][0], found[True][2]) and not torch.equal(found[True][0], found[True][1])
