"""The MLP in training: the bits of the plain one, and one hidden layer less kept for the backward, compiled or not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
from torch import Tensor, nn
from vidtta.engine.methods.full import FullFineTuning
from vidtta.engine.methods.lora import LoRA
from vidtta.engine.models import fused
from vidtta.engine.models.gelu_linear import gelu_linear
from vidtta.engine.models.paths import Paths, use_paths
from vidtta.engine.models.stdit3 import STDiT3
from vidtta.kernels.common import INTERPRETED
from vidtta.kernels.norm_modulate import add_norm_modulate

from .tiny import noise, tiny_dit, tiny_task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="Triton needs a GPU or its interpreter")


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(x, approximate="tanh"), weight, bias)


def inputs(dtype: torch.dtype, *shape: int, out: int = 12) -> list[Tensor]:
    tensors = noise(0, *shape), noise(1, out, shape[-1]), noise(2, out)
    return [t.to(DEVICE, dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 9), (2, 33, 20)], ids=str)
def test_it_has_the_bits_of_gelu_and_a_linear_layer(shape, dtype, compiled):
    """Of the result and of all gradients, from one row on."""
    function = torch.compile(gelu_linear, backend="aot_eager", fullgraph=True) if compiled else gelu_linear
    found = []
    for call in (plain, function):
        leaves = inputs(dtype, *shape)
        out = call(*leaves)
        dout = noise(3, *out.shape).to(out)
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_its_gradient_is_the_numerical_one():
    assert torch.autograd.gradcheck(gelu_linear, inputs(torch.float64, 2, 3, 5, out=4))
    torch.library.opcheck(gelu_linear, tuple(inputs(torch.float32, 2, 3, 5, out=4)))


def test_a_compiler_keeps_what_enters_gelu_alone():
    """Of the way written out it keeps both: it sees GELU again in the backward, and takes the first."""
    kept = []

    def note(gm: Any, example_inputs: Any) -> Any:
        outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        kept.append(sum(node.meta["val"].shape == (33, 20) for node in outputs[1:]))
        return gm

    for function in (plain, gelu_linear):
        leaves = inputs(torch.float32, 33, 20)
        traced = aot_function(function, note, nop, partition_fn=min_cut_rematerialization_partition)
        traced(*leaves).sum().backward()
    assert kept == [2, 1]


def kept_bytes(model: STDiT3, parameters: list[nn.Parameter]) -> tuple[int, list[Tensor]]:
    """Bytes that a loss keeps for its backward besides the parameters, each storage once; the loss and the gradients."""
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = storage
        return tensor

    task = tiny_task(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(task.draw(0))
    total = sum(storage.nbytes() for storage in storages.values())
    return total, [loss.detach(), *torch.autograd.grad(loss, parameters)]


@needs_triton
@pytest.mark.parametrize(
    "method", [FullFineTuning(), LoRA(rank=4), LoRA(rank=4, targets=("mlp.fc1",))], ids=["full", "lora", "lora fc1"]
)
def test_a_layer_on_the_kernels_keeps_no_result_of_gelu(method, monkeypatch):
    """A hidden layer of N x 4D a layer less in full fine-tuning, for the same bits. With a frozen MLP none was kept before."""
    found = []
    for way in (plain, gelu_linear):
        model = tiny_dit(depth=1).to(DEVICE)
        use_paths(model, Paths(kernels="triton"))
        monkeypatch.setattr(fused, "gelu_linear", way)
        adapter = method.attach(model, 0)
        found.append(kept_bytes(model, adapter.masters.parameters))
    (before, expected), (now, actual) = found
    tokens, hidden = 7 * 2 * 3, 4 * 48
    assert before - now == (len(model.layers) * tokens * hidden * 4 if method.kind == "full" else 0)
    assert len(actual) == len(expected) and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@needs_triton
def test_full_fine_tuning_on_the_kernels_keeps_no_result_of_a_norm(monkeypatch):
    """Two of N x D a layer less; gradients as near to those of the layers apart as two orders of rounding are."""

    def apart(
        x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        s, n = add_norm_modulate(x, h, shift, scale)
        return s, F.linear(n, weight, bias)

    found = []
    for way in (apart, fused.add_norm_linear):
        model = tiny_dit(depth=1).to(DEVICE)
        use_paths(model, Paths(kernels="triton"))
        monkeypatch.setattr(fused, "add_norm_linear", way)
        found.append(kept_bytes(model, FullFineTuning().attach(model, 0).masters.parameters))
    (before, expected), (now, actual) = found
    tokens, width = 7 * 2 * 3, 48
    assert before - now == 2 * len(model.layers) * tokens * width * 4
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7
