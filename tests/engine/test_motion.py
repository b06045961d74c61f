"""Measures of motion against scikit-image, plain loops, and videos whose motion is known."""

import json
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from vidtta.engine import fetch
from vidtta.engine.errors import UserError
from vidtta.engine.metrics import (
    compute_optical_flow_error,
    compute_seam_jump,
    compute_temporal_consistency,
    score_motion,
)
from vidtta.engine.metrics.optical_flow import _raft_network, farneback, raft, require_flow
from vidtta.engine.metrics.temporal import relative, warping_error
from vidtta.engine.torchvision_ops import declare_missing_operators

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FRAMES, HEIGHT, WIDTH = 6, 64, 80
TEXTURE = torch.nn.functional.interpolate(
    torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    (HEIGHT + 40, WIDTH + 40),
    mode="bicubic",
)[0].clamp(-1, 1)


def moving(right: int, down: int = 0, offset: int = 15) -> Tensor:
    """A camera over a texture, whose content moves by (-right, -down) pixels a frame; [3, F, H, W]."""
    corners = [(offset + down * k, offset + right * k) for k in range(FRAMES)]
    return torch.stack([TEXTURE[:, y : y + HEIGHT, x : x + WIDTH] for y, x in corners], dim=1)


TRUTH = moving(2)
NOISE = torch.randn(TRUTH.shape, generator=torch.Generator().manual_seed(1))
VIDEOS = {
    "copy": TRUTH,
    "shifted": moving(2, offset=17),
    "a little noise": TRUTH + 0.02 * NOISE,
    "noise": TRUTH + 0.3 * NOISE,
    "half speed": moving(1),
    "backwards": moving(-2),
    "frozen": TRUTH[:, :1].expand_as(TRUTH),
    "grey": torch.zeros_like(TRUTH),
}


def errors(name: str) -> dict[str, float]:
    video = VIDEOS[name]
    found = {key: value["error"] for key, value in compute_temporal_consistency(video, TRUTH).items()}
    return found | {
        "flow": compute_optical_flow_error(video, TRUTH),
        "seam": compute_seam_jump(torch.cat([TRUTH[:, :1], video[:, 1:]], dim=1), TRUTH, 3)["error"],
    }


# Flow


@pytest.mark.parametrize("estimator", [farneback])
@pytest.mark.parametrize(("right", "down"), [(2, 0), (0, -2), (-1, 2)])
def test_the_flow_of_a_translation(estimator, right, down):
    flow = estimator(moving(right, down))
    assert (flow.shape, flow.dtype) == ((FRAMES - 1, 2, HEIGHT, WIDTH), torch.float32)
    inner = flow[:, :, 16:-16, 16:-16].mean(dim=(0, 2, 3))
    assert inner.tolist() == pytest.approx([-right, -down], abs=0.1)


def test_end_point_errors_of_known_motions():
    assert errors("copy")["flow"] == 0
    assert errors("frozen")["flow"] == pytest.approx(2, abs=0.15)  # the speed of the real video
    assert errors("half speed")["flow"] == pytest.approx(1, abs=0.15)
    assert errors("backwards")["flow"] == pytest.approx(4, abs=0.3)
    assert errors("shifted")["flow"] < 0.1


# Temporal consistency


def test_frame_changes_are_scikit_images():
    found = compute_temporal_consistency(VIDEOS["noise"], TRUTH)
    for video, which in ((VIDEOS["noise"], "pred"), (TRUTH, "truth")):
        images = [((frame.clamp(-1, 1).double() + 1) / 2).permute(1, 2, 0).numpy() for frame in video.unbind(1)]
        pairs = list(zip(images[1:], images[:-1], strict=True))
        psnr = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]
        ssim = [
            structural_similarity(
                x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=2
            )
            for x, y in pairs
        ]
        assert found["frame_psnr"][which] == pytest.approx(np.mean(psnr), abs=1e-9)
        assert found["frame_ssim"][which] == pytest.approx(np.mean(ssim), abs=1e-9)


def test_the_warping_error_is_scipys_interpolation():
    flow = torch.randn(FRAMES - 1, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2)) * 4
    unit = ((VIDEOS["noise"].clamp(-1, 1).double() + 1) / 2).numpy()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    expected = []
    for k in range(FRAMES - 1):
        to_x, to_y = x + flow[k, 0].double().numpy(), y + flow[k, 1].double().numpy()
        inside = (to_x >= 0) & (to_x <= WIDTH - 1) & (to_y >= 0) & (to_y <= HEIGHT - 1)
        fetched = [map_coordinates(channel[k + 1], [to_y, to_x], order=1, mode="nearest") for channel in unit]
        expected.append(((unit[:, k] - np.stack(fetched)) ** 2)[:, inside].mean())
    assert warping_error(VIDEOS["noise"], flow).tolist() == pytest.approx(expected, rel=1e-9)


def test_following_the_motion_leaves_no_error_and_where_all_leaves_the_frame_none_is_counted():
    flow = torch.zeros(FRAMES - 1, 2, HEIGHT, WIDTH)
    flow[:, 0] = -2
    assert warping_error(TRUTH, flow).max() < 1e-12
    assert warping_error(VIDEOS["frozen"], flow).min() > 1e-3
    assert warping_error(TRUTH, flow - 1000).tolist() == [0] * (FRAMES - 1)


