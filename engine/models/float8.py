"""Which linear layers of a network compute in float8, and the copies of their weights that do.

Those of each layer that are faster so (LINEARS). Norms, embeddings, modulation, the captions' keys and values, attention's output
projections, the final layer and every low-rank addition stay as they are.

    sampling    the whole clip's latents: every weight is frozen by then, adapted ones are quantised anew
    all         that, and steps and the known latents' features, of those in LEARNING that the method leaves frozen

A copy knows which version of its weight it was made from, and is made again in place, in the same storage, where that is another:
whoever writes a weight need not know of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .float8_linear import float8_linear, float8_linear_reference, quantize_weight
from .norm_float8_linear import add_norm_float8_linear

if TYPE_CHECKING:
    from .settings import ModelSettings
    from .stdit3 import STDiT3

LINEARS = ("attn.qkv", "cross_attn.q_linear", "mlp.fc1", "mlp.fc2")
"""In float8 in sampling. Of 54,000 tokens on an H200, with what quantises: the norm and qkv take 0.55 ms instead of 0.74, the norm and fc1
0.69 instead of 0.96, fc2 with the activation 0.79, which in 16 bits takes 0.75 without and adds 0.05 to fc1, a square product 0.18
instead of 0.20. A step with the MLP and the caption's queries so was the fastest; with the two output projections too it was no faster
and lay further off (bench.float8_sets)."""
LEARNING = ("mlp.fc1", "mlp.fc2")
"""In float8 in steps and features too, with `all`. qkv would lose with a low-rank addition, which is one product with it in 16 bits;
the square ones gain too little (bench.float8_sets)."""
CAPABILITY = (8, 9)  # of the first cards with float8 products
FARTHEST = 0.02  # relative, of a product on this card from the reference's: half a step of bfloat16, and other sums

Where = Literal["sampling", "all"]


@dataclass(frozen=True)
class Rule:
    """Where float8 serves a layer. features_tokens: of the known latents; without gradients, more rows than these are sampling.
    learning: whether the layer is one of LEARNING."""

    where: Where
    features_tokens: int
    learning: bool = True

    def serves(self, rows: float, trained: bool) -> bool:
        """Whether a product of so many rows is in float8, of a weight that the method trains or leaves frozen."""
        sampling = rows > self.features_tokens and not torch.is_grad_enabled()
        return sampling or (self.learns and not trained)

    @property
    def learns(self) -> bool:
        """Whether steps and features are in float8 too, of a weight that is frozen."""
        return self.where == "all" and self.learning


def version_of(weight: Tensor) -> tuple[int, int]:
    """What changes with every write to a weight, and where it lies."""
    return weight.data_ptr(), weight._version


class Copy:
    """A weight in float8. values, scales: from `quantize_weight`; version: of the weight that they hold."""

    def __init__(self, weight: Tensor, rule: Rule) -> None:
        self.rule = rule
        self.values, self.scales = quantize_weight(weight)
        self.version = version_of(weight)

    def refresh(self, weight: Tensor) -> bool:
        """Bring the copy up to its weight; whether that took anything."""
        if self.version == version_of(weight):
            return False
        quantize_weight(weight, out=(self.values, self.scales))
        self.version = version_of(weight)
        return True


class Linear(nn.Linear):
    """nn.Linear, in float8 where a copy of its weight says so."""

    float8: Copy | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if in_float8(self, x) else super().forward(x)

    def product(self, x: Tensor, gelu: bool = False) -> Tensor:
        """The layer of x, or of gelu(x), in float8."""
        return float8_linear(x, *self.parts(), gelu)

    def product_of_norm(
        self, x: Tensor, h: Tensor | None, shift: Tensor, scale: Tensor, down: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x + h, the layer of its modulated norm in float8, and that norm's projection by `down` (norm_float8_linear.py)."""
        return add_norm_float8_linear(x, h, shift, scale, *self.parts(), down)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The copy's values and scales, bias and weight."""
        assert self.float8 is not None
        return self.float8.values, self.float8.scales, self.bias, self.weight


