"""The bench's comparison of devices: nothing between equal videos, something where one differs."""

import importlib.util

import torch
from vidtta.bench import metrics


def test_distance_is_zero_for_equal_videos_and_seen_where_one_pixel_differs(monkeypatch):
    pred, truth = metrics.videos(32, 40)
    assert metrics.distance((pred, truth), (pred.clone(), truth.clone())) == 0
    other = pred.clone()
    other[:, 3, 8:16, 8:16] = 0.5
    assert metrics.distance((pred, truth), (other, truth)) > metrics.TOLERANCE


def test_without_opencv_the_flow_is_left_out(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cv2" else found(name, *rest))
    assert metrics.flows() == ("none",)
    pred, truth = metrics.videos(32, 40)
    assert metrics.distance((pred, truth), (pred, truth)) == 0
    assert torch.isfinite(pred).all()
