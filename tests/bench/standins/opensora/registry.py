"""A stand-in, not the official code, which names its classes to mmengine's registry as here."""

from mmengine.registry import Registry  # type: ignore[import-not-found]

MODELS = Registry("model", locations=["opensora.models"])
