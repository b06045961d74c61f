"""A recipe: YAML at the edge, frozen types inside.

`load_recipe` reads a file, its bases and overrides, refuses what no setting reads, and gives a `Recipe`; the rest of the
program never sees the YAML. Each section's type stands beside the code that uses it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from . import strict_yaml
from .adaptation import AdaptationSettings
from .data.clips import Data
from .diagnostics import DiagnosticSettings
from .errors import UserError
from .gate import GateSettings
from .methods import METHODS, AnyMethod
from .models.settings import ModelSettings
from .recipe_checks import BASELINE, contradictions, unread, warnings
from .recipe_errors import explain
from .recipe_files import KeyPath, Layers, find_recipe, list_recipes, read_layers
from .sampler import SamplerSettings
from .search import Search
from .window import Window

__all__ = [
    "PromptSettings",
    "Recipe",
    "ScoreSettings",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "recipe_schema",
    "warnings",
]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """The sentences about quality and motion that follow every caption, as v1.3 was trained with."""

    aesthetic: float | None = 7.0
    """Aesthetic score, told in words (from 6.5 on excellent); null leaves the sentence out."""
    motion: float | None = None
    """Motion score, told in words (from 20 on extremely high); null leaves the sentence out."""
    camera_motion: str | None = None
    """Camera motion in words, for example pan left; null leaves the sentence out."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Which scores must be there."""

    lpips: Literal["required", "allow_missing"] = "required"
    """required: refuse to start without LPIPS's weights; allow_missing: leave its column empty."""
    flow: Literal["none", "farneback", "raft"] = "none"
    """Optical flow for the warping and end-point errors: farneback runs on the CPU, raft needs `vidtta fetch raft`."""


ArmName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment: every setting that shapes its results."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT  # the sections' own dataclasses inherit it

    output_dir: Annotated[str, Field(min_length=1)]
    """The run directory; tasks that share it share the work."""
    seed: Annotated[int, Field(ge=0)] = 0
    """All randomness of a clip follows from this, the clip and the purpose."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """The networks."""
    data: Data
    """The clips."""
    window: Window = field(default_factory=Window)
    """Which frames are known, which are scored."""
    prompt: PromptSettings = field(default_factory=PromptSettings)
    """What follows a caption."""
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    """How the continuation is sampled."""
    adaptation: AdaptationSettings = field(default_factory=AdaptationSettings)
    """What a method learns from."""
    arms: dict[ArmName, Annotated[AnyMethod, Field(discriminator="kind")]]
    """Methods to compare, by the name of their folder; one of kind none, called baseline, comes first."""
    placebos: tuple[ArmName, ...] = ()
    """Arms that also run as placebos: adapted on another clip, and changed at random by an equal norm."""
    search: Search | None = None
    """A grid over the settings of one arm."""
    gate: dict[ArmName, GateSettings] = field(default_factory=dict)
    """Arms that adapt only where a saved predictor foresees a gain: the arm's name, then `predictor` and `threshold`."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Continuations a clip and arm, from one adapted network and different noise; all are scored, the first is kept and shown."""
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    """How continuations are scored."""
    diagnostics: DiagnosticSettings = field(default_factory=DiagnosticSettings)
    """What is measured while adapting, beside the results."""
    keep: tuple[Literal["video", "latents", "adapter"], ...] = ("video",)
    """What is written beside each clip's scores."""


