"""Choosing the path of each kind of work: the recipe's word, else what this run directory holds, else measured.

Measured once, on the card, on the recipe's own shapes: by the table beside this file where it knows card, network and shapes
(path_table.py makes it from the benches' results), else here, on the first layers of the network with a random clip. What is
faster and agrees with the plain path is taken; what is asked for by name is tried the same way before the first clip, and
refused in one sentence where it cannot run. Attention is measured here always: it takes seconds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import MEASURED, PACKAGES, SDPA, Choice, Shape, choose, measure, self_attention_shapes
from ..kernels.windows import Grid
from .choices import WORKS, Choices, Way, Work, allowed_ways, merged, paths_of, use_vae_way
from .clip import Experiment
from .errors import UserError
from .files import write_json, write_json_once
from .methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA
from .methods.none import NoAdapter
from .models.load import ModelSettings
from .models.paths import use_paths
from .models.stdit3 import Caption, Condition
from .models.vae import CHUNK_FRAMES, CHUNK_LATENTS
from .models.vae_fast import use_plain
from .path_table import fastest_known
from .rundir import RunDirectory, read_json
from .seeds import normal

LAYERS = 8  # of the network, spatial and temporal in turn, that a way is measured on
RUNS = 5
TOKENS = 60  # of the caption
LARGEST_DISTANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}
"""From the plain path's result, relative L2; its gradients may lie twice as far."""

Row = dict[str, Any]


def works_of(methods: Iterable[AnyMethod], diagnostics: bool) -> tuple[Work, ...]:
    """The kinds of work whose way matters to a run with these methods. diagnostics: whether losses are looked at while adapting."""
    methods = list(methods)
    training = any(isinstance(method, FullFineTuning | LoRA) for method in methods)
    features = diagnostics or any(
        isinstance(method, Delta | DeltaClosedForm)
        or getattr(method, "cache_prefix", False)
        or getattr(method, "early_stopping", None)
        for method in methods
    )
    unused = {"training": not training, "features": not features}
    return tuple(work for work in WORKS if not unused.get(work))


def choose_paths(
    settings: ModelSettings,
    experiment: Experiment,
    root: Path,
    *,
    works: tuple[Work, ...],
    describe: Callable[[Choices], dict[str, Any]],
    say: Callable[[str], None] = lambda text: None,
) -> Choices:
    """The choices of a run directory's tasks. works: of `works_of`; describe: what choices.json says beside what was measured; say:
    told what is going on. Writes choices.json where anything was measured: the first of several tasks does, the others take
    its choices. Raises UserError for what was asked for and cannot run here.
    """
    device = experiment.dit.device
    found = merged(_stored(root, device), settings, device.type == "cuda")
    chosen, rows = _complete(found, settings, experiment, works, say)
    if not rows:
        return chosen
    path = root / "choices.json"
    value = {**describe(chosen), "measured": rows}
    if write_json_once(path, value):
        return chosen
    held = _stored(root, device)
    meanwhile = merged(held, settings, device.type == "cuda")
    if all(meanwhile.way(work) for work in works) and _fits(settings, meanwhile):
        return meanwhile
    # It held other choices than this recipe takes, or none for a work that no arm needed before. While there are results the
    # others stay: those who go on with them need them, and this run is refused when its results are looked for.
    if (held is not None and _adds_to(held, chosen)) or not RunDirectory(root).count_results():
        earlier = (read_json(path) or {}).get("measured", [])
        write_json(path, value | {"measured": [*earlier, *rows]})
    return chosen


def _adds_to(held: Choices, chosen: Choices) -> bool:
    """Whether choices are those of a run directory and more."""
    same = (held.attention, held.cross) == (chosen.attention, chosen.cross)
    return same and all(held.way(work) in (None, chosen.way(work)) for work in WORKS)


