"""Layers in float8 written out, for the tests of float8."""

import copy

from torch import Tensor, nn
from vidtta.engine.models.float8 import LINEARS, use_float8
from vidtta.engine.models.float8_linear import float8_linear_reference
from vidtta.engine.models.stdit3 import STDiT3
from vidtta.kernels.quantize_rows import quantize_rows_reference

KNOWN_TOKENS = 7 * 2  # of tiny_experiment's known latents: 7 frames of 1 x 2 tokens


def distance(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def by_hand(model: STDiT3) -> STDiT3:
    """The same network with each linear that is in float8 replaced by the reference, on the weights as they are now."""
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
