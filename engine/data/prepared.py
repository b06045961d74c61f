"""Whether a prepared clip is still the one that its manifest describes."""

from torch import Tensor

from ..errors import UserError
from ..files import sha256_tensor
from .clips import Clip


def check_prepared(clip: Clip, frames_F3HW: Tensor, fps: float) -> None:
    """Raise UserError where frames read as they were stored are not those whose hash the manifest has.

    frames: uint8. Clips without that hash, and clips read at another rate, length or size, pass: they have none to meet.
    """
    frames, _, height, width = frames_F3HW.shape
    stored = tuple(clip.meta.get(name, "") for name in ("frames", "fps", "size"))
    if clip.start or stored != (str(frames), f"{fps:g}", f"{width}x{height}"):
        return
    if sha256_tensor(frames_F3HW) != clip.meta.get("frames_sha256"):
        raise UserError(
            f"{clip.path}: its frames are not those of its manifest (frames_sha256), so the file was replaced; prepare it again"
        )
