"""The faster paths compute what the plain path computes, forward and backward."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from vidtta.engine.denoiser import Denoiser
from vidtta.engine.methods.adamw import FusedAdamW, OnePassAdamW, PlainAdamW, describe_steps, way_of_steps
from vidtta.engine.methods.full import FullFineTuning
from vidtta.engine.methods.lora import LoRA
from vidtta.engine.methods.optimize import Masters
from vidtta.engine.methods.parts import L2ToStart
from vidtta.engine.models.lora_linear import LoRALinear
from vidtta.engine.models.paths import Paths, PathsByWork, use_paths
from vidtta.engine.models.rule_weights import fill_by_rule
from vidtta.engine.models.stdit3 import Caption, Condition, STDiT3
from vidtta.engine.models.vae import VAE, VAEConfig
from vidtta.engine.models.vae_fast import use_channels_last, use_plain
from vidtta.engine.recompute import recomputed
from vidtta.kernels.common import INTERPRETED

from .tiny import noise, tiny_dit, tiny_task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIXTEEN = (
    torch.bfloat16 if DEVICE == "cuda" else torch.float16
)  # Triton's interpreter does not round bfloat16 to nearest


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def velocities(model: STDiT3, length: int, size: tuple[int, int] = (18, 6)) -> Tensor:
    """Three branches of one step; by default rows and columns that leave a strip beside the whole windows."""
    latents = noise(0, 1, 16, 5, *size).to(model.device)
    mask = torch.zeros_like(latents)
    mask[:, :, :2] = 1
    geometry, caption = model.geometry(5, size, (480, 640), (0, 1)), Caption(noise(3, 1, length, 16)).to(model.device)
    with torch.no_grad():
        denoiser = Denoiser(model, geometry, 24.0, caption, Condition(latents * mask, mask))
        start, t = noise(1, *latents.shape).to(model.device), torch.tensor(500.0, device=model.device)
        return torch.cat(denoiser(start, t, all_branches=True))


def test_captions_of_five_lengths_share_one_graph_of_each_kind_of_layer():
    model, lengths = tiny_dit(), (5, 3, 7, 8, 2)
    plain = [velocities(model, n) for n in lengths]
    counter = CompileCounterWithBackend("aot_eager")
    use_paths(model, Paths(compiled=True, compiler=counter, gelu_in_product=True))
    for n, expected in zip(lengths, plain, strict=True):
        torch.testing.assert_close(velocities(model, n), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="Triton needs a GPU or its interpreter")
@pytest.mark.parametrize("method", ["none", "lora", "lora in the mlp", "full"])
@pytest.mark.parametrize("size", [(16, 32), (18, 20), (4, 6)], ids=str)
def test_layers_on_the_kernels_are_the_plain_ones(size: tuple[int, int], method: str):
    """Whole windows alone, several of them; windows of four sizes; one that is less than whole. Velocities of a batch, or a loss and
    its gradients."""
    model, triton = tiny_dit(depth=1).to(DEVICE), Paths(kernels="triton")
    use_paths(model, triton)
    parameters: list[nn.Parameter] = []
    if method == "full":
        parameters = FullFineTuning().attach(model, 0).masters.parameters
    elif method != "none":
        targets = ("mlp.fc1",) if method == "lora in the mlp" else ("attn.qkv", "attn.proj")
        adapter = LoRA(rank=4, targets=targets).attach(model, 0)
        with torch.no_grad():
            for i, one in enumerate(adapter.adapters.values()):
                one.B.copy_(0.1 * noise(i + 10, *one.B.shape))
        adapter.masters.publish()
        parameters = adapter.masters.parameters
    task = tiny_task(model, latents=noise(0, 1, 16, 4, *size).to(DEVICE))
    found = []
    for paths in (None, triton):
        use_paths(model, paths)
        if not parameters:
            found.append([velocities(model, 5, size)])
            continue
        loss = task.loss(task.draw(0))
        found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for plain, fast in zip(*found, strict=True):
        assert (fast - plain).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize(("rank", "alpha"), [(3, 6.0), (16, 4.0)])
def test_one_extended_product_is_the_adapted_layer(rank: int, alpha: float):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(20, 24).double().requires_grad_(False), rank, alpha).double()
    with torch.no_grad():
        layer.A.normal_()
        layer.B.normal_()
    x, dy = noise(1, 2, 5, 20).double().requires_grad_(), noise(2, 2, 5, 24).double()

    def results() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, layer.A, layer.B], dy)]

    apart = results()
    layer.extend()
    for a, b in zip(apart, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.B.mul_(2)
    layer.refresh()
    torch.testing.assert_close(layer(x), layer.base(x) + layer.scale * x @ layer.A.T @ layer.B.T)


@pytest.mark.parametrize("kind", [FusedAdamW, OnePassAdamW])
@pytest.mark.parametrize("dtype", [torch.float32, SIXTEEN], ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_every_way_of_steps_is_adamw(clip: float, dtype: torch.dtype, kind: type, monkeypatch: pytest.MonkeyPatch):
    """On gradients that are given: a network's own are partly zero but for rounding, which AdamW makes large."""
    monkeypatch.setattr(FusedAdamW, "GROUP", 20)  # several groups
    settings = FullFineTuning(lr=1e-2, weight_decay=0.1, gradient_clip=clip)
    found, published = [], []
    for each in (PlainAdamW, kind):
        parameters = [nn.Parameter(noise(i, 3, 5 + i).to(DEVICE, dtype)) for i in range(4)]
        masters = Masters(parameters, lambda each=each: published.append(each))
        optimizer = each(masters, settings)
        norms = []
        for step in range(4):
            for i, parameter in enumerate(parameters[: 3 if step < 2 else 4]):  # the last has no gradient at first
                parameter.grad = ((1 + step) * noise(10 * step + i + 50, *parameter.shape)).to(DEVICE, dtype)
            norms.append(optimizer.gradient_norm())
            optimizer.step(norms[-1], settings.lr)
            assert all(p.grad is None for p in parameters)
            assert all(torch.equal(p, m.to(dtype)) for p, m in zip(parameters, masters.tensors, strict=True))
        found.append([*masters.tensors, *parameters, *norms])
    assert published == [PlainAdamW] * 4 + [kind] * 4
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [PlainAdamW, FusedAdamW, OnePassAdamW])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("norm", [torch.nan, torch.inf])
def test_no_way_steps_where_the_norm_is_not_finite(kind: type, clip: float, norm: float):
    """Neither then nor later: the next step is the one that would have been taken."""
    found = []
    for harm in (False, True):
        parameters = [
            nn.Parameter(noise(i, 3, 5).to(DEVICE, dtype)) for i, dtype in enumerate((torch.float32, SIXTEEN))
        ]
        optimizer = kind(Masters(parameters), FullFineTuning(lr=1e-2, weight_decay=0.1, gradient_clip=clip))
        for step in range(3):
            for i, parameter in enumerate(parameters):
                parameter.grad = noise(10 * step + i + 50, *parameter.shape).to(DEVICE, parameter.dtype)
            length = optimizer.gradient_norm()
            if step == 1 and harm:
                parameters[0].grad = torch.full_like(parameters[0], norm)
                optimizer.gradient_norm()
                before = [t.clone() for t in (*parameters, *optimizer.masters.tensors)]
                optimizer.step(torch.full_like(length, norm), 1e-2)
                assert all(map(torch.equal, before, (*parameters, *optimizer.masters.tensors)))
            elif step != 1:
                optimizer.step(length, 1e-2)
            assert step == 1 or all(p.grad is None for p in parameters)
        found.append([t.detach() for t in (*parameters, *optimizer.masters.tensors)])
    assert all(map(torch.equal, *found))


