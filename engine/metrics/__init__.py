"""Measures of a generated video against the real one."""

from .score import score_frames

__all__ = ["score_frames"]
