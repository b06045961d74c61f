import hashlib
import json
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from vidtta.engine import fetch
from vidtta.engine.errors import UserError
from vidtta.engine.metrics import score_frames
from vidtta.engine.metrics.lpips import LPIPS
from vidtta.engine.metrics.psnr import PSNR_CAP, mse, psnr
from vidtta.engine.metrics.ssim import ssim

from .tiny import save_alexnet

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WHY = "not asked for"


def videos(frames: int = 3, height: int = 40, width: int = 33, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """A smooth random video and a noisy copy of it that leaves [-1, 1] in places; [3, F, H, W] float64."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(frames, 3, 5, 5, generator=generator, dtype=torch.float64) * 2 - 1
    truth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").transpose(0, 1).clamp(-1, 1)
    pred = truth + noise * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    assert noise == 0 or pred.abs().max() > 1
    return pred, truth


def images(video: Tensor) -> list[np.ndarray]:
    """Frames as reference programs want them: [H, W, 3] in [0, 1]."""
    return [((frame.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy() for frame in video.unbind(1)]


# MSE and PSNR


def test_mse_and_psnr_of_a_known_difference():
    truth = torch.zeros(3, 2, 4, 4)
    pred = truth.clone()
    pred[:, 0] += 0.2  # 0.1 on [0, 1]
    pred[0, 1] += 0.6  # 0.3 on [0, 1], in one channel of three
    torch.testing.assert_close(mse(pred, truth), torch.tensor([0.01, 0.03], dtype=torch.float64), rtol=1e-6, atol=0)
    expected = torch.tensor([20.0, -10 * math.log10(0.03)], dtype=torch.float64)
    torch.testing.assert_close(psnr(pred, truth), expected, rtol=1e-6, atol=0)


def test_psnr_is_scikit_images():
    pred, truth = videos()
    expected = [peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(images(pred), images(truth), strict=True)]
    assert psnr(pred, truth).tolist() == pytest.approx(expected, abs=1e-9)


def test_equal_frames_have_the_capped_psnr_and_a_tiny_error_does_not_pass_it():
    _, truth = videos(frames=2)
    pred = truth.clone()
    pred[0, 1, 0, 0] -= 1e-5
    assert psnr(pred, truth).tolist() == [PSNR_CAP, PSNR_CAP] == [100.0, 100.0]
    assert psnr(torch.ones(3, 1, 2, 2), -torch.ones(3, 1, 2, 2)).item() == 0


def test_values_outside_the_range_count_as_its_ends():
    ones = torch.ones(3, 1, 12, 12)
    assert mse(5 * ones, ones).item() == 0
    assert mse(-5 * ones, ones).item() == 1
    assert ssim(5 * ones, ones).item() == pytest.approx(1, abs=1e-12)


# SSIM


@pytest.mark.parametrize("size", [(11, 11), (11, 30), (40, 33)], ids=str)  # one window; one row of windows; odd
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.5])
def test_ssim_is_scikit_images(size, noise):
    pred, truth = videos(3, size[0], size[1], noise)
    expected = [
        structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=2
        )
        for x, y in zip(images(pred), images(truth), strict=True)
    ]
    assert ssim(pred, truth).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_symmetric_one_for_equals_and_negative_for_inverted_texture():
    pred, truth = videos()
    assert ssim(pred, truth).tolist() == ssim(truth, pred).tolist()
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    texture = torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ssim(-texture, texture).item() < -0.5


def test_ssim_needs_a_whole_window():
    with pytest.raises(ValueError, match="frames are 10x30; SSIM needs at least 11x11"):
        ssim(torch.zeros(3, 1, 10, 30), torch.zeros(3, 1, 10, 30))


# LPIPS


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory):
    return save_alexnet(tmp_path_factory.mktemp("alexnet") / "weights.pth")


@pytest.fixture
def torch_hub(tmp_path, monkeypatch):
    """Torch hub's folder, empty and ours; a download from here fails the test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: pytest.fail("a download was tried"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def backbone(torch_hub, alexnet_file, monkeypatch):
    """Those weights in torch hub's folder: as torchvision names them, and as LPIPS should, with the hash that they have."""
    prefix = hashlib.sha256(alexnet_file.read_bytes()).hexdigest()[:8]
    (torch_hub / "alexnet-owt-7be5be79.pth").symlink_to(alexnet_file)
    path = torch_hub / f"alexnet-owt-{prefix}.pth"
    path.write_bytes(alexnet_file.read_bytes())
    monkeypatch.setitem(fetch.HUB_FILES, "lpips", path.name)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lpips_is_the_authors_package(backbone):
    import lpips

    pred, truth = (video.float().clamp(-1, 1) for video in videos(frames=10, height=40, width=64))  # more than a batch
    random_state = torch.get_rng_state()
    found = LPIPS()(pred, truth)
    assert torch.equal(torch.get_rng_state(), random_state)
    authors = lpips.LPIPS(net="alex", version="0.1", verbose=False)  # reads the file under torchvision's name
    with torch.no_grad():
        expected = [authors(pred[:, [i]].transpose(0, 1), truth[:, [i]].transpose(0, 1)).item() for i in range(10)]
    assert (found.shape, found.dtype) == ((10,), torch.float64)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.01
    assert len(set(expected)) == 10


def test_lpips_of_equal_frames_is_zero_and_values_outside_the_range_count_as_its_ends(backbone):
    pred, truth = videos(frames=1)
    distance = LPIPS()
    assert distance(truth, truth).item() == 0
    assert distance(pred, truth).item() == distance(pred.clamp(-1, 1), truth).item() > 0


def test_lpips_needs_frames_that_reach_the_last_layer(backbone):
    distance = LPIPS()
    with pytest.raises(ValueError, match="frames are 30x40; LPIPS needs at least 31x31"):
        distance(torch.zeros(3, 1, 30, 40), torch.zeros(3, 1, 30, 40))
    assert distance(torch.zeros(3, 1, 31, 31), torch.ones(3, 1, 31, 31)).item() > 0


def test_lpips_without_its_weights_says_what_to_run(torch_hub):
    path = torch_hub / "alexnet-owt-7be5be79.pth"
    reason = f"LPIPS needs AlexNet's weights: {path} is missing; run `vidtta fetch lpips`."
    assert LPIPS.available() == reason
    with pytest.raises(UserError) as caught:
        LPIPS()
    assert str(caught.value) == reason


def test_lpips_refuses_a_file_that_is_not_the_published_one(backbone):
    assert LPIPS.available() is None
    content = bytearray(backbone.read_bytes())
    content[len(content) // 2] ^= 1
    backbone.write_bytes(content)
    assert "is not the published file" in (LPIPS.available() or "")
    with pytest.raises(UserError, match="run `vidtta fetch lpips`"):
        LPIPS()


def test_lpips_without_its_package_says_so(backbone, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert LPIPS.available() == (
        "LPIPS needs the package lpips, which is not installed; install vidtta with its dependencies."
    )


def test_lpips_leaves_the_convolution_precision_as_it_was(backbone, monkeypatch):
    convolution = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue] (set at run time)
    distance, seen, before = LPIPS(), [], convolution.fp32_precision
    pred, truth = videos(frames=1)
    distance(pred, truth)
    distance._network.register_forward_pre_hook(lambda *_: seen.append(convolution.fp32_precision))  # pyright: ignore
    distance(pred, truth)
    assert (seen, convolution.fp32_precision) == (["ieee"], before)


# All of them


@pytest.mark.parametrize("device", DEVICES)
def test_scores_of_a_clip(device, backbone):
    pred, truth = (video.float().to(device) for video in videos())
    scores = score_frames(pred.requires_grad_(), truth, lpips=LPIPS())
    assert list(scores) == ["psnr", "mse", "ssim", "lpips"]
    for name, measure in {"psnr": psnr, "mse": mse, "ssim": ssim, "lpips": LPIPS()}.items():
        frames = measure(pred.detach().cpu(), truth.cpu()).tolist()
        assert scores[name]["frames"] == pytest.approx(frames, rel=1e-4 if name == "lpips" else 1e-9)
        assert scores[name]["mean"] == pytest.approx(sum(frames) / 3, rel=1e-4)
    of_mean_error = -10 * math.log10(scores["mse"]["mean"])
    assert scores["psnr"]["mean"] > of_mean_error + 1e-6  # mean of frames, not of the pooled error
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_absent_lpips_is_an_empty_entry_with_its_reason():
    scores = score_frames(*videos(), lpips=None, lpips_reason=WHY)
    assert scores["lpips"] == {"mean": None, "frames": None, "reason": WHY}
    with pytest.raises(ValueError, match="lpips_reason must say why"):
        score_frames(*videos(), lpips=None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_videos_that_are_not_finite_are_refused(bad):
    pred, truth = videos()
    pred[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"^pred holds NaN or infinity; frames must be finite to be scored$"):
        score_frames(pred, truth, lpips=None, lpips_reason=WHY)
    with pytest.raises(ValueError, match=r"^truth holds NaN or infinity"):
        score_frames(truth, pred, lpips=None, lpips_reason=WHY)


@pytest.mark.parametrize(
    ("pred", "truth", "says"),
    [
        (
            torch.zeros(2, 3, 16, 16),
            torch.zeros(2, 3, 16, 16),
            r"pred is \[2, 3, 16, 16\]; a video must be \[3, F, H, W\]",
        ),
        (torch.zeros(3, 0, 16, 16), torch.zeros(3, 0, 16, 16), "with F at least 1"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"pred is \[3, 16, 16\]"),
        (torch.zeros(3, 2, 16, 16), torch.zeros(3, 1, 16, 16), "they must have one shape"),
        (torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.zeros(3, 1, 16, 16), "must be floating point"),
    ],
)
def test_videos_of_a_wrong_kind_are_refused(pred, truth, says):
    with pytest.raises(ValueError, match=says):
        score_frames(pred, truth, lpips=None, lpips_reason=WHY)