_ADAPTER = TypeAdapter(Recipe)


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, or the name of a packaged one. overrides: `key.sub=value`, the value in YAML.

    Raises UserError with one sentence: the file, the key, what is wrong.
    """
    layers = read_layers(path_or_name, overrides)
    values = layers.merged()
    single = _expand_method(values, layers)
    recipe = _validate(values, layers, single)
    problems: list[tuple[KeyPath, str]] = []
    inherited = False
    for row in unread(recipe):
        writer = layers.writer(row.key)
        if writer < 0:
            continue
        if writer >= max(layers.writer(tuple(cause.split("."))) for cause in row.causes):
            problems.append((row.key, f"nothing reads it: {row.why}; leave it out"))
        section, key = row.key
        values[section].pop(key, None)  # a later layer switched off what reads it: back to the default
        inherited = True
    if inherited:
        recipe = _validate(values, layers, single)
    _raise(layers, single, problems + contradictions(recipe))
    return _beside(recipe, find_recipe(path_or_name).parent)


def _beside(recipe: Recipe, folder: Path) -> Recipe:
    """Relative paths to data that are not in the working directory but are beside the recipe, as paths that lead there."""
    found = {
        name: str(folder / value)
        for name in ("clips", "captions")
        if (value := getattr(recipe.data, name)) and not Path(value).exists() and (folder / value).exists()
    }
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **found)) if found else recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key that is read written out; it loads again to an equal recipe."""
    values = _plain(dataclasses.asdict(recipe))
    for row in unread(recipe):
        section, key = row.key
        values[section].pop(key, None)
    return strict_yaml.dump({key: value for key, value in values.items() if value != {}})


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file. No key is required there but a method's kind: a base or an override may give the others."""
    schema = _ADAPTER.json_schema()
    types = schema["$defs"]
    documented = _inherited_descriptions()
    for name, definition in types.items():
        definition.pop("required", None)
        definition["additionalProperties"] = False  # as they are validated; pydantic below 2.14 leaves it out
        for key, text in documented.get(name, {}).items():
            definition["properties"][key].setdefault("description", text)
    for method in METHODS.values():
        types[method.__name__]["required"] = ["kind"]
    arms = schema["properties"]["arms"]
    arms["additionalProperties"] = schema["properties"]["gate"]["additionalProperties"] = False
    (method_schema,) = arms["patternProperties"].values()
    schema["properties"]["method"] = {"description": "The one method of a recipe without arms.", **method_schema}
    schema["properties"]["base"] = {
        "description": "A recipe that this one changes: a path relative to this file, or a packaged name.",
        "type": "string",
    }
    schema["not"] = {"required": ["method", "arms"]}
    del schema["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _expand_method(values: dict[str, Any], layers: Layers) -> bool:
    """Turn `method` into `arms`, add the baseline and the empty sections that have required keys; whether `method` was given."""
    single = "method" in values
    if single == ("arms" in values):
        if single:
            raise UserError(
                layers.describe(
                    ("method",),
                    "method and arms are both given; give one of them (the key of one arm is arms.NAME.KEY)",
                )
            )
        raise UserError(layers.describe((), f"a recipe needs a method (a kind: {', '.join(METHODS)}) or arms"))
    if single:
        method = values.pop("method")
        kind = method.get("kind") if isinstance(method, dict) else None
        values["arms"] = {kind if isinstance(kind, str) and kind in METHODS else "method": method}
    arms = values["arms"]
    if arms == {}:
        raise UserError(layers.describe(("arms",), "should name at least one arm, was empty"))
    if isinstance(arms, dict):
        plain = {name: arm for name, arm in arms.items() if isinstance(arm, dict) and arm.get("kind") == "none"}
        first = plain or ({} if BASELINE in arms else {BASELINE: {"kind": "none"}})
        values["arms"] = first | {name: arm for name, arm in arms.items() if name not in plain}
    values.setdefault("data", {})
    return single


def _validate(values: dict[str, Any], layers: Layers, single: bool) -> Recipe:
    try:
        # From JSON, pydantic's strict mode takes a list for a tuple, and still no text for a number.
        return _ADAPTER.validate_json(json.dumps(values))
    except ValidationError as error:
        _raise(layers, single, explain(error.errors(include_url=False), values, Recipe))
        raise


def _raise(layers: Layers, single: bool, problems: list[tuple[KeyPath, str]]) -> None:
    """Raise UserError for the first problem, in the user's own words: `method` where that was written."""
    if not problems:
        return
    path, message = problems[0]
    if single and path[0] == "arms":
        path = ("method", *path[2:])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise UserError(layers.describe(path, message) + more)


def _plain(value: Any) -> Any:
    """Tuples as lists, and a mapping's kind first."""
    if isinstance(value, dict):
        kind = {"kind": value["kind"]} if "kind" in value else {}
        return {key: _plain(item) for key, item in (kind | value).items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _inherited_descriptions() -> dict[str, dict[str, str]]:
    """Class name -> field -> the text after it in a base class; pydantic reads those of a class's own fields only."""
    found: dict[str, dict[str, str]] = {}
    for method in METHODS.values():
        for base in method.__mro__[1:]:
            if dataclasses.is_dataclass(base):
                holder = dataclasses.make_dataclass(
                    "Holder", [("base", base)], namespace={"__pydantic_config__": STRICT}
                )
                properties = TypeAdapter(holder).json_schema()["$defs"][base.__name__]["properties"]
                texts = {key: value["description"] for key, value in properties.items() if "description" in value}
                found[method.__name__] = texts | found.get(method.__name__, {})
    return cast(dict[str, dict[str, str]], found)