def in_float8(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer computes in float8 for x, in the work at hand."""
    if not isinstance(layer, Linear) or layer.float8 is None:
        return False
    return layer.float8.rule.serves(x.shape[:-1].numel(), layer.weight.requires_grad)


def learns_in_float8(layer: nn.Module) -> bool:
    """Whether steps compute a layer in float8, if a method leaves its weight frozen."""
    return isinstance(layer, Linear) and layer.float8 is not None and layer.float8.rule.learns


class Float8:
    """The copies of a network's weights, one for each of LINEARS in every layer."""

    def __init__(self, model: "STDiT3", where: Where, features_tokens: int) -> None:
        self.rule = Rule(where, features_tokens)
        self.linears: list[Linear] = []
        for layer in model.layers:
            for name in LINEARS:
                linear = layer.get_submodule(name)
                assert isinstance(linear, Linear), f"{name} was {type(linear)}; methods are attached afterwards"
                linear.float8 = Copy(linear.weight, replace(self.rule, learning=name in LEARNING))
                self.linears.append(linear)

    @property
    def bytes(self) -> int:
        """Of all copies; at STDiT3-XL/2 0.83 GiB."""
        return sum(copy.values.nbytes + copy.scales.nbytes for _, copy in self.pairs())

    def refresh(self, rows: float = inf) -> int:
        """Bring the copies that serve products of so many rows up to their weights (by default those of sampling); how many
        were made anew."""
        return sum(
            copy.refresh(linear.weight)
            for linear, copy in self.pairs()
            if copy.rule.serves(rows, linear.weight.requires_grad)
        )

    def pairs(self) -> Iterator[tuple[Linear, Copy]]:
        """Each linear and its copy."""
        for linear in self.linears:
            assert linear.float8 is not None
            yield linear, linear.float8


def use_float8(model: "STDiT3", where: Where | None, features_tokens: int = 0) -> None:
    """Compute a network's layers in float8 from now on, or with None no longer; before a method is attached."""
    if model.float8 is not None:
        for linear in model.float8.linears:
            linear.float8 = None
    model.float8 = None
    if where is not None:
        model.float8 = Float8(model, where, features_tokens)


def float8_everywhere(model: "STDiT3") -> bool:
    """Whether frozen weights compute in float8 in training too."""
    return model.float8 is not None and model.float8.rule.where == "all"


def put_float8_in_force(model: "STDiT3", settings: "ModelSettings", features_tokens: int) -> None:
    """What a recipe says of float8, from now on. Raises UserError where it cannot be: on this device, or with what else it says."""
    if settings.float8 == "none":
        return
    if why := _missing(settings, model.device):
        raise UserError(f"model.float8 was {settings.float8}, {why}")
    try:
        use_float8(model, settings.float8, features_tokens)
        if model.device.type == "cuda":
            _try_product(model)
    except (ValueError, RuntimeError, NotImplementedError, ArithmeticError) as error:
        use_float8(model, None)
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model.float8 was {settings.float8}, which cannot run here ({said[:300]}); take model.float8: none"
        ) from error


def _missing(settings: "ModelSettings", device: torch.device) -> str:
    """What float8 lacks on a device, and the way out; empty where nothing."""
    if device.type != "cuda":
        return ""
    if (has := torch.cuda.get_device_capability(device)) < CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), has
        return f"which needs a card of compute capability 8.9 or more, and {name} has {major}.{minor}; take model.float8: none"
    if settings.kernels == "plain":
        return "whose quantisation is a Triton kernel on a GPU, and model.kernels plain takes none; take model.kernels: auto"
    if settings.dtype != "bfloat16":
        return (
            f"whose products give bfloat16 on a GPU, and model.dtype was {settings.dtype}; take model.dtype: bfloat16"
        )
    return ""


@torch.no_grad()
def _try_product(model: "STDiT3") -> None:
    """Compute each linear of the first layer once as a run will, against the reference; raises ArithmeticError where it is far."""
    assert model.float8 is not None
    model.float8.refresh()
    for name, linear in zip(LINEARS, model.float8.linears, strict=False):
        copy = linear.float8
        assert copy is not None
        for gelu in (False, True):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(300, linear.in_features, generator=generator).to(model.device, model.dtype)
            found = linear.product(x, gelu).float()
            truth = float8_linear_reference(x, copy.values, copy.scales, linear.bias, gelu).float()
            if not (distance := ((found - truth).norm() / truth.norm()).item()) <= FARTHEST:
                raise ArithmeticError(f"{name} lies {distance:.3g} from the reference, relative, allowed {FARTHEST}")
