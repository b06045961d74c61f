"""What no single section of a recipe can know: keys that nothing reads, sections that contradict each other, warnings."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .adaptation import AdaptationSettings
from .arms import PLACEBOS
from .gate import check_gates
from .methods import Delta, DeltaClosedForm
from .methods import adapts as method_adapts
from .search import check_search

if TYPE_CHECKING:
    from .recipe import Recipe

BASELINE = "baseline"


@dataclass(frozen=True)
class Unread:
    """A key that nothing reads while `when` holds; `causes` are the keys that decide it."""

    key: tuple[str, str]
    causes: tuple[str, ...]
    when: Callable[["Recipe"], bool]
    why: str


def adapts(recipe: "Recipe") -> bool:
    """Whether any arm changes the network."""
    return any(map(method_adapts, recipe.arms.values()))


UNREAD = [
    *(
        Unread(
            ("adaptation", field.name),
            ("method.kind", "arms"),
            lambda r: not adapts(r),
            "every arm is of kind none, so nothing is adapted",
        )
        for field in fields(AdaptationSettings)
    ),
    Unread(
        ("adaptation", "context_latents"),
        ("adaptation.objective",),
        lambda r: r.adaptation.objective == "denoise",
        "with adaptation.objective: denoise no frame conditions",
    ),
    Unread(
        ("sampler", "force_steps"),
        ("sampler.oscillate_text", "sampler.oscillate_image"),
        lambda r: not (r.sampler.oscillate_text or r.sampler.oscillate_image),
        "with sampler.oscillate_text and sampler.oscillate_image off every step guides",
    ),
    Unread(
        ("sampler", "cache_first"),
        ("sampler.cache_every",),
        lambda r: r.sampler.cache_every == 1,
        "with sampler.cache_every: 1 every layer runs at every step",
    ),
    *(
        Unread(
            ("search", name),
            ("search.sampler",),
            lambda r: r.search is not None and r.search.sampler == "grid",
            "with search.sampler: grid every combination runs on every clip",
        )
        for name in ("trials", "startup_trials", "prune_p", "prune_after")
    ),
    Unread(
        ("search", "snapshots"),
        ("search.sampler",),
        lambda r: r.search is not None and r.search.sampler == "optuna",
        "Optuna's trials run one by one",
    ),
]


def unread(recipe: "Recipe") -> list[Unread]:
    """The rows of the table that hold for a recipe."""
    return [row for row in UNREAD if row.when(recipe)]


def contradictions(recipe: "Recipe") -> list[tuple[tuple[str, ...], str]]:
    """Where sections contradict each other: the key and what is wrong."""
    found: list[tuple[tuple[str, ...], str]] = []
    kinds = {name: method.kind for name, method in recipe.arms.items()}
    if kinds.get(BASELINE, "none") != "none":
        found.append((("arms", BASELINE), "the name is kept for the arm of kind none; give another"))
    for name in [name for name, kind in kinds.items() if kind == "none"][1:]:
        found.append((("arms", name), "one arm of kind none is enough, every other arm is compared with it"))
    adaptation, known = recipe.adaptation, recipe.window.known_latents
    if adapts(recipe) and adaptation.objective != "denoise" and adaptation.context_latents >= known:
        why = f"should be below the {known} latent frames that the window makes known, was {adaptation.context_latents}"
        found.append((("adaptation", "context_latents"), f"{why}; at least one must be left to predict"))
    for name, method in recipe.arms.items():
        try:
            method.check(adaptation)
        except ValueError as error:
            found.append((("arms", name), str(error)))
        if isinstance(method, Delta | DeltaClosedForm) and method.ranges > recipe.sampler.steps:
            why = f"should be at most sampler.steps ({recipe.sampler.steps}), was {method.ranges}"
            found.append((("arms", name, "ranges"), why))
    for name in recipe.placebos:
        if name not in recipe.arms or not method_adapts(recipe.arms[name]):
            adapting = [arm for arm, method in recipe.arms.items() if method_adapts(method)]
            found.append((("placebos",), f"names {name!r}, which is no arm that adapts; those are {adapting}"))
    if recipe.placebos and adaptation.reset != "clip":
        found.append(
            (("placebos",), f"need adaptation.reset to be clip, was {adaptation.reset}; leave one of the two out")
        )
    if len(set(recipe.placebos)) < len(recipe.placebos):
        found.append((("placebos",), f"should name each arm once, was {list(recipe.placebos)}"))
    if clash := [f"{n}-{p}" for n in recipe.placebos for p in PLACEBOS if f"{n}-{p}" in recipe.arms]:
        found.append((("placebos",), f"would make an arm named {clash[0]!r}, which arms already has; rename that arm"))
    if why := check_search(recipe):
        found.append((("search",), why))
    if why := check_gates(recipe):
        found.append((("gate",), why))
    return found


TRAINED_AREAS = (360 * 640, 720 * 1280)  # 360p and 720p: every aspect ratio of a bucket has about its area


def warnings(recipe: "Recipe") -> list[str]:
    """What is allowed, but was not what the published weights were trained for."""
    if recipe.model.dit.partition(":")[0] == "embedded":
        return []
    found = []
    data, window = recipe.data, recipe.window
    area = data.height * data.width
    if not any(abs(area / trained - 1) < 0.02 for trained in TRAINED_AREAS):
        found.append(f"{data.width}x{data.height} lies outside the sizes v1.3 was trained at (360p, 720p)")
    if window.model_frames % 16 != 1:
        frames = f"{window.model_frames} frames ({window.latent_frames} latents)"
        found.append(f"{frames} is a length v1.3 was not trained at")
    return found