def test_rotated_rows_are_turned_back_where_training_runs_on_the_kernels_and_the_norms_allow_it():
    model, triton = tiny_dit(depth=1), Paths(kernels="triton")
    by_work = PathsByWork(training=triton, features=None, sampling=None, features_tokens=1, methods="plain")
    for paths, turned in ((triton, True), (by_work, True), (Paths(), False), (None, False)):
        use_paths(model, paths)
        assert [layer.attn.turns_back for layer in model.layers] == [turned] * 2
    with torch.no_grad():
        model.layers[1].attn.k_norm.weight[0] = 0
    use_paths(model, triton)
    assert [layer.attn.turns_back for layer in model.layers] == [True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the way of steps on a GPU needs one")
def test_on_a_gpu_steps_are_one_kernel():
    masters = Masters([nn.Parameter(torch.zeros(3, device="cuda"))], path="triton")
    assert way_of_steps(masters, FullFineTuning()) == "triton"


def test_the_way_of_steps_follows_path_device_and_penalties():
    parameters = [nn.Parameter(torch.zeros(3))]
    penalised = FullFineTuning(l2=L2ToStart(weight=1.0))
    for path, way in (("plain", "plain"), ("fused", "fused"), ("triton", "fused")):
        masters = Masters(parameters, path=path)
        assert way_of_steps(masters, FullFineTuning()) == way
        assert way_of_steps(masters, penalised) == "plain"
        said = describe_steps(masters, penalised), describe_steps(masters, FullFineTuning())
        assert ("penalty" in said[0]) == (path != "plain") and ("fused" in said[1]) == (way == "fused")


def test_channels_last_is_the_same_autoencoder():
    vae = VAE(VAEConfig(ch=32, ch_mult=(1, 2, 2, 1), num_res_blocks=1)).requires_grad_(False)
    fill_by_rule(vae)
    pixels, latents = noise(0, 1, 3, 18, 16, 24), noise(1, 1, 16, 6, 2, 3)
    with torch.no_grad():
        plain = vae.encode(pixels), vae.decode(latents)
        names = list(vae.state_dict())
        use_channels_last(vae, triton=False)
        for fast, expected in zip((vae.encode(pixels), vae.decode(latents)), plain, strict=True):
            torch.testing.assert_close(fast, expected, rtol=1e-4, atol=2e-5)
        assert list(vae.state_dict()) == names
        use_plain(vae)
        assert torch.equal(vae.encode(pixels), plain[0])


@pytest.mark.parametrize("kernels", ["torch", "compiled", "triton"])
def test_what_ran_out_of_memory_is_tried_again_on_the_same_path(kernels: str):
    """With checkpointing the gradients are those without, to the bit, and a layer's own activations are not kept."""
    if kernels == "triton" and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("Triton needs a GPU or its interpreter")
    model, counter = tiny_dit(depth=1), CompileCounterWithBackend("aot_eager")
    if kernels != "torch":
        compiled = kernels == "compiled"
        use_paths(model, Paths(kernels="torch" if compiled else "triton", compiled=compiled, compiler=counter))
    adapter = LoRA(rank=4, targets=("attn.qkv", "attn.proj", "mlp.fc1")).attach(model, 0)
    task = tiny_task(model)
    found, kept = [], []
    for again in (False, True):
        bytes_kept = [0]

        def pack(tensor: Tensor, bytes_kept: list[int] = bytes_kept) -> Tensor:
            bytes_kept[0] += tensor.nbytes
            return tensor

        with recomputed(model) if again else nullcontext():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = task.loss(task.draw(0))
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in adapter.masters.parameters)])
        kept.append(bytes_kept[0])
        for parameter in adapter.masters.parameters:
            parameter.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) > 1
    assert kept[1] < kept[0] / 2 and not model.recompute
    if kernels == "compiled":
        assert counter.frame_count == 2
