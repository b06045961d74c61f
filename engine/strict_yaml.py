"""YAML for settings: the core schema of YAML 1.2, read strictly, and written so that it reads back the same.

PyYAML follows YAML 1.1, where `1e-4` is text and `no` is false. Here `1e-4`, `1E5` and `.5` are numbers, only true and false
are booleans, keys are always text, a key given twice is a mistake, and anchors, aliases and tags do not exist (an alias can
make a small file expand without bound).
"""

import math
import re
from typing import Any

import yaml

MAX_BYTES = 1_000_000

# tag, pattern, the characters it may begin with. YAML 1.2.2, section 10.3.2.
CORE_SCHEMA = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  PyYAML's own attribute; filled below

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        refused = "an alias" if isinstance(event, yaml.AliasEvent) else "an anchor" if event.anchor else ""
        if refused or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem=f"{refused or 'a tag'} is not allowed in settings", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012
    # Line breaks to YAML 1.1 that PyYAML writes bare, and reads back as a line break of the file.
    odd_breaks = re.compile("[\x85\u2028\u2029]")

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.Node:
        style = '"' if self.odd_breaks.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)

    def represent_list(self, data: list) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


for _tag, _pattern, _first in CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})\Z"), _first)
_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_representer(list, _Dumper.represent_list)


def parse(text: str) -> Any:
    """Read one YAML document: mappings with text keys, lists, text, numbers, true, false and null.

    Raises ValueError with one sentence that names the line.
    """
    try:
        node = yaml.compose(text, _Loader)
        return None if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"the character U+{error.character:04X} is not allowed in YAML") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def dump(value: Any) -> str:
    """Write mappings in lines and lists in brackets; `parse` gives the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node)
    assert isinstance(node, yaml.ScalarNode)
    text = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return _integer(node)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key should be text", problem_mark=key.start_mark)
        if key.value in values:
            raise yaml.MarkedYAMLError(problem=f"the key {key.value} is given twice", problem_mark=key.start_mark)
        values[key.value] = _value(value)
    return values


def _integer(node: yaml.ScalarNode) -> int:
    digits, base = node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10)
    if len(digits) > 100:  # Python refuses to convert thousands of digits; no setting has so many
        raise yaml.MarkedYAMLError(problem="a number with more than 100 digits", problem_mark=node.start_mark)
    return int(digits, base)
