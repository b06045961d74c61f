"""Linear layers in float8: off they change no bit, on they are fresh, frozen, in the protocol, and as near as float8 is."""

# pyright: reportPrivateImportUsage=false
# (torch exports its multi-tensor operations under private names alone)

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from vidtta.engine import choices as choices_module
from vidtta.engine import recorded
from vidtta.engine.clip import continue_clip
from vidtta.engine.errors import UserError
from vidtta.engine.methods import AnyMethod, Delta, FullFineTuning, LoRA, NoAdaptation
from vidtta.engine.methods.adamw import FusedAdamW, OnePassAdamW, PlainAdamW
from vidtta.engine.methods.optimize import Masters
from vidtta.engine.models import float8 as float8_module
from vidtta.engine.models.checkpoint import state_hash
from vidtta.engine.models.float8 import LINEARS, Linear, put_float8_in_force, use_float8
from vidtta.engine.models.float8_linear import float8_linear_reference
from vidtta.engine.models.lora_linear import LoRALinear
from vidtta.engine.models.paths import Paths, use_paths
from vidtta.engine.models.settings import ModelSettings
from vidtta.engine.models.stdit3 import Mlp, STDiT3
from vidtta.engine.recompute import recomputed
from vidtta.kernels.common import INTERPRETED
from vidtta.kernels.quantize_rows import quantize_rows_reference

from .test_paths import velocities
from .test_recorded_loss import StandIn
from .tiny import noise, tiny_dit, tiny_experiment, tiny_known, tiny_task
from .tiny_run import DELTA, FULL, one_sentence, tiny_lab

KNOWN_TOKENS = 7 * 2  # of tiny_experiment's known latents: 7 frames of 1 x 2 tokens
LORA = LoRA(steps=2, rank=4, lr=1e-2)
METHODS: dict[str, AnyMethod] = {"full": FullFineTuning(steps=2, lr=1e-3), "lora": LORA, "delta": Delta(steps=2)}


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choices_module, "COMPILER", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


interpreted = pytest.mark.skipif(not INTERPRETED, reason="for Triton's interpreter alone")


