"""The generated page of recipe keys."""

from pathlib import Path

from vidtta.engine import cli
from vidtta.engine.methods import METHODS
from vidtta.engine.recipe import recipe_schema
from vidtta.engine.recipe_reference import recipe_reference

PAGE = Path(__file__).resolve().parents[2] / "recipes" / "reference.md"


def test_the_page_is_up_to_date(capsys):
    assert cli.main(["schema", "--markdown"]) == 0
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out, (
        "a key changed: vidtta schema --markdown > recipes/reference.md"
    )


def test_every_key_of_the_schema_has_a_row():
    schema, page = recipe_schema(), PAGE.read_text(encoding="utf-8")
    for key, field in schema["properties"].items():
        refs = [choice["$ref"].rpartition("/")[2] for choice in (field, *field.get("anyOf", ())) if "$ref" in choice]
        held = schema["$defs"][refs[0]] if refs else {}  # a section that may be left out as well
        for name in [f"{key}.{inner}" for inner in held.get("properties", {})] or [key]:
            assert f"| `{name}` |" in page
    for kind, method in METHODS.items():
        section = page.partition(f"### kind: {kind}\n")[2].partition("\n### ")[0]
        for name in schema["$defs"][method.__name__]["properties"]:
            assert name == "kind" or f"| `{name}` |" in section
    assert all(line.count("|") == 5 for line in page.replace("\\|", "").splitlines() if line.startswith("|"))


def test_nested_and_optional_settings_and_types_in_words():
    inner = {"properties": {"weight": {"type": "number", "default": 0.5, "description": "How\nmuch."}}}
    method = {"properties": {"l2": {"anyOf": [{"$ref": "#/$defs/L2"}, {"type": "null"}], "default": None}}}
    section = {
        "properties": {
            "size": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
            "limit": {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "all"}]},
            "mode": {"enum": ["a|b", "c"]},
        }
    }
    schema = {
        "$defs": {"L2": inner, "M": method, "S": section},
        "properties": {
            "s": {"$ref": "#/$defs/S"},
            "method": {"oneOf": [], "discriminator": {"mapping": {"m": "#/$defs/M"}}},
        },
    }
    page = recipe_reference(schema)
    assert "| `s.size` | list of 2 of whole number |" in page
    assert "| `s.limit` | whole number, at least 1 or `all` |" in page
    assert "| `s.mode` | `a\\|b`, `c` |" in page
    assert "| `l2` | mapping | `null` |  |\n| `l2.weight` | number | `0.5` | How much. |" in page
