"""What `bench.kernels` runs: each operation at the shapes of STDiT3-XL/2 and the VAE, with bytes and flops declared.

Bytes are the least that must pass through memory: each input read once, each output written once. Flops count the products.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.models.stdit3 import STDiT3Config
from ..kernels import (
    gate_residual,
    lora_linear,
    norm_linear,
    norm_modulate,
    norm_silu_pad,
    qk_norm_rope,
)  # fmt: skip
from ..kernels.common import padded_rank
from ..kernels.windows import Grid, split_windows
from .caption_cases import caption_cases

Inputs = list[Tensor]
SCALE = 1.0  # alpha / rank, as in the recipes


@dataclass(frozen=True)
class Sizes:
    """One set of shapes; the defaults are the real ones."""

    dim: int = 1152
    heads: int = 16
    rank: int = 16
    # name -> samples and token grid: what is adapted on; one branch of a sampling step; its three branches.
    batches: tuple[tuple[str, int, Grid], ...] = (
        ("8400", 1, Grid(7, 30, 40)),
        ("54000", 3, Grid(15, 30, 40)),
        ("18000", 1, Grid(15, 30, 40)),
    )
    draws: int = 8
    counted: tuple[int, ...] = (4800, 8400)
    outputs: int = 64
    # Channels, frames, height and width where the VAE's decoder works on one chunk of five latent frames.
    chunk: tuple[tuple[int, int, int, int], ...] = (
        (128, 20, 480, 640), (256, 20, 240, 320), (512, 20, 240, 320), (512, 10, 120, 160)
    )  # fmt: skip
    network: STDiT3Config = STDiT3Config()  # noqa: RUF009 (frozen)
    """Whose parameters the optimizer steps on."""


REAL = Sizes()
SMALL = Sizes(
    dim=24,
    heads=2,
    rank=3,
    batches=(("small", 2, Grid(2, 9, 5)),),
    draws=2,
    counted=(33,),
    outputs=6,
    chunk=((64, 2, 4, 6),),
    network=STDiT3Config(hidden_size=24, depth=1, num_heads=2, caption_channels=16, model_max_length=8),
)


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    make: fresh inputs. reference: the plain version, which eager and compiled run and float64 makes the truth.
    impls: ours, by name. trained: which inputs get gradients; empty: there is no backward to time.
    forward, backward: (bytes, flops). floors: calls that compute less, as a yardstick (not checked).
    variants: module attributes that steer a kernel, to try. traced: whether torch.compile may meet the calls.
    """

    op: str
    shape: str
    make: Callable[[torch.device, torch.dtype], Inputs]
    reference: Callable[..., Any]
    impls: dict[str, Callable[..., Any]]
    forward: tuple[int, int]
    trained: tuple[int, ...] = ()
    backward: tuple[int, int] = (0, 0)
    truth: torch.dtype = torch.float64
    floors: dict[str, Callable[..., Any]] = field(default_factory=dict)
    variants: tuple[tuple[ModuleType, dict[str, Any]], ...] = ()
    compile: bool = True
    traced: bool = True

    @property
    def key(self) -> str:
        return f"{self.op} {self.shape}"