def _stored(root: Path, device: torch.device) -> Choices | None:
    """The choices that a run directory holds for a device of this kind."""
    held = read_json(root / "choices.json")
    if held is None or str(held.get("device", "")).startswith("cpu (") != (device.type == "cpu"):
        return None
    return Choices.from_json(held)


def _fits(settings: ModelSettings, choices: Choices) -> bool:
    """Whether the attention of choices is what a recipe asks for."""
    if settings.attention == "auto":
        return "attention" in choices.why
    return (choices.attention.pinned if choices.attention else "torch") == settings.attention


def _complete(
    found: Choices, settings: ModelSettings, experiment: Experiment, works: tuple[Work, ...], say: Callable[[str], None]
) -> tuple[Choices, list[Row]]:
    """Choices for all these works, and the rows that were measured for them."""
    gpu, rows = experiment.dit.device.type == "cuda", []
    allowed: dict[Work, tuple[Way, ...]] = {work: allowed_ways(settings, work, gpu) for work in WORKS}
    why = dict(found.why)
    if not _fits(settings, found):
        plain = all(set(ways) == {"plain"} for ways in allowed.values())
        attention, cross, why["attention"], more = _attention(settings, experiment, works, gpu and not plain, say)
        found = replace(found, attention=attention, cross=cross)
        rows += more
    chosen: dict[Work, Way | None] = {}
    for work, ways in allowed.items():
        if found.way(work) is not None:
            continue
        asked = "the recipe" if settings.kernels != "auto" or settings.compile != "auto" else ""
        if ways == ("plain",):
            chosen[work], why[work] = "plain", asked or "auto on a CPU"
        elif work not in works:
            continue
        elif len(ways) > 1 and (known := fastest_known(experiment, work, ways)):
            chosen[work], why[work] = known
        else:
            say(f"{'measuring' if len(ways) > 1 else 'trying'} {', '.join(ways)} for {work}")
            measured = measure_ways(experiment, work, ways, found.attention, found.cross)
            rows += measured
            chosen[work] = _pick(settings, work, ways, measured)
            why[work] = "measured here, fastest" if len(ways) > 1 else asked
    if found.features is None and "features" not in chosen:
        chosen["features"], why["features"] = (
            chosen.get("sampling") or found.sampling,
            "as sampling, nothing is fitted there",
        )
    return replace(found, **{str(work): way for work, way in chosen.items()}, why=why), rows


def _pick(settings: ModelSettings, work: Work, ways: tuple[Way, ...], rows: list[Row]) -> Way:
    """The fastest way of those measured; raises UserError where none ran."""
    good = [row for row in rows if row["way"] in ways and "milliseconds" in row]
    if good:
        return min(good, key=lambda row: row["milliseconds"])["way"]
    reasons = "; ".join(f"{row['way']}: {row['refused']}" for row in rows if row["way"] in ways)
    raise UserError(
        f"model.kernels was {settings.kernels} (model.compile {settings.compile}), which cannot run here for {work} "
        f"({reasons}); take model.kernels: auto or plain"
    )


