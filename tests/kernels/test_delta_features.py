"""The final-layer delta's loss and gradient from cached features, and the sums of the closed forms."""

import pytest
import torch
from torch import Tensor
from vidtta.engine.methods.delta import DeltaFinalLayer
from vidtta.engine.models.stdit3 import FinalLayer
from vidtta.kernels import delta_features
from vidtta.kernels.delta_features import (
    Features,
    added_reference,
    linear_gradient,
    linear_loss_and_gradient,
    loss_reference,
    pre_gradient,
    prepare,
    residual_sums,
    residual_sums_reference,
)

from tests.kernels.accuracy import DEVICE, assert_as_accurate, every_dtype, rand

# draws, tokens, channels, outputs. One of all; odd; the model's width and outputs, with tokens that no block divides.
SHAPES = [(1, 1, 2, 1), (3, 41, 37, 5), (2, 9, 1152, 64)]


def pre_loss_and_gradient(features: Features, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels' loss and gradient at site pre of the deltas of all draws, [K, D]."""
    centred = delta - delta.mean(-1, keepdim=True)
    added = (features.maps * centred[:, None]).sum(-1, dtype=torch.float64)
    loss = delta.new_empty(1)
    gradient = pre_gradient(features, centred, added, loss, 0)
    return loss[0], gradient


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, where each takes a while: several tokens at a time, several times a program."""
    if DEVICE == "cpu":
        monkeypatch.setattr(delta_features, "BLOCK_N", 8)
        monkeypatch.setattr(delta_features, "PROGRAMS", 6)


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype, weighted: bool) -> dict[str, Tensor | None]:
    K, N, D, C = shape
    weight = (rand(N, C, seed=4) > -1).float() if weighted else None
    if weight is not None:
        weight[0, 0] = 1.0
    residual = rand(K, N, C, seed=1)
    return {
        # Not centred, larger than the delta: what a residual stream looks like.
        "features": (rand(K, N, D) * 3 + 1).to(dtype),
        "residual": residual if weight is None else residual * weight,
        "weight": weight,
        "maps": rand(K, C, D, scale=D**-0.5, seed=2),
        "delta": rand(K, D, scale=0.5, seed=3),
    }


def plain(t: dict[str, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss and gradient by autograd."""
    cast = {name: None if x is None else x.to(dtype) for name, x in t.items()}
    assert cast["delta"] is not None
    cast["delta"] = cast["delta"].requires_grad_()
    loss = loss_reference(**cast)  # type: ignore[arg-type]
    return loss.detach(), torch.autograd.grad(loss, cast["delta"])[0]


def cached(t: dict[str, Tensor | None]) -> Features:
    return prepare(t["features"], t["residual"], t["weight"], t["maps"])  # type: ignore[arg-type]


@every_dtype
@pytest.mark.parametrize("weighted", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_at_site_pre(shape, weighted, dtype):
    t = tensors(shape, dtype, weighted)
    delta = t["delta"]
    assert delta is not None
    actual = pre_loss_and_gradient(cached(t), delta)
    for name, ours, truth, torch32 in zip(
        ("loss", "gradient"), actual, plain(t, torch.float64), plain(t, torch.float32), strict=True
    ):
        assert_as_accurate(ours, truth, torch32, name)


def test_gradient_by_differences():
    """Independent of any derivative written down: the loss in float64 at d + h v and d - h v."""
    t = tensors((2, 7, 48, 8), torch.float32, True)
    delta = t["delta"]
    assert delta is not None
    direction = rand(*delta.shape, seed=9)
    wide = {name: None if x is None else x.double() for name, x in t.items()}
    ends = [loss_reference(**(wide | {"delta": delta.double() + s * 1e-6 * direction.double()})) for s in (1, -1)]  # type: ignore[arg-type]
    slope = (ends[0] - ends[1]) / 2e-6
    assert torch.allclose((pre_loss_and_gradient(cached(t), delta)[1] * direction).sum().double(), slope, rtol=1e-4)


def test_no_delta_leaves_the_residual():
    t = tensors((2, 9, 64, 8), torch.float32, False)
    residual, delta = t["residual"], t["delta"]
    assert residual is not None and delta is not None
    loss, _ = pre_loss_and_gradient(cached(t), torch.zeros_like(delta))
    assert torch.allclose(loss, residual.square().mean(), rtol=1e-6)


def test_what_the_delta_adds_is_the_engines():
    """The reference against the final layer that samples."""
    torch.manual_seed(0)
    layer = DeltaFinalLayer(FinalLayer(24, 4), "pre", 1)
    with torch.no_grad():
        layer.d.normal_()
    x, time, timestep = torch.randn(1, 5, 24), torch.randn(1, 24), torch.tensor([500.0])
    maps = layer.map_of(time)
    assert torch.allclose(added_reference(x, maps, layer.d), layer.added(x, time, timestep), atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (3, 41, 37, 5), (8, 300, 24, 64)], ids=str)
def test_sums_and_the_linear_sites(shape, weighted):
    t = tensors(shape, torch.float32, weighted)
    residual, weight, maps, delta = (t[name] for name in ("residual", "weight", "maps", "delta"))
    assert residual is not None and maps is not None and delta is not None
    sums = residual_sums(residual, weight)
    wide = None if weight is None else weight.double()
    truth, torch32 = residual_sums_reference(residual.double(), wide), residual_sums_reference(residual, weight)
    for name in ("residual", "count", "square"):
        assert_as_accurate(getattr(sums, name), getattr(truth, name), getattr(torch32, name), name)

    def by_autograd(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = torch.ones_like(residual[0], dtype=dtype) if weight is None else weight.to(dtype)
        d = delta.to(dtype).requires_grad_()
        error = residual.to(dtype) - (maps.to(dtype) @ d[:, :, None]).mT * w
        loss = (error.square().sum((1, 2)) / w.sum()).mean()
        return loss.detach(), torch.autograd.grad(loss, d)[0]

    losses = torch.zeros(2, device=DEVICE)
    added = (maps * delta[:, None]).sum(-1, dtype=torch.float64)
    gradient = linear_gradient(sums, maps, added, losses, 1)
    assert losses[0] == 0
    for actual in (linear_loss_and_gradient(sums, maps, delta), (losses[1], gradient)):
        for name, ours, exact, baseline in zip(
            ("loss", "gradient"), actual, by_autograd(torch.float64), by_autograd(torch.float32), strict=True
        ):
            assert_as_accurate(ours, exact, baseline, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": (2, 5, 4)}, r"residual \[2, 5, 4\]"),
        ({"maps": (2, 3, 7)}, r"maps \[2, 3, 7\]"),
        ({"weight": (6, 4)}, r"weight is \[6, 4\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"features": (2, 6, 8), "residual": (2, 6, 3), "weight": (6, 3), "maps": (2, 3, 8)} | change
    with pytest.raises(ValueError, match=message):
        prepare(*(torch.zeros(shape, device=DEVICE) for shape in shapes.values()))
