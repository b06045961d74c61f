"""What a layer keeps for its backward pass on the kernels with torch.compile, without a GPU: traced and split, not compiled or run.

Run: python -m tests.engine.kept
A line of JSON for each method, kind of layer and set of what is computed again: widths of the network a token, by tensor. Views of one
tensor count once each; attention's result is such a pair in a spatial layer (its own, and the projection's input). Then a line for each
method and grid of tokens: whether the whole layer is taken without gradients.
"""

import json
import os
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are decorated

import torch
import torch.utils._triton
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from triton.runtime import driver
from vidtta.engine.models.attention import Backends, LayerText
from vidtta.engine.models.fused import fused_layer
from vidtta.engine.models.lora_linear import LoRALinear
from vidtta.engine.models.stdit3 import STDiT3, STDiT3Config
from vidtta.kernels import common

from tests.kernels.hopper import Hopper

FRAMES, ROWS, COLS = 3, 9, 11  # windows of all four kinds
GRIDS = ((ROWS, COLS), (16, 11), (16, 8), (5, 6))  # and of two; one of two windows; one window
CONFIG = STDiT3Config(hidden_size=48, depth=1, num_heads=2, caption_channels=16, model_max_length=8)
BY = Backends("flash", ("flash",) * 4, "flash")


class Split(Exception):
    """The forward graph, whose outputs are the layer's result and what is kept."""


def take(graph: Any, inputs: Any) -> Any:
    raise Split(next(node for node in graph.graph.nodes if node.op == "output").args[0][1:])


def layer_inputs(method: str, windowed: bool, turned: bool, rows: int, cols: int) -> list[Any]:
    """A layer on the kernels and what it computes on, as `fused_layer` takes them."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = STDiT3(CONFIG).bfloat16().requires_grad_(method == "full")
    layer: Any = (model.temporal_blocks if windowed else model.spatial_blocks)[0]
    layer.attn.turns_back = turned
    if method == "lora":
        for name in ("qkv", "proj"):
            adapter = LoRALinear(getattr(layer.attn, name), 3, 3.0)
            adapter.extend()
            setattr(layer.attn, name, adapter)
    geometry = model.geometry(FRAMES, (2 * rows, 2 * cols), (480, 640), (0,))
    trained, D = method == "full", CONFIG.hidden_size

    def random(*shape: int, wants_gradient: bool = trained) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_(wants_gradient)

    text, known = (LayerText(*(random(1, 2, 2, D // 2) for _ in range(2)), None) for _ in range(2))
    tokens = random(1, FRAMES * rows * cols, D, wants_gradient=True)
    return [layer, tokens, random(1, 6, D), text, known, geometry, BY]


def split(run: Any, inputs: list[Any]) -> list[Any]:
    """What `take` is given of a compiled call."""
    try:
        run(*inputs)
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, Split):
            found = found.__cause__ or found.__context__
        if found is None:
            raise
        return list(found.args[0])
    raise AssertionError("nothing was split")


def compiled() -> Any:
    backend = aot_autograd(
        fw_compiler=take, bw_compiler=take, inference_compiler=take, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    return torch.compile(fused_layer, backend=backend, fullgraph=True, dynamic=False)


def kept(method: str, windowed: bool, remade: tuple[str, ...], turned: bool) -> dict[str, float]:
    """Widths a token of each tensor that has at least a tenth of one, by the name of its node."""
    inputs = layer_inputs(method, windowed, turned, ROWS, COLS)
    N, D = inputs[1].shape[1:]
    made = [node for node in split(compiled(), [*inputs, remade]) if isinstance(node.meta.get("val"), Tensor)]
    own = [n for n in made if n.op != "placeholder" or n.meta["val"].shape == (1, N, D)]  # not weights and vectors
    widths = {node.name: round(node.meta["val"].numel() / (N * D), 2) for node in own}
    return {name: width for name, width in widths.items() if width >= 0.05}


@torch.no_grad()
def traced_without_gradients(method: str, windowed: bool, rows: int, cols: int) -> bool:
    """Whether the compiler takes the whole layer as sampling has it; raises where it does not."""
    split(compiled(), layer_inputs(method, windowed, True, rows, cols))
    return True


if __name__ == "__main__":
    driver.set_active(Hopper())  # type: ignore[arg-type]
    common.INTERPRETED = True  # lets tensors on the CPU through; no launch happens
    torch.utils._triton.has_triton = lambda *_: True
    for method in ("full", "lora"):
        for remade, turned in (((), False), (("rotation", "hidden"), False), ((), True)):
            found = kept(method, windowed=True, remade=remade, turned=turned)
            print(json.dumps({"method": method, "remade": remade, "turned": turned, "kept": found}), flush=True)
        for rows, cols in GRIDS:
            done = all(traced_without_gradients(method, windowed, rows, cols) for windowed in (False, True))
            print(json.dumps({"method": method, "grid": [rows, cols], "traced": done}), flush=True)