def randn(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def norm_cases(s: Sizes) -> Iterator[Case]:
    for name, B, grid in s.batches:
        N, D = grid.tokens, s.dim

        def make(device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D) -> Inputs:
            vectors = (randn(device, dtype, B, 1, D, scale=0.3) for _ in range(2))
            return [randn(device, dtype, B, N, D), *vectors]

        yield Case(
            "norm_modulate", name, make,
            norm_modulate.norm_modulate_reference, {"triton": norm_modulate.norm_modulate},
            (4 * B * N * D, 0), (0, 1, 2), (6 * B * N * D, 0),
            variants=tuple((norm_modulate, {"BLOCK_N": n}) for n in (8, 32)),
        )  # fmt: skip


def add_norm_cases(s: Sizes) -> Iterator[Case]:
    """The residual sum and its norm, which both go on, with frozen modulation as in steps of LoRA: before the MLP, and with the
    low-rank projection that a layer's first norm has beside it."""
    for name, B, grid in s.batches:
        for rank in (0, s.rank):
            N, D = grid.tokens, s.dim
            columns = 4 * D + (padded_rank(rank) if rank else 0)

            def make(
                device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D, r: int = rank
            ) -> Inputs:
                vectors = (randn(device, dtype, B, 1, D, scale=0.3) for _ in range(2))
                down = [randn(device, dtype, r, D, scale=D**-0.5)] if r else []
                return [randn(device, dtype, B, N, D), randn(device, dtype, B, N, D), *vectors, *down]

            def apart(x, h, *rest):
                s = x + h
                return s, norm_modulate.norm_modulate(s, *rest)

            yield Case(
                f"add_norm_modulate{' lora' * bool(rank)}", name, make, norm_modulate.add_norm_modulate_reference,
                {"triton": norm_modulate.add_norm_modulate, "sum, then norm_modulate": apart},
                (2 * B * N * columns, 0), (0, 1, 4) if rank else (0, 1), (2 * B * N * columns, 0),
                variants=tuple((norm_modulate, {"BLOCK_N": n}) for n in (8, 32)),
            )  # fmt: skip


def qkv_cases(s: Sizes) -> Iterator[Case]:
    """Norm, modulation and the adapted projection of queries, keys and values: the chain that the first half of a layer is."""
    for name, B, grid in s.batches:
        N, D, r = grid.tokens, s.dim, s.rank
        rows, E = B * N, 3 * D

        def make(device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D, r: int = r) -> Inputs:
            x, shift, scale = (
                randn(device, dtype, B, N, D),
                *(randn(device, dtype, B, 1, D, scale=0.3) for _ in range(2)),
            )
            weight, bias = randn(device, dtype, 3 * D, D, scale=D**-0.5), randn(device, dtype, 3 * D)
            down, up = randn(device, dtype, r, D, scale=D**-0.5), randn(device, dtype, 3 * D, r, scale=r**-0.5)
            extended = lora_linear.extend_weight(weight, r)
            lora_linear.write_up(extended, up, SCALE)
            return [x, shift, scale, weight, bias, down, up, extended]

        def reference(x, shift, scale, weight, bias, down, up, _):
            n = norm_modulate.norm_modulate_reference(x, shift, scale)
            return lora_linear.lora_linear_reference(n, weight, bias, down, up, SCALE)

        def extended(x, shift, scale, weight, bias, down, up, extended):
            n = norm_modulate.norm_modulate(x, shift, scale, down)
            return lora_linear.lora_linear_extended(n, extended, bias, up, SCALE)

        def two_term(x, shift, scale, weight, bias, down, up, _):
            n = norm_modulate.norm_modulate(x, shift, scale)
            return lora_linear.lora_linear(n, weight, bias, down, up, SCALE)

        def frozen(x, shift, scale, weight, bias, down, up, _):
            return F.linear(norm_modulate.norm_modulate_reference(x, shift, scale), weight, bias)

        low = 2 * rows * r * (D + E)
        yield Case(
            "norm_lora_qkv", name, make, reference, {"triton + extended": extended, "triton + triton": two_term},
            (2 * (rows * D + E * D + rows * E), 2 * rows * D * E + low),
            (0, 5, 6), (2 * (2 * rows * D + E * D + rows * E), 2 * rows * D * E + 2 * low),
            floors={"frozen eager": frozen},
            variants=tuple((norm_modulate, {"BLOCK_N": n}) for n in (32, 64)),
        )  # fmt: skip


def trained_cases(s: Sizes) -> Iterator[Case]:
    """The same chain in full fine-tuning: norm, modulation and the trained projection of queries, keys and values."""
    for name, B, grid in s.batches[:1]:
        N, D = grid.tokens, s.dim
        rows, E = B * N, 3 * D

        def make(device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D) -> Inputs:
            vectors = (randn(device, dtype, B, 1, D, scale=0.3) for _ in range(2))
            weight, bias = randn(device, dtype, 3 * D, D, scale=D**-0.5), randn(device, dtype, 3 * D)
            return [randn(device, dtype, B, N, D), *vectors, weight, bias]

        def apart(x, shift, scale, weight, bias):
            return F.linear(norm_modulate.norm_modulate(x, shift, scale), weight, bias)

        yield Case(
            "norm_linear", name, make, norm_linear.norm_linear_reference,
            {"triton": lambda x, *t: norm_linear.add_norm_linear(x, None, *t)[1], "norm_modulate, then linear": apart},
            (2 * (rows * D + E * D + rows * E), 2 * rows * D * E),
            (0, 1, 2, 3, 4), (2 * (2 * rows * D + 2 * E * D + rows * E), 4 * rows * D * E),
            variants=tuple((norm_linear, {"ROWS": n}) for n in (32, 128)),
        )  # fmt: skip


def lora_cases(s: Sizes) -> Iterator[Case]:
    for name, B, grid in s.batches:
        M, D, r = B * grid.tokens, s.dim, s.rank
        E = 3 * D

        def make(device: torch.device, dtype: torch.dtype, M: int = M, D: int = D, r: int = r) -> Inputs:
            weight, bias = randn(device, dtype, 3 * D, D, scale=D**-0.5), randn(device, dtype, 3 * D)
            down, up = randn(device, dtype, r, D, scale=D**-0.5), randn(device, dtype, 3 * D, r, scale=r**-0.5)
            return [randn(device, dtype, M, D), weight, bias, down, up]

        def reference(x, weight, bias, down, up):
            return lora_linear.lora_linear_reference(x, weight, bias, down, up, SCALE)

        def ours(x, weight, bias, down, up):
            return lora_linear.lora_linear(x, weight, bias, down, up, SCALE)

        low = 2 * M * r * (D + E)
        tiles = ((128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 32, 4, 5), (256, 128, 64, 8, 3))
        yield Case(
            "lora_linear", name, make, reference, {"triton": ours},
            (2 * (M * D + E * D + M * E), 2 * M * D * E + low),
            (0, 3, 4), (2 * (2 * M * D + E * D + M * E), 2 * M * D * E + 2 * low),
            floors={"frozen linear": lambda x, weight, bias, down, up: F.linear(x, weight, bias)},
            variants=tuple((lora_linear, {"PRODUCT_BLOCKS": blocks}) for blocks in tiles),
        )  # fmt: skip


def rope_cases(s: Sizes) -> Iterator[Case]:
    for name, B, grid in s.batches:
        for windows in (None, grid):
            N, D, d = grid.tokens, s.dim, s.dim // s.heads
            table = N if windows else grid.rows * grid.cols

            def make(
                device: torch.device,
                dtype: torch.dtype,
                B: int = B,
                N: int = N,
                D: int = D,
                d: int = d,
                table: int = table,
            ) -> Inputs:
                angle = torch.rand(table, d // 2, device=device) * 30
                weights = (1 + randn(device, torch.float32, d, scale=0.2) for _ in range(2))
                tables = (angle.cos().to(dtype), angle.sin().to(dtype))
                return [randn(device, dtype, B, N, 3 * D), *(w.to(dtype) for w in weights), *tables]

            def reference(*t: Tensor, windows: Grid | None = windows):
                return qk_norm_rope.qk_norm_rope_reference(*t, windows=windows)

            def ours(*t: Tensor, windows: Grid | None = windows):
                return qk_norm_rope.qk_norm_rope(*t, windows=windows)

            def from_results(*t: Tensor, windows: Grid | None = windows):
                return qk_norm_rope.qk_norm_rope(*t, windows=windows, results=True)

            moved = 2 * 3 * B * N * D
            yield Case(
                f"qk_norm_rope {'windows' if windows else 'frames'}", name, make, reference,
                {"triton": ours, "triton, projection not kept": from_results},
                (2 * moved, 0), (0,), (3 * moved - 2 * B * N * D, 0),
                variants=tuple((qk_norm_rope, {"BLOCK": n}) for n in (8, 32)),
            )  # fmt: skip


def residual_cases(s: Sizes) -> Iterator[Case]:
    for name, B, grid in s.batches:
        for windows in (None, grid):
            N, D, r = grid.tokens, s.dim, s.rank
            rows = B * N
            kind = "windows" if windows else "frames"

            def make(
                device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D, r: int = r
            ) -> Inputs:
                x, a = randn(device, dtype, B, N, D), randn(device, dtype, B, N, D)
                weight, bias = randn(device, dtype, D, D, scale=D**-0.5), randn(device, dtype, D)
                down, up = randn(device, dtype, r, D, scale=D**-0.5), randn(device, dtype, D, r, scale=r**-0.5)
                return [x, a, weight, bias, down, up, randn(device, dtype, B, 1, D)]

            def reference(x, a, weight, bias, down, up, gate, windows: Grid | None = windows):
                return gate_residual.lora_gate_residual_reference(x, a, weight, bias, down, up, SCALE, gate, windows)

            def ours(x, a, weight, bias, down, up, gate, windows: Grid | None = windows):
                parts = (
                    a if windows is None else split_windows(a.flatten(0, 1), len(a), windows)
                )  # as attention gives them
                return gate_residual.lora_gate_residual(x, parts, weight, bias, down, up, SCALE, gate, windows)

            def two_term(x, a, weight, bias, down, up, gate, windows: Grid | None = windows):
                h = lora_linear.lora_linear(a, weight, bias, down, up, SCALE)
                return gate_residual.gate_residual(x, h, gate, windows)

            low = 4 * rows * r * D
            yield Case(
                f"lora_gate_residual {kind}", name, make, reference,
                {"triton + library": ours, "triton + triton": two_term},
                (2 * (3 * rows * D + D * D), 2 * rows * D * D + low),
                (0, 1, 4, 5), (2 * (3 * rows * D + D * D), 2 * rows * D * D + 2 * low),
                floors={"frozen projection": lambda x, a, weight, bias, down, up, gate: F.linear(a, weight, bias)},
                variants=tuple((gate_residual, {"BLOCK_N": n}) for n in (16, 64)),
            )  # fmt: skip

            def plain_inputs(device: torch.device, dtype: torch.dtype, B: int = B, N: int = N, D: int = D) -> Inputs:
                return [randn(device, dtype, B, N, D), randn(device, dtype, B, N, D), randn(device, dtype, B, 1, D)]

            yield Case(
                f"gate_residual {kind}", name, plain_inputs,
                lambda *t, windows=windows: gate_residual.gate_residual_reference(*t, windows=windows),
                {"triton": lambda *t, windows=windows: gate_residual.gate_residual(*t, windows=windows)},
                (6 * rows * D, 0), (0, 1), (4 * rows * D, 0),
                variants=tuple((gate_residual, {"BLOCK_N": n}) for n in (16, 64)),
            )  # fmt: skip


def vae_cases(s: Sizes) -> Iterator[Case]:
    """Between the convolutions of the VAE's decoder; float32 is the truth, as float64 would not fit."""
    for C, T, H, W in s.chunk:
        elements, padded = C * T * H * W, C * (T + 2) * (H + 2) * (W + 2)
        name = f"{C}x{T}x{H}x{W}"

        def make(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = (1, C, T, H, W)) -> Inputs:
            B, C, *rest = shape
            x = randn(device, dtype, B, *rest, C).movedim(-1, 1)
            return [x, 1 + randn(device, dtype, C, scale=0.3), randn(device, dtype, C, scale=0.3)]

        yield Case(
            "norm_silu_pad", name, make, norm_silu_pad.norm_silu_pad_reference, {"triton": norm_silu_pad.norm_silu_pad},
            (2 * (2 * elements + padded), 0), truth=torch.float32,
            variants=tuple((norm_silu_pad, {"TILE": t, "PROGRAMS": p}) for t in (2048, 8192) for p in (528, 2112)),
        )  # fmt: skip

        def make_skip(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = (C, T, H, W)) -> Inputs:
            x, weight, bias = make(device, dtype, (1, *shape))
            return [x, weight, bias, make(device, dtype, (1, shape[0], *(n // 2 for n in shape[1:])))[0]]

        if C > 256 or s is not REAL:
            yield Case(
                "norm_silu_pad skip", name, make_skip,
                lambda *t: norm_silu_pad.norm_silu_pad_reference(*t[:3], pad=False, skip=t[3]),
                {"triton": lambda *t: norm_silu_pad.norm_silu_pad(*t[:3], pad=False, skip=t[3])},
                (2 * (3 * elements + elements // 8), 0), truth=torch.float32,
            )  # fmt: skip
            yield Case(
                "upsample_pad", name, lambda device, dtype, make=make_skip: make(device, dtype)[3:],
                norm_silu_pad.upsample_pad_reference, {"triton": norm_silu_pad.upsample_pad},
                (2 * (elements // 8 + padded), 0), truth=torch.float32,
            )  # fmt: skip
        elif C == 256:
            half = (C, T, H, W)
            yield Case(
                "upsample_pad frames", name, lambda device, dtype, half=half: make(device, dtype, (1, *half))[:1],
                lambda x: norm_silu_pad.upsample_pad_reference(x, 1, 0),
                {"triton": lambda x: norm_silu_pad.upsample_pad(x, 1, 0)},
                (2 * (elements + C * T * (2 * H + 2) * (2 * W + 2)), 0), truth=torch.float32,
            )  # fmt: skip


def all_cases(sizes: Sizes) -> list[Case]:
    """Every operation at the first shape, then at the second and so on: what time allows covers all operations."""
    from .delta_cases import delta_cases, delta_step_cases  # which take their parts from here, as do those below
    from .float8_cases import float8_cases
    from .optimizer_cases import optimizer_cases
    from .sum_cases import sum_cases

    groups = [
        norm_cases, add_norm_cases, qkv_cases, trained_cases, lora_cases, rope_cases, residual_cases, caption_cases, delta_cases,
        delta_step_cases, vae_cases, sum_cases, optimizer_cases, *float8_cases,
    ]  # fmt: skip
    # Gradients at the shape that is adapted on; the others are the sampler's, of which two compile to the same code.
    adapted, compiled = sizes.batches[0][0], [name for name, _, _ in sizes.batches[:2]]
    names = [name for name, _, _ in sizes.batches]
    cases = [
        replace(
            case,
            trained=case.trained if case.shape == adapted else (),
            compile=case.compile and (case.shape in compiled or case.shape not in names),
        )
        for group in groups
        for case in group(sizes)
    ]
    order = {name: i for i, (name, _, _) in enumerate(sizes.batches)}
    return sorted(cases, key=lambda case: order.get(case.shape, 0))
