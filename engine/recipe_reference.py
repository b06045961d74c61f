"""The reference of every recipe key as a page of Markdown, made from the schema that recipes are checked by."""

import json
from collections.abc import Iterator
from typing import Any

HEAD = """# Every key of a recipe

Made from the schema that recipes are checked by, with `vidtta schema --markdown`; a test keeps this page up to date. A key is
written `section.key` in an override (`vidtta run recipes/lora.yaml sampler.steps=20`) and nested in the file. Keys that a recipe
leaves out have the default; an unknown key is refused. [guide.md](guide.md) begins at the beginning.
"""

Schema = dict[str, Any]


def recipe_reference(schema: Schema) -> str:
    """The page. schema: what `recipe_schema` returns."""
    types = schema["$defs"]
    top, sections = [], []
    for key, field in schema["properties"].items():
        held = _object(field, types)
        named = next(iter(field.get("patternProperties", {}).values()), {})
        if "$ref" in named:  # settings under names of the user's own
            inner = types[named["$ref"].rpartition("/")[2]]
            sections.append(f"## {key}\n\n{_sentence(inner)}\n\n{_table(_rows(inner, types, f'{key}.NAME.'))}")
            top.append((key, "settings by name, see below", field))
        elif held:
            sections.append(f"## {key}\n\n{field.get('description', '')}\n\n{_table(_rows(held, types, f'{key}.'))}")
        else:
            kind = (
                "a method, see below"
                if "oneOf" in field
                else "methods by name"
                if key == "arms"
                else _type(field, types)
            )
            top.append((key, kind, field))
    parts = [HEAD, _table(top), *sections, "## Methods\n\nOne under `method`, or several under `arms` by their names."]
    for kind, place in schema["properties"]["method"]["discriminator"]["mapping"].items():
        held = types[place.rpartition("/")[2]]
        rows = list(_rows(held, types, "", leave_out=("kind",)))
        parts.append(f"### kind: {kind}\n\n{_sentence(held)}" + (f"\n\n{_table(rows)}" if rows else ""))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _sentence(held: Schema) -> str:
    return " ".join(held.get("description", "").split())


def _object(field: Schema, types: Schema) -> Schema | None:
    """The mapping that a field holds, None where it holds a plain value; one that may also be null counts."""
    for choice in (field, *field.get("anyOf", ())):
        if "$ref" in choice and "properties" in (held := types[choice["$ref"].rpartition("/")[2]]):
            return held
    return None


def _rows(
    held: Schema, types: Schema, prefix: str, leave_out: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, Schema]]:
    """Key, type and field of each setting; those of a nested mapping follow it with its name in front."""
    for key, field in held["properties"].items():
        if key in leave_out:
            continue
        inner = _object(field, types)
        yield f"{prefix}{key}", "mapping" if inner else _type(field, types), field
        if inner:
            yield from _rows(inner, types, f"{prefix}{key}.")


def _type(field: Schema, types: Schema) -> str:
    """A type in words."""
    if "$ref" in field:
        return _type(types[field["$ref"].rpartition("/")[2]], types)
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    for word in ("anyOf", "oneOf"):
        if word in field:
            return " or ".join(dict.fromkeys(_type(choice, types) for choice in field[word]))
    if field.get("type") == "array":
        inner = field.get("items") or next(iter(field.get("prefixItems", [])), {})
        count = f"{field['minItems']} of " if "minItems" in field and field["minItems"] == field.get("maxItems") else ""
        return f"list of {count}{_type(inner, types)}" if inner else "list"
    named = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    words = named.get(field.get("type", ""), "mapping")
    if "minimum" in field:
        words += f", at least {field['minimum']}"
    return words


def _table(rows: Any) -> str:
    lines = ["| key | value | default | what it does |", "| --- | --- | --- | --- |"]
    for key, kind, field in rows:
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        told = " ".join(field.get("description", "").split())
        lines.append(f"| `{key}` | {_escape(kind)} | {_escape(default)} | {_escape(told)} |")
    return "\n".join(lines)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
