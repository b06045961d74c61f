"""Measures of a generated video against the real one."""

from .complexity import compute_complexity
from .optical_flow import compute_optical_flow_error
from .score import score_frames, score_motion
from .seam import compute_seam_jump
from .temporal import compute_temporal_consistency

__all__ = [
    "compute_complexity",
    "compute_optical_flow_error",
    "compute_seam_jump",
    "compute_temporal_consistency",
    "score_frames",
    "score_motion",
]
