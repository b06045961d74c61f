"""Which pixel frames are known, which are scored, and which latent frames that makes.

v1.3's VAE works in chunks of 17 pixel frames that overlap by one (5 latent frames each). The known frames are encoded alone,
so no latent has seen a frame that is to be predicted (the VAE's norms span a whole chunk: encoding the whole clip and slicing
would leak). Counting from 1, with 22 known frames: 1-17 make latent frames 0-4, 17-21 make 5-6; frame 22 would need a chunk it
shares with frames to be predicted, and is left out.
"""

from dataclasses import dataclass
from typing import Literal

from .models.vae import STRIDE, latent_frames


@dataclass(frozen=True, kw_only=True)
class Window:
    """The frames of a clip. Settings of a recipe; everything else is derived from them."""

    total_frames: int = 45
    """Frames read from a clip."""
    known_frames: int = 22
    """Frames the method may see; the others are scored."""
    model_frames: int = 49
    """Pixel frames the model generates: 16 k + 1 (49 for 45; what exceeds total_frames is dropped), or total_frames by name."""
    known_chunks: Literal["partial", "whole"] = "partial"
    """Encode known frames up to the last 4 k + 1 (22 -> 21 frames, 7 latents) or whole chunks only (22 -> 17 frames, 5 latents)."""
    posterior: Literal["mode", "sample"] = "mode"
    """Known latents: the mode of the VAE's posterior, or a sample (the official code samples)."""
    fps: float = 24.0
    """Frames a second that clips are resampled to."""
    scored_from: int | None = None
    """First scored frame, counted from 1; by default the one after the known frames."""

    def __post_init__(self) -> None:
        if not 1 <= self.known_frames < self.total_frames:
            raise ValueError(
                f"known_frames must be at least 1 and below total_frames ({self.total_frames}), was {self.known_frames}"
            )
        longer = self.total_frames + (1 - self.total_frames) % STRIDE
        if self.model_frames not in (longer, self.total_frames):
            raise ValueError(
                f"model_frames must be {longer} (the next 16 k + 1) or {self.total_frames} (total_frames itself), "
                f"was {self.model_frames}"
            )
        if self.model_frames % 4 != 1:
            raise ValueError(
                f"model_frames must be 4 k + 1, was {self.model_frames}: the VAE would drop the last frames"
            )
        if self.known_chunks == "whole" and self.known_frames < STRIDE + 1:
            raise ValueError(f"known_chunks: whole needs known_frames of at least 17, was {self.known_frames}")
        if self.fps <= 0:
            raise ValueError(f"fps must be positive, was {self.fps}")
        if self.scored_from is not None and not self.known_frames < self.scored_from <= self.total_frames:
            raise ValueError(
                f"scored_from must be after the known frames ({self.known_frames}) and at most {self.total_frames}, "
                f"was {self.scored_from}: a known frame may not be scored"
            )

    @property
    def encoded_frames(self) -> int:
        """Known frames that the VAE sees, from the first."""
        step = STRIDE if self.known_chunks == "whole" else 4
        return (self.known_frames - 1) // step * step + 1

    @property
    def known_latents(self) -> int:
        """Conditioning latent frames."""
        return latent_frames(self.encoded_frames)

    @property
    def latent_frames(self) -> int:
        """Latent frames that are sampled."""
        return latent_frames(self.model_frames)

    @property
    def scored(self) -> range:
        """Pixel frames that are scored, counted from 0."""
        first = self.known_frames if self.scored_from is None else self.scored_from - 1
        return range(first, self.total_frames)

    @property
    def generated(self) -> range:
        """Pixel frames that are decoded and shown: every one after the known frames, counted from 0."""
        return range(self.known_frames, self.total_frames)

    @property
    def chunk_seams(self) -> list[int]:
        """First generated pixel frames of a chunk of the VAE, counted from 0 (33 of 45: frame 34 does not share 33's chunk)."""
        return [frame for frame in range(STRIDE + 1, self.total_frames, STRIDE) if frame > self.known_frames]
