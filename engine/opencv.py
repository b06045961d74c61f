"""OpenCV, imported where it is first needed: its wheel wants system libraries that small machines lack."""

from types import ModuleType

from .errors import UserError


def import_cv2(purpose: str) -> ModuleType:
    """Return cv2; raises UserError that names the purpose where it does not import."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            f"{purpose} needs cv2, which does not import ({error}); install opencv-python-headless"
        ) from error
    return cv2