def test_errors_of_single_steps_do_not_cancel():
    found = relative(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert found == {"pred": 2.0, "truth": 2.0, "error": 1.0}


def test_a_copy_is_best_and_neither_frozen_nor_grey_nor_flickering_videos_win():
    found = {name: errors(name) for name in VIDEOS}
    for measure, value in found["copy"].items():
        assert value == 0
        by_error = sorted(VIDEOS, key=lambda name: found[name][measure])
        assert by_error[0] == "copy", measure
        if measure != "frame_ssim":  # SSIM sees faint noise in flat places more than a frozen picture
            assert {"frozen", "grey"} <= set(by_error[-4:]), (measure, by_error)
    for measure in ("frame_psnr", "frame_ssim", "warping_psnr_farneback", "seam"):
        assert found["shifted"][measure] < found["noise"][measure]
        assert found["a little noise"][measure] < found["noise"][measure]
        assert found["shifted"][measure] < found["frozen"][measure]
    assert found["backwards"]["frame_psnr"] < 1  # as lively as the truth: only the flow tells
    assert found["backwards"]["warping_psnr_farneback"] > 10


# Seams


def test_a_jump_is_the_step_across_the_seam_beside_the_real_one():
    pred = TRUTH.clone()
    pred[:, 3:] = (pred[:, 3:] * 0.8) + 0.1
    jump = compute_seam_jump(pred, TRUTH, 3)
    unit = [((video[:, k].double() + 1) / 2).numpy() for video in (pred, TRUTH) for k in (2, 3)]
    expected = [peak_signal_noise_ratio(one, two, data_range=1) for one, two in (unit[:2], unit[2:])]
    assert [jump["pred"], jump["truth"]] == pytest.approx(expected, abs=1e-9)
    assert jump["error"] == pytest.approx(abs(expected[0] - expected[1]))
    assert compute_seam_jump(pred, TRUTH, 2)["error"] == 0
    for seam in (0, FRAMES):
        with pytest.raises(ValueError, match=f"seam is {seam}; it must be between 1 and 5"):
            compute_seam_jump(pred, TRUTH, seam)


# All of them


@pytest.mark.parametrize("device", DEVICES)
def test_scores_of_a_clips_motion(device):
    pred = torch.cat([TRUTH[:, :1], VIDEOS["noise"][:, 1:]], dim=1)
    scores = score_motion(pred.to(device), TRUTH.to(device), chunk_seams=[3], flow="farneback")
    assert list(scores) == [
        "frame_psnr_error",
        "frame_ssim_error",
        "seam_error",
        "chunk_seam_error",
        "warping_error_farneback",
        "flow_error_farneback",
    ]
    found = {name: value["error"] for name, value in compute_temporal_consistency(pred, TRUTH).items()}
    expected = {
        "frame_psnr_error": found["frame_psnr"],
        "frame_ssim_error": found["frame_ssim"],
        "seam_error": compute_seam_jump(pred, TRUTH, 1)["error"],
        "chunk_seam_error": compute_seam_jump(pred, TRUTH, 3)["error"],
        "warping_error_farneback": found["warping_psnr_farneback"],
        "flow_error_farneback": compute_optical_flow_error(pred, TRUTH),
    }
    assert {name: score["mean"] for name, score in scores.items()} == pytest.approx(expected, rel=1e-6)
    assert scores["flow_error_farneback"]["truth"] == pytest.approx(2, abs=0.15)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    without = score_motion(pred, TRUTH, chunk_seams=[], flow="none")
    assert list(without) == ["frame_psnr_error", "frame_ssim_error", "seam_error"]


def test_videos_that_do_not_move_or_differ_in_shape_are_refused():
    for measure in (compute_temporal_consistency, compute_optical_flow_error):
        with pytest.raises(ValueError, match="one frame does not move; give at least 2"):
            measure(TRUTH[:, :1], TRUTH[:, :1])
        with pytest.raises(ValueError, match="they must have one shape"):
            measure(TRUTH[:, 1:], TRUTH)


# RAFT and what may be missing


@pytest.fixture
def raft_file(tmp_path, monkeypatch):
    """Seeded random weights of RAFT in torch hub's folder under a name with their own hash; returns their network."""
    declare_missing_operators()
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    network = raft_small(weights=None).eval()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    _raft_network.cache_clear()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "made.pth")
    prefix = fetch.sha256_file(folder / "made.pth")[:8]
    (folder / "made.pth").rename(folder / f"raft_small_C_T_V2-{prefix}.pth")
    monkeypatch.setitem(fetch.HUB_FILES, "raft", f"raft_small_C_T_V2-{prefix}.pth")
    yield network
    _raft_network.cache_clear()


@torch.no_grad()
def test_raft_is_torchvisions_on_frames_continued_to_its_smallest_size(raft_file):
    video = moving(2)[:, :3]
    require_flow("raft")
    padded = np.pad(video.numpy(), ((0, 0), (0, 0), (0, 128 - HEIGHT), (0, 128 - WIDTH)), mode="edge")
    frames = torch.from_numpy(padded).transpose(0, 1)
    expected = torch.cat([raft_file(frames[k : k + 1], frames[k + 1 : k + 2])[-1] for k in range(2)])
    torch.testing.assert_close(raft(video), expected[:, :, :HEIGHT, :WIDTH], rtol=1e-3, atol=1e-3)
    assert compute_optical_flow_error(video, video, "raft") == 0


def test_a_missing_estimator_says_what_to_do(raft_file, monkeypatch):
    monkeypatch.setitem(fetch.HUB_FILES, "raft", "raft_small_C_T_V2-00000000.pth")
    with pytest.raises(UserError, match="is missing; run `vidtta fetch raft`"):
        require_flow("raft")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        UserError, match=r"^optical flow needs cv2, which does not import .* install opencv-python-headless$"
    ):
        require_flow("farneback")
