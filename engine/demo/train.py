"""Train the embedded default's models: first the autoencoder, then the transformer and its word table on the encoded clips.

Run: torchrun --nproc-per-node 2 -m vidtta.engine.demo.train --out DIR      (or python -m vidtta.engine.demo.train on one card)

Writes DIR/vae, DIR/dit and DIR/text in the published layout, with training.json: steps, losses, seconds, card. `--start-from` goes
on from such a folder with fresh optimizer moments and a schedule of its own; a part with 0 steps is taken over as it is. Sizes and
`norm_groups` are those of the shipped configuration; the trainings that led to the shipped weights are in the model card beside them.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..environment import describe_environment
from ..files import write_json, write_tensors
from ..models.checkpoint import load_strict, open_state, read_config
from ..models.load import EMBEDDED
from ..models.stdit3 import STDiT3, STDiT3Config
from ..models.vae import VAE, VAEConfig
from ..rundir import read_json
from ..text.encoder import TABLE_ROWS
from .train_dit import initialise, train_dit
from .train_vae import train_vae
from .training import Cards, Plan, save_pieces

TABLE = Path("text/table.safetensors")


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m vidtta.engine.demo.train", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument(
        "--start-from", type=Path, help="folder of an earlier training to go on from, with fresh moments"
    )
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--vae-batch", type=int, default=8, help="clips a step and card")
    parser.add_argument("--vae-lr", type=float, default=8e-4)
    parser.add_argument("--dit-steps", type=int, default=20000)
    parser.add_argument("--dit-batch", type=int, default=64, help="clips a step and card")
    parser.add_argument("--dit-lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end each part after so long, if its steps take longer"
    )
    parser.add_argument("--bank", type=int, default=8192, help="clips held encoded, a card")
    arguments = parser.parse_args()

    cards = Cards.join()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    vae = VAE(VAEConfig.from_dict(read_config(EMBEDDED / "vae")))
    dit = STDiT3(STDiT3Config.from_dict(read_config(EMBEDDED / "dit")))
    table = nn.Parameter(torch.randn(TABLE_ROWS + 1, dit.config.caption_channels) / 8)
    initialise(dit)
    earlier: dict = {}
    if source := arguments.start_from:
        load_strict(vae, open_state(source / "vae"), str(source))
        if (source / "dit").exists():
            load_strict(dit, open_state(source / "dit"), str(source))
            table.data.copy_(open_state(source / TABLE)["table"])
        earlier = read_json(source / "training.json") or {}
    vae, dit, table = vae.to(cards.device), dit.to(cards.device), nn.Parameter(table.data.to(cards.device))
    torch.manual_seed(cards.rank)
    record = earlier | {"environment": describe_environment(cards.device), "cards": cards.count}
    start = time.perf_counter()

    def logger(part: str, plan: Plan) -> Callable[[int, dict[str, float]], None]:
        record[part] = {"plan": {k: v for k, v in vars(plan).items() if v != math.inf}, "log": []}

        def log(step: int, figures: dict[str, float]) -> None:
            row = {"step": step, "seconds": round(time.perf_counter() - start, 1), **figures}
            record[part]["log"].append(row)
            if cards.rank == 0:
                print(part, json.dumps(row), flush=True)

        return log

    def save(part: str, module: nn.Module) -> None:
        if cards.rank == 0:
            save_pieces(module, arguments.out / part)
            write_json(arguments.out / part / "config.json", read_config(EMBEDDED / part))
            write_json(arguments.out / "training.json", record)

    if arguments.vae_steps:
        plan = Plan(arguments.vae_steps, arguments.vae_batch, arguments.vae_lr, minutes=arguments.minutes)
        train_vae(vae, plan, cards, logger("vae", plan))
    save("vae", vae)
    if arguments.dit_steps:
        plan = Plan(arguments.dit_steps, arguments.dit_batch, arguments.dit_lr, warmup=500, minutes=arguments.minutes)
        train_dit(dit, table, vae, plan, cards, logger("dit", plan), arguments.bank)
        save("dit", dit)
        if cards.rank == 0:
            write_tensors(arguments.out / TABLE, {"table": table.detach()})
    if cards.count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
