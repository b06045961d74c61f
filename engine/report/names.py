"""How a report calls the scores (title, unit, digits) and the placebos."""

from ..arms import PLACEBOS

PLACEBO_NAMES = {str(name): text for name, text in PLACEBOS.items()}

NAMES = {
    "psnr": ("PSNR", "dB", 2),
    "ssim": ("SSIM", "", 4),
    "lpips": ("LPIPS", "", 4),
    "frame_psnr_error": ("frame-to-frame PSNR error", "dB", 2),
    "frame_ssim_error": ("frame-to-frame SSIM error", "", 4),
    "seam_error": ("seam error", "dB", 2),
    "chunk_seam_error": ("chunk seam error", "dB", 2),
    "warping_error_farneback": ("warping error (Farneback)", "dB", 2),
    "warping_error_raft": ("warping error (RAFT)", "dB", 2),
    "flow_error_farneback": ("flow error (Farneback)", "px", 3),
    "flow_error_raft": ("flow error (RAFT)", "px", 3),
}


def name_of(score: str) -> tuple[str, str, int]:
    """Title, unit and digits of a score; a score that is not listed keeps its own name."""
    return NAMES.get(score, (score, "", 4))
