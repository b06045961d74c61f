"""What layers in float8 compute: off they change no bit, on they are the reference, on every path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from vidtta.engine.methods import LoRA
from vidtta.engine.models import float8 as float8_module
from vidtta.engine.models.checkpoint import state_hash
from vidtta.engine.models.float8 import LINEARS, Linear, put_float8_in_force, use_float8
from vidtta.engine.models.float8_linear import float8_linear_reference
from vidtta.engine.models.lora_linear import LoRALinear
from vidtta.engine.models.paths import Paths, use_paths
from vidtta.engine.models.settings import ModelSettings
from vidtta.engine.models.stdit3 import Mlp
from vidtta.kernels.common import INTERPRETED

from .float8_by_hand import by_hand, distance
from .test_paths import velocities
from .tiny import noise, tiny_dit

pytestmark = pytest.mark.usefixtures("float8_cast", "quick_compiler")


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


def test_the_linears_of_a_layer_are_the_references_and_no_other():
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
    targets = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "mlp.fc1", "cross_attn.kv_linear")
    for method in [LoRA(rank=4, targets=targets)]:
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
            if chosen is None:
                with monkeypatch.context() as patch:
                    patch.setattr(float8_module.Rule, "serves", lambda *inputs: False)
                    exact = velocities(model, 5)
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
