"""Choosing the path of each kind of work: the recipe's word, else what this run directory holds, else measured.

Measured once, on the card, on the recipe's own shapes: by the table beside this file where it knows card, network and shapes
(path_table.py makes it from the benches' results), else here, on the last layers of the network with a random clip. What is
faster and agrees with the plain path is taken. What the table or the recipe names is tried the same way before the first clip,
and what a recipe names is refused in one sentence where it cannot run. Attention is measured here always: it takes seconds.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..kernels.attention import MEASURED, PACKAGES, SDPA, Choice, Shape, choose, measure, self_attention_shapes
from ..kernels.windows import Grid
from .choices import WORKS, Choices, Way, Work, allowed_ways, merged
from .clip import Experiment
from .errors import UserError
from .files import write_json, write_json_once
from .measure_paths import RUNS, Row, measure_ways
from .methods import AnyMethod, Delta, DeltaClosedForm, FullFineTuning, LoRA
from .models.settings import ModelSettings
from .path_table import fastest_known
from .rundir import RunDirectory, read_json


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
    methods: Iterable[AnyMethod],
    diagnostics: bool,
    describe: Callable[[Choices], dict[str, Any]],
    say: Callable[[str], None] = lambda text: None,
) -> Choices:
    """The choices of a run directory's tasks. methods: of the arms; diagnostics: as `works_of`; describe: what choices.json says beside
    what was measured; say: told what is going on.

    Writes choices.json where anything was measured or tried: the first of several tasks does, the others take its choices.
    Raises UserError for what was asked for and cannot run here.
    """
    device, methods = experiment.dit.device, list(methods)
    works = works_of(methods, diagnostics)
    lora = next((method for method in methods if isinstance(method, LoRA)), LoRA(rank=16))
    found = merged(_stored(root, device), settings, device.type == "cuda")
    chosen, rows = _complete(found, settings, experiment, works, lora, say)
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
    """The choices that a run directory holds for a device of this kind and this determinism (attention was chosen under it)."""
    held = read_json(root / "choices.json")
    if held is None or str(held.get("device", "")).startswith("cpu (") != (device.type == "cpu"):
        return None
    if held.get("deterministic") not in (None, torch.are_deterministic_algorithms_enabled()):
        return None
    return Choices.from_json(held)


def _fits(settings: ModelSettings, choices: Choices) -> bool:
    """Whether the attention of choices is what a recipe asks for."""
    if settings.attention == "auto":
        return "attention" in choices.why
    return (choices.attention.pinned if choices.attention else "torch") == settings.attention


def _complete(
    found: Choices,
    settings: ModelSettings,
    experiment: Experiment,
    works: tuple[Work, ...],
    lora: LoRA,
    say: Callable[[str], None],
) -> tuple[Choices, list[Row]]:
    """Choices for all these works, and the rows that were measured for them. lora: what is trained to measure training."""
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
        else:
            chosen[work], why[work], more = _way(
                settings,
                experiment,
                work,
                ways,
                asked,
                attention=found.attention,
                cross=found.cross,
                lora=lora,
                say=say,
            )
            rows += more
    if found.features is None and "features" not in chosen:
        chosen["features"], why["features"] = (
            chosen.get("sampling") or found.sampling,
            "as sampling, nothing is fitted there",
        )
    layers = {chosen.get(work, found.way(work)) for work in WORKS if work != "vae"}
    if layers <= {"plain", None} and found.attention is not None and found.attention.pinned is None:
        found = replace(found, attention=None, cross=None)  # the plain path leaves attention to PyTorch
        why["attention"] = "torch's choice, as all layers are plain"
    return replace(found, **{str(work): way for work, way in chosen.items()}, why=why), rows


def _way(
    settings: ModelSettings,
    experiment: Experiment,
    work: Work,
    ways: tuple[Way, ...],
    asked: str,
    *,
    attention: Choice | None,
    cross: str | None,
    lora: LoRA,
    say: Callable[[str], None],
) -> tuple[Way, str, list[Row]]:
    """The way of one kind of work, why, and what was measured: the table's, if it runs here, else the fastest."""
    rows: list[Row] = []
    if known := fastest_known(experiment, work, ways):
        say(f"trying {known[0]} for {work}, {known[1]}")
        rows = measure_ways(experiment, work, (known[0],), attention, cross, lora)
        if "milliseconds" in rows[-1]:
            return *known, rows
    say(f"{'measuring' if len(ways) > 1 else 'trying'} {', '.join(ways)} for {work}")
    measured = measure_ways(experiment, work, ways, attention, cross, lora)
    why = "measured here, fastest" if len(ways) > 1 else asked
    return _pick(settings, work, ways, measured), why, rows + measured


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
    settings: ModelSettings,
    experiment: Experiment,
    works: tuple[Work, ...],
    measured: bool,
    say: Callable[[str], None],
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
    return choice, _cross(experiment, None), "measured here, fastest at each shape (of work that is not plain)", rows


def _cross(experiment: Experiment, pinned: str | None) -> str | None:
    """Attention to a caption must take any number of keys, with gradients, compiled: torch's flash on a GPU in 16 bits."""
    if pinned in SDPA and pinned != "cudnn":
        return pinned
    return "flash" if experiment.dit.device.type == "cuda" and experiment.dit.dtype != torch.float32 else None
