"""How the layers of a network are computed: which code, compiled or not, and which attention.

All layers of a kind share one compiled graph for each shape, and for each of sampling and training: weights, latents and tables
are its inputs, in storage that stays where it is. The number of a caption's tokens is left symbolic, so another caption
compiles nothing anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ...kernels.attention import Choice, self_attention_shapes
from ...kernels.qk_norm_rope import turns_back
from ...kernels.windows import Grid
from .again import Again
from .attention import DEFAULT, Backends, SelfAttention, TextStates
from .geometry import Geometry
from .linear_gelu import linear_gelu
from .stdit3 import Layer, Mlp, STDiT3

GRAPHS = 64  # how many graphs of one layer may be compiled: kinds x shapes x methods, far below this

MethodPath = Literal["plain", "fused", "triton"]
"""How methods compute what is theirs. plain: as written; fused: LoRA in one product, AdamW in torch's fused kernel; triton: that,
and the delta's steps on the kernels of delta_features.py."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """kernels: torch, the plain code; triton, the kernels of `fused.py`. compiled: through torch.compile.

    attention: back ends by shape, and `cross` for captions, which the kernels have their own for unless a back end is pinned
    (caption_attention.py); None leaves both to PyTorch. gelu_in_product: without gradients the
    MLP's activation joins its first product. compiler: torch.compile's back end.
    """

    kernels: Literal["torch", "triton"] = "torch"
    compiled: bool = False
    attention: Choice | None = None
    cross: str | None = None
    gelu_in_product: bool = False
    compiler: str | Callable[..., Any] = "inductor"
    methods: MethodPath = "triton"
    recorded: bool = True
    """On a card: record a clip's steps as a CUDA graph (methods/recorded_loss.py), of the same kernels."""
    remade: tuple[Again, ...] = ()
    """What training on the kernels computes again in the backward pass rather than keep (again.py)."""
    strict: bool = False
    """Whether a method that cannot take its `methods` path raises ValueError when it is attached; else it takes the next slower
    one and says so."""
    _run: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        assert not self.remade or self.kernels == "triton", "the plain code keeps everything"
        run: Any = Layer.forward
        if self.kernels == "triton":
            from .fused import fused_layer

            run = partial(fused_layer, remade=self.remade) if self.remade else fused_layer
        if self.compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
            run = torch.compile(run, backend=self.compiler, dynamic=False, fullgraph=True)
        object.__setattr__(self, "_run", run)

    def backends(self, samples: int, geometry: Geometry, heads: int, dim: int, training: bool) -> Backends:
        """The attention of a batch of latents; raises KeyError for a shape that was not measured."""
        pinned = self.attention is not None and self.attention.pinned
        cross = "triton" if self.kernels == "triton" and not pinned else self.cross
        if self.attention is None:
            return DEFAULT._replace(cross=cross)
        grid = Grid(geometry.frames, geometry.rows, geometry.cols)
        frames, *windows = (
            self.attention.backend(shape, training) for shape in self_attention_shapes(samples, grid, heads, dim)
        )
        return Backends(frames, tuple(windows), cross)

    def prepare(
        self, model: STDiT3, tokens: Tensor, texts: tuple[TextStates | None, ...], geometry: Geometry
    ) -> Callable[..., Tensor]:
        """The function that `STDiT3.run_layers` calls for each layer: (layer, tokens, modulation, text, known_text, geometry)."""
        training = torch.is_grad_enabled()
        if self.compiled:
            for text in texts:
                if text is not None:
                    text.mark_length()
        heads = model.config.num_heads
        found = self.backends(tokens.shape[0], geometry, heads, model.config.hidden_size // heads, training)

        def run(layer: Layer, x: Tensor, *rest: Any) -> Tensor:
            if self.compiled and training and not x.requires_grad:
                # Before the first trained layer nothing asks for a gradient; asking anyway keeps to one graph for all layers.
                x = x.detach().requires_grad_()
            return self._run(layer, x, *rest, found)

        return run


@dataclass(frozen=True, kw_only=True)
class PathsByWork:
    """A path for each kind of work; None is the plain one.

    training: with gradients; features: without, a batch of at most `features_tokens` tokens, where launching weighs as much as
    computing; sampling: larger ones. methods, strict: as `Paths` has them.
    """

    training: Paths | None
    features: Paths | None
    sampling: Paths | None
    features_tokens: int
    methods: MethodPath
    strict: bool = False

    @property
    def gelu_in_product(self) -> bool:
        """An MLP's way is one for all work without gradients, so both must want it."""
        return all(paths is not None and paths.gelu_in_product for paths in (self.features, self.sampling))

    def prepare(
        self, model: STDiT3, tokens: Tensor, texts: tuple[TextStates | None, ...], geometry: Geometry
    ) -> Callable[..., Tensor]:
        """As `Paths.prepare`, of the path for the work at hand."""
        if torch.is_grad_enabled():
            paths = self.training
        else:
            paths = self.features if tokens.shape[0] * tokens.shape[1] <= self.features_tokens else self.sampling
        return Layer.__call__ if paths is None else paths.prepare(model, tokens, texts, geometry)


AnyPaths = Paths | PathsByWork


def use_paths(model: STDiT3, paths: AnyPaths | None) -> None:
    """Compute the layers of a network this way from now on; None is the plain path."""
    model.paths = paths
    training = paths.training if isinstance(paths, PathsByWork) else paths
    kernels = training is not None and training.kernels == "triton"
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.turns_back = kernels and turns_back(module.q_norm.weight, module.k_norm.weight)
        if isinstance(module, Mlp):
            module.first = linear_gelu if paths is not None and paths.gelu_in_product else None


def method_path(model: STDiT3) -> MethodPath:
    """How methods compute what is theirs on a network."""
    return "plain" if model.paths is None else model.paths.methods


def records(model: STDiT3, work: Literal["training", "features", "sampling"]) -> bool:
    """Whether a kind of work is recorded on a network: on a card, where a fast path computes it and keeps the activations of
    training."""
    paths = getattr(model.paths, work) if isinstance(model.paths, PathsByWork) else model.paths
    return paths is not None and paths.recorded and not model.recompute and model.device.type == "cuda"


def made_again(model: STDiT3) -> dict[str, str]:
    """What training does not keep on a network, for the record of a method's ways."""
    paths = model.paths.training if isinstance(model.paths, PathsByWork) else model.paths
    return {"computed again": " and ".join(paths.remade)} if paths is not None and paths.remade else {}


def raise_if_strict(model: STDiT3, reason: str) -> None:
    """Raise ValueError with why a method cannot take its fast path, where that path was asked for by name."""
    if model.paths is not None and model.paths.strict:
        raise ValueError(f"{reason}; take model.kernels: auto, which records this, or plain")
