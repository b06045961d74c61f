"""What the official code imports and computes nothing with, replaced where it is not installed.

mmengine holds its classes by name, beartype checks types as functions are called, matplotlib draws a figure of timesteps that no
row asks for. Whatever computes (timm's MLP, einops) must be installed.
"""

import importlib.util
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from . import empty_module

Made = TypeVar("Made", bound=Callable[..., Any])


class Registry:
    """mmengine's registry as the official code uses it."""

    def __init__(self, name: str, **_: Any) -> None:
        self.name = name
        self.makers: dict[str, Callable[..., Any]] = {}

    def register_module(self, name: str | None = None) -> Callable[[Made], Made]:
        """Decorates a class or a function; under its own name, if no other is given."""

        def register(maker: Made) -> Made:
            self.makers[name or maker.__name__] = maker
            return maker

        return register

    def build(self, settings: dict[str, Any]) -> Any:
        """Call what `type` names with the other settings."""
        return self.makers[settings["type"]](**{key: value for key, value in settings.items() if key != "type"})


def unchecked(function: Made) -> Made:
    """beartype's decorator, which does not check."""
    return function


CONTENTS: dict[str, dict[str, Any]] = {
    "mmengine": {},
    "mmengine.registry": {"Registry": Registry},
    "beartype": {"beartype": unchecked},
    "beartype.typing": {name: getattr(typing, name) for name in typing.__all__},
    "matplotlib": {},
    "matplotlib.pyplot": {},
}
"""Modules and what they hold here, packages before what is in them."""


def put_in_place() -> None:
    """Have them importable: what is installed is used as it is."""
    packages = {name.partition(".")[0] for name in CONTENTS}
    missing = {name for name in packages if importlib.util.find_spec(name) is None}
    for name, contents in CONTENTS.items():
        if name.partition(".")[0] in missing:
            vars(empty_module(name)).update(contents)