def distance(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def by_hand(model: STDiT3) -> STDiT3:
    """The same network with each of the six linears replaced by the reference, on the weights as they are now."""
    model = copy.deepcopy(model)
    use_float8(model, None)

    class Reference(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            values, scales = quantize_rows_reference(self.linear.weight.detach())
            return float8_linear_reference(x, values, scales, self.linear.bias)

    for layer in model.layers:
        for name in LINEARS:
            path, last = name.rsplit(".", 1)
            setattr(layer.get_submodule(path), last, Reference(layer.get_submodule(name)))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_off_is_what_it_was_to_the_bit(dtype):
    """A plain nn.Linear in every place gives the same bits, and so does a network that float8 was on and off in."""
    model = tiny_dit(dtype)
    ours = velocities(model, 5)
    use_float8(model, "all")
    on = velocities(model, 5)
    use_float8(model, None)
    assert torch.equal(velocities(model, 5), ours) and not torch.equal(on, ours) and model.float8 is None
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    assert not any(isinstance(module, Linear) for module in model.modules())
    assert torch.equal(velocities(model, 5), ours)


def test_copies_are_no_part_of_the_weights():
    model = tiny_dit()
    names, before = list(model.state_dict()), state_hash(model)
    use_float8(model, "all")
    velocities(model, 5)
    assert list(model.state_dict()) == names and state_hash(model) == before
    assert model.float8 is not None
    numbers = sum(layer.get_submodule(name).weight.numel() for layer in model.layers for name in LINEARS)  # type: ignore[union-attr]
    assert numbers < model.float8.bytes < 1.1 * numbers


def test_the_six_linears_of_a_layer_are_the_references_and_no_other():
    model = tiny_dit()
    use_float8(model, "sampling")
    found = velocities(model, 5)
    torch.testing.assert_close(found, velocities(by_hand(model), 5), rtol=1e-4, atol=1e-4)
    use_float8(model, None)
    assert distance(found, velocities(model, 5)) > 1e-3  # else the line above says nothing


@pytest.mark.parametrize("way", ["compiled", "triton"])
def test_every_path_takes_it(way: str, monkeypatch: pytest.MonkeyPatch):
    """Also where the activation is joined to a product, and where LoRA is one product."""
    if way == "triton" and not INTERPRETED:
        pytest.skip("for Triton's interpreter alone")
    model = tiny_dit(depth=1)
    use_float8(model, "sampling")
    counter = CompileCounterWithBackend("aot_eager")
    paths = Paths(
        kernels="triton" if way == "triton" else "torch",
        compiled=way == "compiled",
        compiler=counter,
        gelu_in_product=True,
    )
    for method in [LoRA(rank=4, targets=("attn.qkv", "attn.proj", "mlp.fc1", "cross_attn.kv_linear"))]:
        results, exact = [], torch.empty(0)
        for chosen in (None, paths):
            use_paths(model, chosen)
            adapter = method.attach(model, 0)
            adapter.randomize(torch.Generator().manual_seed(0))
            for module in model.modules():
                if isinstance(module, LoRALinear):
                    with torch.no_grad():
                        module.B.copy_(noise(1, *module.B.shape) * 0.1)
                    module.refresh()
            results.append(velocities(model, 5))
            with monkeypatch.context() as patch:
                patch.setattr(float8_module.Rule, "serves", lambda *inputs: False)
                torch._dynamo.reset()
                exact = velocities(model, 5)
                torch._dynamo.reset()
            adapter.detach()
        # Not number by number: where another order of sums tips a rounding to 8 bits, a token moves by a step of it.
        assert distance(*results) < 1e-3 < 1e-2 < distance(results[0], exact)


def test_captions_and_clips_compile_nothing_anew_and_weights_that_change_neither():
    model = tiny_dit()
    use_float8(model, "all")
    counter = CompileCounterWithBackend("aot_eager")
    use_paths(model, Paths(compiled=True, compiler=counter))
    velocities(model, 5)
    assert counter.frame_count == 2
    with torch.no_grad():
        model.layers[0].attn.qkv.weight.mul_(1.5)
    changed = velocities(model, 7)
    assert counter.frame_count == 2
    use_paths(model, None)
    torch.testing.assert_close(changed, velocities(by_hand(model), 7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["sampling", "all"])
@pytest.mark.parametrize("name", METHODS)
def test_which_work_is_in_float8(name: str, where: Any, monkeypatch: pytest.MonkeyPatch):
    """Sampling always; steps and features where all is asked for, of what the method does not train."""
    experiment = tiny_experiment()
    use_float8(experiment.dit, where, KNOWN_TOKENS)
    seen: set[tuple[str, bool]] = set()
    forward = Linear.forward

    def watched(self: Linear, x: Tensor) -> Tensor:
        if self.float8 is not None:
            sampling = x.shape[1] > KNOWN_TOKENS
            work = "sampling" if sampling else "training" if torch.is_grad_enabled() else "features"
            seen.add((work, float8_module.in_float8(self, x)))
        return forward(self, x)

    monkeypatch.setattr(Linear, "forward", watched)
    adapter = METHODS[name].attach(experiment.dit, 0)
    outcome = continue_clip(experiment, tiny_known(experiment), adapter)
    learns = "features" if name == "delta" else "training"
    assert seen == {("sampling", True), (learns, where == "all" and name != "full")}
    if name != "delta":
        with torch.no_grad():
            tiny = tiny_task(experiment.dit)
            seen.clear()
            rule = replace(
                experiment.dit.float8.rule, features_tokens=tiny.geometry.frames * tiny.geometry.tokens_per_frame
            )  # type: ignore[union-attr]
            for linear in experiment.dit.float8.linears:  # type: ignore[union-attr]
                linear.float8.rule = rule  # type: ignore[union-attr]
            tiny.held_out_loss(1)
        assert {on for _, on in seen} == {where == "all" and name != "full"}
    assert outcome.seconds["quantise"] > 0
    if name == "full" and where == "all":
        assert outcome.ways["float8"] == "sampling alone, as every weight is trained"
    if name == "lora":
        assert outcome.ways["lora"] == ("a float8 product and two" if where == "all" else "three products")


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


def reference_gradients(layer: LoRALinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients in float64: the frozen product of the dequantised rows, whose rounding lets gradients through, with the
    weight itself in the backward; the addition as it is."""
    x64, A, B = (t.detach().double().requires_grad_() for t in (x, layer.A, layer.B))
    values, scales = quantize_rows_reference(layer.base.weight.detach())
    with torch.no_grad():
        rounded = float8_linear_reference(x64, values, scales, layer.base.bias)
    through = F.linear(x64, layer.base.weight.detach().double())
    y = rounded + (through - through.detach()) + layer.scale * (x64 @ A.T) @ B.T
    return [y.detach(), *torch.autograd.grad(y, [x64, A, B], dy.double())]


@pytest.mark.parametrize("shape", [(1, 1, 16, 32), (2, 5, 48, 144), (1, 9, 1152, 1152)], ids=str)
def test_the_gradients_of_lora_on_a_float8_layer(shape: tuple[int, int, int, int]):
    samples, tokens, width, out = shape
    torch.manual_seed(0)
    linear = Linear(width, out).requires_grad_(False)
    linear.float8 = float8_module.Copy(linear.weight, float8_module.Rule("all", 0))
    linear.float8.refresh(linear.weight)
    layer = LoRALinear(linear, 4, 6.0)
    with torch.no_grad():
        layer.A.copy_(noise(1, *layer.A.shape) * width**-0.5)
        layer.B.copy_(noise(2, *layer.B.shape))
    x, dy = noise(3, samples, tokens, width).requires_grad_(), noise(4, samples, tokens, out)
    y = layer(x)
    found = [y.detach(), *torch.autograd.grad(y, [x, layer.A, layer.B], dy)]
    for ours, truth in zip(found, reference_gradients(layer, x, dy), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-5 * truth.abs().max().item())
    # The addition is not rounded to 8 bits: it is what the layer gains over its frozen part, in the input's own dtype.
    with torch.no_grad():
        gained, exact = layer(x) - linear(x), layer.scale * (x.double() @ layer.A.double().T) @ layer.B.double().T
    torch.testing.assert_close(gained.double(), exact, rtol=1e-4, atol=1e-5 * y.abs().max().item())


def test_the_gradients_of_a_whole_step_point_where_they_did():
    """Through all layers, against float64 without float8; activations computed again give the same bits."""
    found: dict[str, Tensor] = {}
    for name, dtype, where in (
        ("truth", torch.float64, None),
        ("plain", torch.float32, None),
        ("float8", torch.float32, "all"),
    ):
        model = tiny_dit().to(dtype)
        use_float8(model, where)  # type: ignore[arg-type]
        adapter = LoRA(rank=4).attach(model, 0)
        with torch.no_grad():
            for index, a in enumerate(adapter.adapters.values()):
                a.B.copy_(noise(index, *a.B.shape) * 0.05)
        task = tiny_task(model)
        task.loss(task.draw(0)).backward()
        found[name] = torch.cat([p.grad.flatten() for p in adapter.masters.parameters if p.grad is not None])
        for p in adapter.masters.parameters:
            p.grad = None
        if where:
            with recomputed(model):
                task.loss(task.draw(0)).backward()
            again = torch.cat([p.grad.flatten() for p in adapter.masters.parameters if p.grad is not None])
            assert torch.equal(again, found[name])
    assert distance(found["plain"], found["truth"]) < 1e-4 < 1e-3 < distance(found["float8"], found["truth"]) < 0.15


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton needs a GPU or its interpreter")
@interpreted
def test_what_training_computes_again_is_the_same_in_float8():
    model, found = tiny_dit(depth=1), []
    use_float8(model, "all")
    for remade in ((), ("rotation", "hidden")):
        use_paths(model, Paths(kernels="triton", remade=remade))  # type: ignore[arg-type]
        adapter = LoRA(rank=4).attach(model, 0)
        assert adapter.ways["lora"] == "a float8 product and two"
        with torch.no_grad():
            for index, a in enumerate(adapter.adapters.values()):
                a.B.copy_(noise(index, *a.B.shape) * 0.05)
        task = tiny_task(model)
        task.loss(task.draw(0)).backward()
        found.append([p.grad.clone() for p in adapter.masters.parameters if p.grad is not None])
        adapter.detach()
    assert len(found[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_mlps_hidden_state_is_quantised_with_its_activation(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    mlp = Mlp(48, 192, 48).requires_grad_(False)
    mlp.first = lambda x, weight, bias: pytest.fail("the first product is in float8, so it cannot be in another")
    for linear in (mlp.fc1, mlp.fc2):
        linear.float8 = float8_module.Copy(linear.weight, float8_module.Rule("sampling", 0))
        linear.float8.refresh(linear.weight)
    x = noise(0, 2, 9, 48)
    with torch.no_grad():
        found = mlp(x)
        hidden = float8_linear_reference(x, mlp.fc1.float8.values, mlp.fc1.float8.scales, mlp.fc1.bias)  # type: ignore[union-attr]
        truth = float8_linear_reference(F.gelu(hidden, approximate="tanh"), mlp.fc2.float8.values, mlp.fc2.float8.scales, mlp.fc2.bias)  # type: ignore[union-attr]  # fmt: skip
    torch.testing.assert_close(found, truth)
    mlp.first = lambda x, weight, bias: F.gelu(F.linear(x, weight, bias), approximate="tanh")
    mlp.fc2.float8 = mlp.fc1.float8 = None
    with torch.no_grad():
        assert torch.equal(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))


def test_widths_that_are_no_multiples_of_16_are_padded():
    """As the embedded model's 216: 24 in, 24, 72 and 96 out."""
    model = tiny_dit(hidden=24)
    put_float8_in_force(model, ModelSettings(float8="all"), 4)
    assert model.float8 is not None
    shapes = {tuple(linear.float8.values.shape) for linear in model.float8.linears}  # type: ignore[union-attr]
    assert shapes == {(80, 32), (32, 32), (96, 32), (32, 96)}
    torch.testing.assert_close(velocities(model, 5), velocities(by_hand(model), 5), rtol=1e-4, atol=1e-4)


def test_a_product_that_cannot_run_on_a_card_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    model = tiny_dit()

    def refuse(model: STDiT3) -> None:
        raise RuntimeError("no kernel image\nmore of it")

    monkeypatch.setattr(float8_module, "_missing", lambda settings, device: "")
    monkeypatch.setattr(float8_module, "_try_product", refuse)
    monkeypatch.setattr(STDiT3, "device", torch.device("cuda"))
    with pytest.raises(UserError) as found:
        put_float8_in_force(model, ModelSettings(float8="all"), 4)
    assert str(found.value) == (
        "model.float8 was all, which cannot run here (no kernel image); take model.float8: none"
    )
    assert model.float8 is None and not any(getattr(m, "float8", None) for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "capability", "said"),
    [
        ({}, (8, 0), "needs a card of compute capability 8.9 or more, and NAME has 8.0; take model.float8: none"),
        ({"kernels": "plain"}, (9, 0), "is a Triton kernel on a GPU, and model.kernels plain takes none; take model.kernels: auto"),
        ({"dtype": "float32"}, (9, 0), "give bfloat16 on a GPU, and model.dtype was float32; take model.dtype: bfloat16"),
        ({}, (8, 9), ""),
        ({}, (9, 0), ""),
    ],
)  # fmt: skip
def test_what_a_card_lacks(settings, capability, said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NAME")
    found = float8_module._missing(ModelSettings(float8="sampling", **settings), torch.device("cuda"))
    assert found.endswith(said) and bool(found) == bool(said) and "\n" not in found


def test_a_product_that_is_wrong_on_a_card_is_found(monkeypatch: pytest.MonkeyPatch):
    model = tiny_dit()
    use_float8(model, "sampling")
    float8_module._try_product(model)
    monkeypatch.setattr(float8_module, "float8_linear", lambda x, *rest: 1.03 * float8_linear_reference(x, *rest[:3]))
    with pytest.raises(ArithmeticError, match=r"attn\.qkv lies 0\.03 from the reference"):
        float8_module._try_product(model)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with tiny_lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.settings["arms"] = {"full": FULL, "delta": DELTA}
        yield lab


def test_a_run_in_float8_says_so_and_shares_no_result_with_one_that_is_not(lab, capsys):
    assert lab.run("exact", "data.limit=1") == 0
    exact = lab.results("exact")
    for result in exact.values():
        assert "float8" not in result["settings"]["protocol"] and "float8" not in result["paths"]
        assert "quantise" not in lab.result("exact", result["arm"], "ball")["cost"]["seconds"]
    assert lab.run("exact", "data.limit=1", "model.float8=sampling") == 2
    assert 'was made under other settings (protocol.float8: was null, now "sampling")' in one_sentence(capsys)
    assert lab.run("float8", "data.limit=1", "model.float8=sampling") == 0
    rounded = lab.results("float8")
    for name, result in rounded.items():
        assert result["settings"]["protocol"]["float8"] == result["paths"]["float8"] == "sampling"
        assert result["keys"]["protocol"] != exact[name]["keys"]["protocol"]
        assert result["generated"] != exact[name]["generated"]
        assert lab.result("float8", *name.split("/"))["cost"]["seconds"]["quantise"] >= 0
        # What sampling alone rounds, adapting does not: the same losses to the bit.
        assert result["adaptation"].get("losses") == exact[name]["adaptation"].get("losses")
        assert abs(result["scores"]["psnr"]["mean"] - exact[name]["scores"]["psnr"]["mean"]) < 1
    summary = (lab.root / "float8" / "summary.csv").read_text()
    assert "float8 sampling" in summary and "float8" not in (lab.root / "exact" / "summary.csv").read_text()
    assert lab.run("float8", "data.limit=1", "model.float8=all") == 2
    assert 'protocol.float8: was "sampling", now "all"' in one_sentence(capsys)


def test_a_baseline_of_another_arithmetic_is_refused_by_its_key(lab, capsys):
    """Results put side by side by hand: the arm in float8, its baseline not."""
    from vidtta.engine.rundir import check_paired

    assert lab.run("one", "data.limit=1") == 0
    assert lab.run("two", "data.limit=1", "model.float8=all") == 0
    baseline, ours = lab.result("one", "baseline", "ball"), lab.result("two", "delta", "ball")
    with pytest.raises(ValueError, match="this result cannot be compared with that of arm baseline"):
        check_paired(baseline, ours)
    check_paired(lab.result("two", "baseline", "ball"), ours)
    from vidtta.engine import cli

    capsys.readouterr()
    assert cli.main(["compare", str(lab.root / "one"), str(lab.root / "two")]) == 2
    assert "float8" in one_sentence(capsys)
