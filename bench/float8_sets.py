"""Which of a layer's products gain by float8: a sampling step and a step of LoRA for several sets of them (engine/models/float8.py).

Run: python -m vidtta.bench.float8_sets [--out FILE.json] [--only NAME ...] [--minutes M]     (needs a GPU; no weights, no data)
     python -m vidtta.bench.float8_sets --check        (CPU: a small network; checks, no timings that mean anything)

The first row of each kind is the plain path, which the others are held against; the second the kernels without float8.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .steps import measured

if TYPE_CHECKING:
    from .step_scene import Scene

Row = dict[str, Any]
PATH = "fused, not compiled"
ALL = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2")
IN_SAMPLING = {
    "the caption's q left out": ("attn.qkv", "mlp.fc1", "mlp.fc2"),
    "attn.proj too": ("attn.qkv", "attn.proj", "cross_attn.q_linear", "mlp.fc1", "mlp.fc2"),
    "cross_attn.proj too": ("attn.qkv", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"),
    "all six": ALL,
    "the MLP": ("mlp.fc1", "mlp.fc2"),
    "fc1": ("mlp.fc1",),
}
IN_TRAINING = {"fc1": ("mlp.fc1",), "the caption's q too": ("cross_attn.q_linear", "mlp.fc1", "mlp.fc2")}


def with_layers(
    run: Callable[["Scene"], Row],
    sampling: tuple[str, ...] | None = None,
    training: tuple[str, ...] | None = None,
    fast: bool = True,
) -> Callable[["Scene"], Row]:
    """A row with these layers in float8 instead of the engine's own, perhaps with sums carried to float32."""

    def row(scene: "Scene") -> Row:
        from ..engine.models import float8, float8_linear

        before = float8.LINEARS, float8.LEARNING, float8_linear.FAST_ACCUMULATION
        float8.LINEARS, float8.LEARNING = sampling or before[0], training or before[1]
        float8_linear.FAST_ACCUMULATION = fast
        try:
            return run(scene) | {"in_sampling": float8.LINEARS, "in_training": float8.LEARNING, "fast_sums": fast}
        finally:
            float8.LINEARS, float8.LEARNING, float8_linear.FAST_ACCUMULATION = before

    return row


def rows() -> dict[str, Callable[["Scene"], Row]]:
    """By kind and set, in the order of what is asked first."""
    from .step_rows import LORA, attention, sampling, training
    from .step_scene import FLOAT8

    step, lora = sampling(f"{PATH}{FLOAT8}", 3), training(LORA, f"{PATH}{FLOAT8}")
    return {
        "attention": attention,
        "sample3 plain": sampling("eager", 3),
        "sample3 exact": sampling(PATH, 3),
        "sample3 float8": with_layers(step),
        "sample3 float8, sums in float32": with_layers(step, fast=False),
        **{f"sample3 float8, {name}": with_layers(step, layers) for name, layers in IN_SAMPLING.items()},
        "lora plain": training(LORA, "eager"),
        "lora exact": training(LORA, PATH),
        "lora float8": with_layers(lora),
        **{f"lora float8, {name}": with_layers(lora, ALL, layers) for name, layers in IN_TRAINING.items()},
    }


def main() -> None:
    measured("float8_sets", __doc__, 5.0, rows)


if __name__ == "__main__":
    main()
