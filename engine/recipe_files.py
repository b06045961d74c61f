"""The layers of a recipe: its base files, the file itself and the overrides, merged into one mapping.

Knows YAML and files, not what the keys mean, and imports neither torch nor pydantic, so that listing recipes is quick.
"""

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import strict_yaml
from .errors import UserError

PACKAGED = Path(__file__).resolve().parents[1] / "recipes"

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One file, or all overrides together. name: how messages call it."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Layers:
    """From the first base to the overrides; a later layer has the last word. overrides: KEY -> as it was written."""

    name: str
    layers: list[Layer]
    overrides: dict[KeyPath, str]

    def merged(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for layer in self.layers:
            _drop_replaced(values, layer.values)
            _merge(values, layer.values)
        return values

    def writer(self, path: KeyPath) -> int:
        """The last layer that writes a key, -1 where none does."""
        return max((i for i, layer in enumerate(self.layers) if _contains(layer.values, path)), default=-1)

    def describe(self, path: KeyPath, message: str) -> str:
        """The sentence for a mistake at a key: the file that wrote it, the key, what is wrong, and the override at fault."""
        file, writer = self.name, self.writer(path) if path else -1
        if 0 <= writer < len(self.layers) - 1:
            file = self.layers[writer].name
        override = next((text for key, text in self.overrides.items() if path[: len(key)] == key), None)
        given = f" (given by the override {override})" if override else ""
        return ": ".join(filter(None, (file, ".".join(path), message))) + given


def list_recipes() -> list[tuple[str, str]]:
    """The packaged recipes: name and first comment line."""
    return [(path.stem, _first_comment(path)) for path in sorted(PACKAGED.glob("*.yaml"))]


def find_recipe(name: str, folder: Path | None = None) -> Path:
    """A file, relative to `folder` (by default the current directory), or else a packaged recipe (`demo`, `recipes/demo.yaml`).

    Raises UserError where there is neither.
    """
    path = Path(name) if folder is None else folder / name
    if path.is_file():
        return path
    packaged = PACKAGED / f"{name.removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    if packaged.parent == PACKAGED and packaged.is_file():
        return packaged
    names = [stem for stem, _ in list_recipes()]
    raise UserError(f"{path}: there is no such recipe{perhaps(path.stem, names)}; packaged ones are {', '.join(names)}")


def read_layers(path_or_name: str, overrides: Sequence[str] = ()) -> Layers:
    """Read a recipe, its bases and `key.sub=value` overrides. Raises UserError with the file and line at fault."""
    path = find_recipe(path_or_name)
    given = parse_overrides(overrides)
    values: dict[str, Any] = {}
    for key, text in given.items():
        _insert(values, key, _parse_override(text), text)
    return Layers(_name(path), [*_read_chain(path), Layer("", values)], given)


def parse_overrides(overrides: Sequence[str]) -> dict[KeyPath, str]:
    """Split overrides into their key and the whole text. Raises UserError for one that is not `key.sub=value`."""
    given: dict[KeyPath, str] = {}
    for text in overrides:
        key, equals, _ = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise UserError(f"override {text}: should read key.sub=value, for example sampler.steps=20")
        if path in given:
            raise UserError(f"override {text}: {key} is given twice; give it once")
        given[path] = text
    return given


def perhaps(word: str, known: Sequence[str]) -> str:
    """` (perhaps NAME)` where a known name is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (perhaps {close[0]})" if close else ""


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next((line.lstrip("#").strip() for line in lines if line.startswith("#")), "")


def _name(path: Path) -> str:
    return f"recipes/{path.name}" if path.parent == PACKAGED else str(path)


def _read_chain(path: Path) -> list[Layer]:
    """The file's bases, the first one first, and the file."""
    chain: list[Layer] = []
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        values = _read(path)
        base = values.pop("base", None)
        chain.insert(0, Layer(_name(path), values))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise UserError(f"{_name(path)}: base: should be the path of another recipe, was {base!r}")
        try:
            following = find_recipe(base, path.parent)
        except UserError as error:
            raise UserError(f"{_name(path)}: base: {error}") from error
        if following.resolve() in seen:
            raise UserError(f"{_name(path)}: base: {base} leads back to a file it is the base of; end the circle")
        path = following


def _read(path: Path) -> dict[str, Any]:
    name = _name(path)
    try:
        if path.stat().st_size > strict_yaml.MAX_BYTES:
            raise UserError(f"{name}: the file is {path.stat().st_size} bytes; a recipe has at most 1 MB")
        values = strict_yaml.parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    if not isinstance(values, dict):
        was = "empty" if values is None else "a list" if isinstance(values, list) else repr(values)[:60]
        raise UserError(f"{name}: should be a mapping of settings, was {was}")
    return values


def _parse_override(text: str) -> Any:
    try:
        return strict_yaml.parse(text.partition("=")[2])
    except ValueError as error:
        raise UserError(f"override {text}: {str(error).removeprefix('line 1: ')}") from error


def _insert(values: dict[str, Any], path: KeyPath, value: Any, text: str) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"override {text}: another override gives {key} a value; give one of the two")
    if path[-1] in values:
        raise UserError(f"override {text}: another override gives a key below it; give one of the two")
    values[path[-1]] = value


def _contains(values: Any, path: KeyPath) -> bool:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _merge(values: dict[str, Any], layer: dict[str, Any]) -> None:
    """Mappings merge, lists and scalars replace; so does a mapping of another `kind`."""
    for key, value in layer.items():
        old = values.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_kind(old, value):
            _merge(old, value)
        else:
            values[key] = copy.deepcopy(value)


def _other_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "kind" in old and "kind" in new and old["kind"] != new["kind"]


def _drop_replaced(values: dict[str, Any], layer: dict[str, Any]) -> None:
    """`method` and `arms` are two ways to say one thing: whole arms, or a method with its kind, replace the other."""
    if "arms" in layer and "method" not in layer:
        values.pop("method", None)
    if "arms" not in layer and _contains(layer, ("method", "kind")):
        values.pop("arms", None)
