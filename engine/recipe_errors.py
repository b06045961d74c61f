"""One sentence for what pydantic finds wrong with a recipe: the key, what it should be, what it was."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from pydantic_core import ErrorDetails

from .methods import METHODS
from .methods.parts import Parts
from .recipe_files import KeyPath, perhaps

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}
# Keys of a method that hold a mapping of their own.
NESTED = {name for name, hint in get_type_hints(Parts).items() if any(map(is_dataclass, get_args(hint)))}


def explain(errors: list[ErrorDetails], values: dict[str, Any], recipe_type: type) -> list[tuple[KeyPath, str]]:
    """Each mistake once, as its key and what is wrong; unknown keys first, as they explain missing ones."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_path(error), []).append(error)
    order = sorted(by_path.items(), key=lambda item: item[1][0]["type"] != "unexpected_keyword_argument")
    return [_explain(path, same, values, recipe_type) for path, same in order]


def keys_of(section: KeyPath, values: dict[str, Any], recipe_type: type) -> tuple[str, list[str]]:
    """How messages call a section, and the keys it takes. section: () for the recipe, else of a mapping in `values`."""
    if not section:
        keys = [field.name for field in fields(recipe_type)]
        return "a recipe", sorted([*keys, "base", "method"])
    if section[0] == "arms":
        method = METHODS[values["arms"][section[1]]["kind"]]
        if len(section) > 2:
            part = next(part for part in get_args(get_type_hints(method)[section[2]]) if is_dataclass(part))
            return section[2], sorted(field.name for field in fields(part))
        return method.kind, sorted(field.name for field in fields(method))
    hint = get_type_hints(recipe_type)[section[0]]
    hint = next((part for part in get_args(hint) if is_dataclass(part)), hint)
    return section[0], sorted(field.name for field in fields(hint))


def _path(error: ErrorDetails) -> KeyPath:
    """The key at fault, without the names of union members that pydantic adds to it."""
    parts = list(error["loc"])
    depth = 2
    if parts[:1] == ["arms"]:
        del parts[2:3]  # the method's kind, or [key] for a bad name
        depth = 4 if len(parts) > 2 and parts[2] in NESTED else 3
    if error["type"] == "missing" and isinstance(parts[-1], int):
        parts.pop()  # a list that is too short is at fault, not the entry it lacks
    return tuple(str(part) for i, part in enumerate(parts) if i < depth or isinstance(part, int))


def _explain(path: KeyPath, same: list[ErrorDetails], values: dict[str, Any], recipe_type: type) -> tuple[KeyPath, str]:
    error, context = same[0], same[0].get("ctx", {})
    was = f"was {_shown(error['input'])}"
    match error["type"]:
        case "unexpected_keyword_argument":
            section, keys = keys_of(path[:-1], values, recipe_type)
            return path, f"unknown key{perhaps(path[-1], keys)}; {section} takes {', '.join(keys)}"
        case "missing" if isinstance(error["loc"][-1], str):
            return path, f"missing; write it in the recipe or give the override {'.'.join(path)}=..."
        case "missing":
            return path, f"should have {int(same[-1]['loc'][-1]) + 1} entries, had {len(error['input'])}"
        case "too_long":
            return path, f"should have {context['max_length']} entries, had {context['actual_length']}"
        case "union_tag_not_found":
            return (*path, "kind"), f"missing; it is one of {', '.join(METHODS)}"
        case "union_tag_invalid":
            tag = error["input"]["kind"]
            close = perhaps(str(tag), list(METHODS))
            return (*path, "kind"), f"should be one of {', '.join(METHODS)}, was {_shown(tag)}{close}"
        case "value_error":
            return path, str(context["error"])
        case "greater_than_equal":
            return path, f"should be at least {context['ge']}, {was}"
        case "string_too_short":
            return path, "should not be empty"
        case "string_pattern_mismatch":
            return path, "an arm's name becomes a folder: it should be made of letters, digits, _ and -"
    return path, f"should be {' or '.join(dict.fromkeys(map(_expected, same)))}, {was}"


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "literal_error":
        return error.get("ctx", {})["expected"]
    return EXPECTED.get(error["type"], error["msg"])


def _shown(value: Any) -> str:
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
