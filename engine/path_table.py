"""What was measured fastest on cards that the benches ran on: path_table.json, made from `bench/results/`.

Make it again: python -m vidtta.engine.path_table bench/results/steps-*.json

A row serves a run on the same card, with a network of the same size in the same dtype at the same shapes. The benches time whole
steps without deterministic algorithms; a recipe's default asks for these, which slows every way. torch.compile of the plain code may be
missing from a row: it lost to the kernels wherever it was timed.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import device_name

if TYPE_CHECKING:
    from .choices import Way, Work
    from .clip import Experiment

TABLE = Path(__file__).with_suffix(".json")
ROWS: dict[str, dict[str, tuple[str, ...]]] = {
    "training": {
        "plain": ("lora eager",),
        "compile": ("lora compiled",),
        "triton": ("lora fused, not compiled",),
        "triton + compile": ("lora fused",),
    },
    "features": {
        "plain": ("delta features eager",),
        "triton": ("delta features fused, not compiled",),
        "triton + compile": ("delta features fused",),
    },
    "sampling": {
        "plain": ("sample3 eager",),
        "compile": ("sample3 compiled",),
        "triton": ("sample3 fused, not compiled",),
        "triton + compile": ("sample3 fused",),
    },
    "vae": {
        "plain": ("vae encode plain", "vae decode plain"),
        "compile": ("vae encode last compiled", "vae decode last compiled"),
        "triton": ("vae encode last triton", "vae decode last triton"),
    },
}
"""The rows of bench.steps whose milliseconds add up to those of a way."""
COMPILING = 1.03
"""How much faster a compiled way must be to be taken."""
SHAPES = {"network": [28, 1152, 16], "dtype": "bfloat16", "size": [480, 640], "latents": [7, 15]}
"""What bench.steps runs at: depth, width and heads; height and width; known latent frames and all."""


def fastest_known(experiment: "Experiment", work: "Work", ways: "tuple[Way, ...]") -> "tuple[Way, str] | None":
    """The fastest of some ways on this card at these shapes and where that is known from; None where the table does not hold
    them, or not every way on the kernels."""
    config, window = experiment.dit.config, experiment.window
    wanted = {
        "device": device_name(experiment.dit.device),
        "network": [config.depth, config.hidden_size, config.num_heads],
        "dtype": str(experiment.dit.dtype).removeprefix("torch."),
        "size": list(experiment.pixel_size),
        "latents": [window.known_latents, window.latent_frames],
    }
    for row in json.loads(TABLE.read_text(encoding="utf-8")):
        if all(row[key] == value for key, value in wanted.items()):
            times: dict[str, float] = row["milliseconds"].get(work, {})
            timed: list[Way] = [way for way in ways if way in times]
            if len(timed) > 1 and all(way in times for way in ways if "triton" in way):
                # Compiling takes longer to start than a few per cent ever save.
                fastest: Way = min(timed, key=lambda way: times[way] * (COMPILING if "compile" in way else 1))
                return fastest, f"fastest in {' and '.join(row['from'])}"
    return None


def table_row(file: Path) -> dict[str, Any]:
    """A row of the table from one card's JSON of bench.steps; what was not measured, or failed its check, is left out."""
    results = json.loads(file.read_text(encoding="utf-8"))
    times = {row["row"]: row["ms"] for row in results["rows"] if "ms" in row and "error" not in row}
    found = {
        work: {
            way: round(sum(times[r] for r in rows), 1) for way, rows in ways.items() if all(r in times for r in rows)
        }
        for work, ways in ROWS.items()
    }
    environment = results["environment"]
    return {
        "device": environment["device"],
        **SHAPES,
        "from": [f"bench/results/{file.name}"],
        "torch": environment["packages"]["torch"],
        "milliseconds": found,
    }


def make_table(files: list[Path]) -> list[dict[str, Any]]:
    """A row for each card: files named `steps-CARD.json`."""
    return [table_row(file) for file in sorted(files)]


if __name__ == "__main__":
    TABLE.write_text(json.dumps(make_table([Path(f) for f in sys.argv[1:]]), indent=1) + "\n", encoding="utf-8")
