"""A stand-in, not the official code: importing it makes the class known to the registry."""

from opensora.registry import MODELS  # type: ignore[import-not-found]


@MODELS.register_module()
class VideoEncoder:
    """Takes v1.3's settings; vidtta's VAE computes."""

    def __init__(self, **settings: object) -> None:
        self.settings = settings
