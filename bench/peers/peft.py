"""peft's LoRA in the place of ours, on our own network: a training step, and the adapted qkv layer alone.

Run: python -m vidtta.bench.peers.peft [--out FILE.json] [--only NAME ...] [--minutes M]     (needs a GPU)
     python -m vidtta.bench.peers.peft --check      (CPU: a small network in float32)

peft's A and B are given the values of ours, B not zero, and the loss and every gradient of A and B must agree before anything is
timed. `ratio` is how many times longer peft took than the row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...engine.torchvision_ops import declare_missing_operators
from .. import record, suite
from ..suite import Absent, Row
from . import need, version_of

if TYPE_CHECKING:
    from ...engine.models.stdit3 import STDiT3
    from ..step_scene import Scene

INSTALL = "pip install peft"
RANK, ALPHA = 16, 16.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the loss and the gradients of A and B together, relative in the L2 norm; both sides round in bfloat16, in another order."""


def inject(model: nn.Module, rank: int, alpha: float) -> list[nn.Parameter]:
    """Wrap every block's attn.qkv and attn.proj in place; the parameters that train, A and B in turn, all others frozen.

    Raises Absent where peft is not installed.
    """
    need("peft", INSTALL)
    declare_missing_operators()  # transformers, which peft imports, imports torchvision
    try:
        from peft import LoraConfig, inject_adapter_in_model  # type: ignore[import-not-found]
    except ImportError as error:
        raise Absent(f"peft {version_of('peft')} cannot be imported: {error}; {INSTALL}") from error

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=["attn.qkv", "attn.proj"], lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    found = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in found:
        parameter.requires_grad_(True)
    return found


def of_layers(model: "STDiT3") -> list[nn.Parameter]:
    """peft's parameters in the order in which our layers run, spatial and temporal in turn, which is that of our adapters."""
    return [p for layer in model.layers for name, p in layer.named_parameters() if "lora_" in name]


def remove(model: nn.Module) -> None:
    """Put the plain layers back."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                setattr(parent, name, child.base_layer)


@dataclass
class Pair:
    """peft and ours on one network. gradients: what peft computed, which ours are held against."""

    scene: "Scene"
    rank: int
    gradients: Tensor | None = None
    milliseconds: float | None = None
    start: list[Tensor] = field(default_factory=list)
    """A and B of each adapter, in the order of the layers."""

    def judged(self, found: Tensor) -> Row:
        """Raises where loss and gradients lie too far from peft's."""
        if self.gradients is None:
            self.gradients = found
            return {}
        dtype = self.scene.experiment.dit.dtype
        distance = ((found - self.gradients).norm() / self.gradients.norm()).item()
        if not distance <= TOLERANCE[dtype]:
            raise ArithmeticError(f"loss and gradients lie {distance:.3g} from peft's, allowed {TOLERANCE[dtype]}")
        return {"against": {"distance": distance, "allowed": TOLERANCE[dtype]}}


def step_row(who: str) -> Callable[[Pair], Row]:
    """A training step: loss, gradients, AdamW; of ours by the method's own loop."""

    def run(pair: Pair) -> Row:
        from ...engine.clip import task_of
        from ...engine.methods import LoRA
        from ..step_rows import on, step_work
        from ..step_scene import describe_path

        scene, model = pair.scene, pair.scene.experiment.dit
        task = task_of(scene.experiment, scene.known)
        label = f"peft {version_of('peft')}"
        with torch.no_grad():
            text = task.captions()
        if who == "peft":
            inject(model, pair.rank, ALPHA)
            parameters = of_layers(model)
            try:
                with torch.no_grad():
                    pair.start = [start_of(index, p) for index, p in enumerate(parameters)]
                    for parameter, value in zip(parameters, pair.start, strict=True):
                        parameter.copy_(value)
                pair.judged(gradients(task.loss(task.draw(0), text), parameters))
                optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0)

                def step() -> None:
                    task.loss(task.draw(0), text).backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()

                row, _ = scene.watch.measure(step)
            finally:
                remove(model)
            pair.milliseconds = row["ms"]
            row |= {
                "peer": label,
                "path": "plain PyTorch with peft's layers",
                "trained": sum(p.numel() for p in parameters),
            }
            return row | scene.rates(row["ms"], step_work(scene, LoRA(rank=pair.rank), row["trained"]))
        if pair.gradients is None:
            raise Absent("there is no result of peft to hold it against")
        method = LoRA(steps=6, rank=pair.rank, alpha=ALPHA)
        with on(scene, who):
            adapter: Any = method.attach(model, 0)
            try:
                parameters = adapter.masters.parameters
                with torch.no_grad():
                    for parameter, value in zip(parameters, pair.start, strict=True):
                        parameter.copy_(value)
                    for one in adapter.adapters.values():
                        one.refresh()
                told = pair.judged(gradients(task.loss(task.draw(0), text), parameters))
                adapter.restore()
                row, _ = scene.watch.steps(
                    lambda tick: adapter.adapt(task_of(scene.experiment, scene.known), tick), adapter.restore
                )
                row |= told | {
                    "path": describe_path(scene.paths(who)),
                    "trained": sum(p.numel() for p in parameters),
                    "peer": label,
                }
            finally:
                adapter.detach()
        if pair.milliseconds:
            row["ratio"] = pair.milliseconds / row["ms"]
        return row | scene.rates(row["ms"], step_work(scene, method, row["trained"]))

    return run


def start_of(index: int, parameter: Tensor) -> Tensor:
    """A value for the index-th of all A and B, near 1 / sqrt(its rows' length), rounded so that bfloat16 holds it."""
    value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * parameter.shape[1] ** -0.5
    return value.bfloat16().float().to(parameter.device)


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The loss and all gradients, one after the other, in float32."""
    found = torch.autograd.grad(loss, parameters)
    return torch.cat([loss.detach().float().reshape(1), *(g.float().flatten() for g in found)])


ROWS = {f"peft lora step {who}": step_row(who) for who in ("peft", "eager", "fused")}


def main() -> None:
    arguments = suite.parser("peers.peft", __doc__, minutes=4.0).parse_args()
    names = suite.chosen(list(ROWS), arguments.only)
    if arguments.list:
        print("\n".join(names))
        return
    from ..step_rows import attention
    from ..step_scene import real_scene, small_scene

    device = suite.device(arguments.check)
    about = record.environment(device, arguments.commit)

    def write(rows: list[Row]) -> None:
        if arguments.out:
            record.write(arguments.out, "peers", about, rows)

    try:
        need("peft", INSTALL)
    except Absent as error:
        absent: Row = {"row": "peft", "absent": str(error)}
        print(suite.line(absent), flush=True)
        write([absent])
        return
    scene = small_scene(device) if arguments.check else real_scene(device)
    attention(scene)  # which of the back ends our fast path takes
    suite.finish(suite.run(ROWS, names, Pair(scene, 3 if arguments.check else RANK), 60 * arguments.minutes, write))


if __name__ == "__main__":
    main()
