"""What shapes the prepared clips. The same source and settings give the same bytes."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["ucf101", "folder"]
Aspect = Literal["crop", "pad"]
Start = Literal["beginning", "middle"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which clips are taken and how they are cut."""

    count: int | None = 2000
    """Clips to choose, as evenly over the classes as they allow; None takes all."""

    seed: int = 0
    """Decides which clips are chosen."""

    replace: bool = False
    """Choose another clip for each that is rejected, while there are any."""

    height: int = 480
    """Pixels, a multiple of 8."""

    width: int = 640
    """Pixels, a multiple of 8."""

    fps: float = 24.0
    """Frames a second, taken by the source's time stamps."""

    frames: int = 45
    """Frames of a clip."""

    conditioning_frames: int = 22
    """How many of them a method may see; written into the manifest, nothing is cut by it."""

    aspect: Aspect = "crop"
    """crop fills the frame and cuts what stands out, around the centre; pad shows all of the picture between black bars."""

    start: Start = "beginning"
    """Where in the source the clip begins: at its first picture, or so that its middle is the source's."""

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is {self.count}; it must be at least 1")
        for name, value in (("height", self.height), ("width", self.width)):
            if value <= 0 or value % 8:
                raise ValueError(f"{name} is {value}; it must be a positive multiple of 8")
        if not 1 <= self.fps <= 240:
            raise ValueError(f"fps is {self.fps:g}; it must be from 1 to 240")
        if not 0 < self.conditioning_frames < self.frames:
            raise ValueError(
                f"conditioning_frames is {self.conditioning_frames}; it must be at least 1 and below frames ({self.frames})"
            )