def shapes_of(experiment: Experiment, works: tuple[Work, ...]) -> list[tuple[Shape, bool]]:
    """The shapes of self-attention that a run meets, each with whether gradients are taken there."""
    config, window = experiment.dit.config, experiment.window
    heads, dim = config.num_heads, config.hidden_size // config.num_heads
    rows, cols = (-(-side // 16) for side in experiment.pixel_size)
    known, whole = Grid(window.known_latents, rows, cols), Grid(window.latent_frames, rows, cols)
    batches = {1, 3} if experiment.adaptation.adapted_branches == "all" else {1, 2}
    found = [(1, known, False), *((batch, whole, False) for batch in sorted(batches))]
    if "training" in works:
        found.append((1, known, True))
    return [(shape, grad) for batch, grid, grad in found for shape in self_attention_shapes(batch, grid, heads, dim)]


def _attention(
    settings: ModelSettings, experiment: Experiment, works: tuple[Work, ...], measured: bool, say: Callable[[str], None]
) -> tuple[Choice | None, str | None, str, list[Row]]:
    """The choice of attention, that of attention to a caption, why, and what was measured."""
    name = settings.attention
    if name == "torch" or (name == "auto" and not measured):
        return None, None, "the recipe" if name == "torch" else "auto without measuring", []
    device, dtype = experiment.dit.device, experiment.dit.dtype
    backends = MEASURED if name == "auto" else (name,)
    say(f"{'measuring' if name == 'auto' else 'trying'} attention: {', '.join(backends)}")
    rows: list[Row] = []
    for grad in (False, True):
        # Inside a compiled step with gradients only torch's own can be traced.
        compiles = settings.kernels != "plain" and settings.compile in ("auto", "all", "training")
        tried = [b for b in backends if b not in PACKAGES or not (grad and compiles)]
        shapes = list(dict.fromkeys(shape for shape, with_grad in shapes_of(experiment, works) if with_grad == grad))
        rows += measure(shapes, device, dtype, training=grad, backends=tried, runs=RUNS)
        rows += [
            {"shape": s.key, "backend": b, "training": grad, "refused": "cannot be compiled with gradients"}
            for s in shapes
            for b in backends
            if b not in tried
        ]
    refused = [row for row in rows if "refused" in row]
    if name != "auto":
        if refused:
            raise UserError(
                f"model.attention was {name}, which does not run here at shape {refused[0]['shape']} "
                f"({'training' if refused[0]['training'] else 'sampling'}: {refused[0]['refused']}); take auto or torch"
            )
        return Choice(pinned=name), _cross(experiment, name), "the recipe", rows
    choice = choose(rows)
    missing = [
        shape.key
        for shape, grad in shapes_of(experiment, works)
        if shape.key not in (choice.training if grad else choice.forward)
    ]
    if missing:
        return None, None, f"torch's choice, as none of {', '.join(backends)} runs at {missing[0]}", rows
    return choice, _cross(experiment, None), "measured here, fastest at each shape", rows


def _cross(experiment: Experiment, pinned: str | None) -> str | None:
    """Attention to a caption must take any number of keys, with gradients, compiled: torch's flash on a GPU in 16 bits."""
    if pinned in SDPA and pinned != "cudnn":
        return pinned
    return "flash" if experiment.dit.device.type == "cuda" and experiment.dit.dtype != torch.float32 else None


def measure_ways(
    experiment: Experiment, work: Work, ways: tuple[Way, ...], attention: Choice | None, cross: str | None
) -> list[Row]:
    """A row for each way of a kind of work: milliseconds (of a few layers, or of a VAE chunk), seconds of the first call, relative
    distance from the plain path; or why there are none. One way alone is tried, not timed. Plain JSON."""
    truth, rows = None, []
    for way in dict.fromkeys(("plain", *ways)):
        row: Row = {"work": work, "way": way}
        try:
            with _in_force(experiment, work, way, attention, cross), _example(experiment, work) as call:
                start = _now(experiment)
                result = call().detach().float()
                row["first_s"] = _now(experiment) - start
                if truth is None:
                    truth = result
                row["distance"] = ((result - truth).norm() / truth.norm()).item()
                allowed = LARGEST_DISTANCE[experiment.dit.dtype] * (2 if work == "training" else 1)
                if not row["distance"] <= allowed:
                    raise ArithmeticError(
                        f"relative distance {row['distance']:.3g} from the plain path, allowed {allowed}"
                    )
                row["milliseconds"] = _median_ms(experiment, call) if len(ways) > 1 else 0.0
        except Exception as error:  # each way fails in ways of its own; whoever asked for it is told
            row.pop("milliseconds", None)
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        gc.collect()
        if experiment.dit.device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
    return rows if "plain" in ways else rows[1:]


def _now(experiment: Experiment) -> float:
    if experiment.dit.device.type == "cuda":
        torch.cuda.synchronize(experiment.dit.device)
    return time.perf_counter()


def _median_ms(experiment: Experiment, call: Callable[[], Tensor]) -> float:
    call()
    times = []
    for _ in range(RUNS):
        start = _now(experiment)
        call()
        times.append(1e3 * (_now(experiment) - start))
    return statistics.median(times)


@contextmanager
def _in_force(
    experiment: Experiment, work: Work, way: Way, attention: Choice | None, cross: str | None
) -> Iterator[None]:
    """Inside, one kind of work is computed in one way."""
    before = experiment.dit.paths
    if work == "vae":
        use_vae_way(experiment.vae, way)
    else:
        use_paths(experiment.dit, paths_of(way, attention, cross))
    try:
        yield
    finally:
        use_paths(experiment.dit, before)
        if work == "vae" and way != "plain":
            use_plain(experiment.vae)


@contextmanager
def _example(experiment: Experiment, work: Work) -> Iterator[Callable[[], Tensor]]:
    """A call that does a kind of work on a random clip at the recipe's shapes, under the paths in force."""
    if work == "vae":
        with torch.no_grad():
            yield partial(_vae_chunk, experiment)
        return
    dit, window = experiment.dit, experiment.window
    count = min(LAYERS, len(dit.layers))
    first = len(dit.layers) - count
    adapter = NoAdapter()
    if work == "training":
        rank = min(16, dit.config.hidden_size)
        adapter = LoRA(rank=rank, last_layers=count).attach(dit, 0)
    try:
        frames = window.latent_frames if work == "sampling" else window.known_latents
        batch = 3 if work == "sampling" else 1
        size = (experiment.pixel_size[0] // 8, experiment.pixel_size[1] // 8)
        known = window.known_latents if work == "sampling" else min(experiment.adaptation.context_latents, frames - 1)
        geometry = dit.geometry(frames, size, experiment.pixel_size, tuple(range(known)))
        shape = (batch, dit.config.in_channels, frames, *size)
        latents, mask = normal(shape, 0, "", "paths").to(dit.device, dit.dtype), torch.zeros(shape, device=dit.device)
        mask[:, :, :known] = 1
        null: Tensor = dit.y_embedder.y_embedding  # type: ignore[assignment]
        with torch.no_grad():
            t, fps = (torch.full((batch,), value, device=dit.device) for value in (600.0, window.fps))
            state = dit.embed(latents, t, fps, geometry, Condition(latents * mask, mask.to(dit.dtype)))
            text = dit.text_states(Caption(null[None, :TOKENS].expand(batch, -1, -1)))
            known_text = dit.text_states(Caption(null[None, :TOKENS]))

        def call() -> Tensor:
            if not isinstance(adapter, NoAdapter):
                tokens = dit.run_layers(state, text, known_text, geometry, first).tokens
                parameters = adapter.masters.parameters
                grads = torch.autograd.grad(tokens.float().square().mean(), parameters)
                return torch.cat([grad.flatten() for grad in grads])
            with torch.no_grad():
                return dit.run_layers(state, text, known_text, geometry, first).tokens

        yield call
    finally:
        adapter.detach()


def _vae_chunk(experiment: Experiment) -> Tensor:
    """Encode a chunk's frames and decode a chunk's latents; both results in one row of numbers."""
    vae, (height, width) = experiment.vae, experiment.pixel_size
    frames = min(CHUNK_FRAMES, experiment.window.encoded_frames)
    pixels = normal((1, 3, frames, height, width), 0, "", "pixels").clamp(-1, 1).to(experiment.dit.device)
    latents = normal((1, vae.config.z_channels, CHUNK_LATENTS, height // 8, width // 8), 0, "", "paths")
    found = vae.encode(pixels), vae.decode(latents.to(experiment.dit.device))
    return torch.cat([tensor.float().flatten() for tensor in found])
