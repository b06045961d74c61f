"""Gradients of layers in float8: those of the unrounded layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vidtta.engine.methods import LoRA
from vidtta.engine.models import float8 as float8_module
from vidtta.engine.models.float8 import Linear, use_float8
from vidtta.engine.models.float8_linear import float8_linear_reference
from vidtta.engine.models.lora_linear import LoRALinear
from vidtta.engine.models.paths import Paths, use_paths
from vidtta.engine.recompute import recomputed
from vidtta.kernels.common import INTERPRETED
from vidtta.kernels.quantize_rows import quantize_rows_reference

from .float8_by_hand import distance
from .tiny import noise, tiny_dit, tiny_task

pytestmark = pytest.mark.usefixtures("float8_cast")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="for Triton's interpreter alone")


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


@interpreted
def test_what_training_computes_again_is_the_same_in_float8():
    model, found = tiny_dit(depth=1), []
    use_float8(model, "all")
    for remade in ((), ("rotation", "hidden")):
        use_paths(model, Paths(kernels="triton", remade=remade))  # type: ignore[arg-type]
        adapter = LoRA(rank=4, targets=("attn.qkv", "mlp.fc1")).attach(model, 0)
        assert adapter.ways["lora"] == "one product; a float8 product and two"
        with torch.no_grad():
            for index, a in enumerate(adapter.adapters.values()):
                a.B.copy_(noise(index, *a.B.shape) * 0.05)
        task = tiny_task(model)
        task.loss(task.draw(0)).backward()
        found.append([p.grad.clone() for p in adapter.masters.parameters if p.grad is not None])
        adapter.detach()
    assert len(found[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
