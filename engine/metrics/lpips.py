"""Learned perceptual distance: LPIPS v0.1 on AlexNet features, one value a frame.

Source: Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a perceptual metric",
arXiv:1801.03924, through the authors' package `lpips`, which ships the linear weights. The AlexNet weights come from
torch hub's folder, verified; this module never downloads and never scores with anything else.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..fetch import HUB_FILES, torch_hub_file, verify_hub_file
from ..files import sha256_tensor
from ..models.checkpoint import load_strict, open_state
from ..torchvision_ops import declare_missing_operators
from .frames import check_pair

SMALLEST = 31  # pixels a side: below it AlexNet's last pooling has nothing left
LINEAR_WEIGHTS = "718a8b40"  # begins the SHA-256 of the five layers' float32 weights of v0.1, which lpips 0.1.4 ships
BATCH = 8  # frames a pass, to bound memory


class LPIPS:
    """The distance between the frames of two videos. Its network moves to their device.

    Constructing raises UserError when the network cannot be had: `available` says why.
    """

    def __init__(self) -> None:
        reason = self.available()
        if reason:
            raise UserError(reason)
        self._network = _build()

    @classmethod
    def available(cls) -> str | None:
        """Return None if the distance can be computed here, else one sentence: what is missing and what to do."""
        if importlib.util.find_spec("lpips") is None:
            return "LPIPS needs the package lpips, which is not installed; install vidtta with its dependencies."
        try:
            verify_hub_file(torch_hub_file(HUB_FILES["lpips"]))
        except UserError as error:
            return f"LPIPS needs AlexNet's weights: {error}"
        return None

    @torch.no_grad()
    def __call__(self, pred_CFHW: Tensor, truth_CFHW: Tensor) -> Tensor:
        """Return the distance of each frame, [F] float64 (computed in plain float32), from 0 (equal); less is better.

        Both videos are [3, F, H, W] in [-1, 1], on one device; that range is the network's own convention; values outside are clamped.
        For each of five layers: unit-normalise the features over channels, square the difference, weigh the channels by
        the learned non-negative weights, average over positions; then sum over layers.
        Raises ValueError for frames smaller than the network can see.
        """
        check_pair(pred_CFHW, truth_CFHW)
        height, width = pred_CFHW.shape[2:]
        if min(height, width) < SMALLEST:
            raise ValueError(f"frames are {height}x{width}; LPIPS needs at least {SMALLEST}x{SMALLEST}")
        network = self._network.to(pred_CFHW.device)
        batches = zip(_batches(pred_CFHW), _batches(truth_CFHW), strict=True)
        with _plain_float32(pred_CFHW.device):
            return torch.cat([network(pred_FCHW, truth_FCHW).flatten() for pred_FCHW, truth_FCHW in batches]).double()


def _batches(video_CFHW: Tensor) -> list[Tensor]:
    return [part.transpose(0, 1).float().clamp(-1, 1).contiguous() for part in video_CFHW.split(BATCH, dim=1)]


def _build() -> nn.Module:
    """Build the package's network, then fill its features from the verified file.

    Asked for pretrained features, the package would download what it does not find and unpickle the file without
    restrictions; so it is asked for unset ones, and every one of them is loaded here.
    """
    declare_missing_operators()
    import lpips

    path = torch_hub_file(HUB_FILES["lpips"])
    # Initialising the features that are overwritten below must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package uses torchvision's old spelling of `weights`
        network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    features = network.net  # names its layers slice2.3.weight where the file says features.3.weight
    own_name = {f"features.{name.split('.', 1)[1]}": name for name in features.state_dict()}
    state = {name: value for name, value in open_state(path).items() if not name.startswith("classifier.")}
    state = {own_name.get(name, name): value for name, value in state.items()}
    load_strict(features, state, str(path))
    _check_weights(network, state)
    return network.eval().requires_grad_(False)


def _check_weights(network: Any, features: dict[str, Tensor]) -> None:
    """Raise UserError unless the network holds the file's features and the published linear weights.

    A network that was left random scores without a complaint.
    """
    held = network.net.state_dict()
    linear = torch.cat([layer.model[-1].weight.detach().flatten() for layer in network.lins])
    if any(not torch.equal(held[name], value) for name, value in features.items()):
        raise UserError(
            "LPIPS was built with other features than AlexNet's verified file holds; install lpips 0.1.4 again"
        )
    if not sha256_tensor(linear).startswith(LINEAR_WEIGHTS):
        raise UserError("LPIPS was built with other linear weights than those published; install lpips 0.1.4 again")


@contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """Keep TF32 and autocast out, so that a score does not depend on how the model was run."""
    # Its own switch: the older allow_tf32 raises once anything else has used the newer ones.
    convolution = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue] (set at run time)
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolution.fp32_precision = before
