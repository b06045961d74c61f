"""Which attention implementation to use, found by measuring on the shapes that a model runs, once.

No implementation is fastest everywhere: at a head dimension of 72 cuDNN leads PyTorch's own flash attention, FlashAttention 4
leads cuDNN on most shapes and not on all. `measure` times whatever is installed, refuses what is inaccurate, and gives a
`Choice`: plain JSON that the tasks of a run share and that a recipe can pin. Nothing falls back in silence: `attend` runs what
it is told, or raises.
Axes: B sequences, N queries, L keys, H heads, d channels of a head; tensors are [B, N, H, d].
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .windows import Grid, regions

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = ("fa2", "fa4", "xformers")  # flash-attn's second and fourth version, xformers: where they can be imported
BACKENDS = (*SDPA, *PACKAGES)
MEASURED = (*PACKAGES, "cudnn", "flash", "efficient")  # math holds every score in memory; it is the reference only
REPEATABLE = ("flash", "efficient", "math", "fa2", "fa4")
"""Those whose backward gives the same bits each time under torch's deterministic algorithms; `measure` looks again."""
REPEATS = 3  # of a step, under deterministic algorithms, whose bits are compared
FLUSH, BUSY = 2**28, 16
"""Bytes that are written before each timed call, so that it finds a cold cache, and how often: for a millisecond, in which the host
asks for the whole call. A short one's time would else be the host's, which a recorded step does not have."""
LARGEST_ERROR = 0.01  # relative to float32; bfloat16 implementations lie near 0.0023


class Shape(NamedTuple):
    """Sequences, queries, keys, heads and channels of a head."""

    batch: int
    queries: int
    keys: int
    heads: int
    dim: int

    @property
    def key(self) -> str:
        return "x".join(map(str, self))


def self_attention_shapes(samples: int, grid: Grid, heads: int, dim: int) -> list[Shape]:
    """Frames, and windows at their true size, of one batch of token grids."""
    frame = grid.rows * grid.cols
    shapes = [Shape(samples * grid.frames, frame, frame, heads, dim)]
    for r in regions(grid):
        length = grid.frames * r.height * r.width
        shapes.append(Shape(samples * r.down * r.across, length, length, heads, dim))
    return shapes


def _fa2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    return flash_attn_func(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func  # type: ignore[import-not-found]

    # Asked for alone, because earlier versions know no such argument.
    repeated = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    out = flash_attn_func(q, k, v, **repeated)
    return out[0] if isinstance(out, tuple) else out


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    return memory_efficient_attention(q, k, v)


_FROM_PACKAGE = {"fa2": _fa2, "fa4": _fa4, "xformers": _xformers}


@torch.library.custom_op("vidtta::package_attention", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """A package's attention as one operation that a compiler does not look into; without gradients alone."""
    return _FROM_PACKAGE[backend](q, k, v).contiguous()


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attend(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each head, [B, N, H, d], by one of BACKENDS; raises where that one cannot (compiled, those of
    PACKAGES cannot give gradients)."""
    if backend in PACKAGES:
        if torch.compiler.is_compiling():
            return _opaque(q_BNHD, k_BLHD, v_BLHD, backend)
        return _FROM_PACKAGE[backend](q_BNHD, k_BLHD, v_BLHD)
    if backend not in SDPA:
        raise ValueError(f"attention back end must be one of {list(BACKENDS)}, was {backend!r}")
    q, k, v = (t.transpose(1, 2) for t in (q_BNHD, k_BLHD, v_BLHD))
    if q.is_cuda and backend != "math":
        return _direct(q, k, v, backend).transpose(1, 2)
    with sdpa_kernel([SDPA[backend]]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _direct(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """The operation itself, which a compiler need not choose while it traces; the log-sum-exp is made where a backward needs it."""
    aten = torch.ops.aten
    if backend == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, backward)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, backward)[0]


@dataclass(frozen=True)
class Choice:
    """Which back end to use for each shape. pinned: one for all, which wins over what was measured."""

    forward: dict[str, str] = field(default_factory=dict)
    training: dict[str, str] = field(default_factory=dict)
    """Judged by forward and backward together."""
    pinned: str | None = None

    def __post_init__(self) -> None:
        for name in {*self.forward.values(), *self.training.values(), *([self.pinned] if self.pinned else [])}:
            if name not in BACKENDS:
                raise ValueError(f"attention back end must be one of {list(BACKENDS)}, was {name!r}")

    def backend(self, shape: Shape, training: bool) -> str:
        """Raises KeyError for a shape that was not measured, unless one is pinned."""
        if self.pinned is not None:
            return self.pinned
        measured = self.training if training else self.forward
        if shape.key not in measured:
            raise KeyError(f"attention of shape {shape.key} was not measured; measured are {sorted(measured)}")
        return measured[shape.key]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Choice":
        return cls(**json.loads(text))


def measure(
    shapes: Iterable[Shape],
    device: torch.device,
    dtype: torch.dtype,
    *,
    training: bool,
    backends: Iterable[str] = MEASURED,
    runs: int = 20,
) -> list[dict[str, Any]]:
    """A row for each shape and back end: milliseconds, relative error against float32, or why there are none. Plain JSON."""
    backends = list(backends)
    return [_measure_one(shape, name, device, dtype, training, runs) for shape in shapes for name in backends]


def choose(rows: Iterable[dict[str, Any]], pinned: str | None = None) -> Choice:
    """The fastest back end of each shape among rows of `measure`, of sampling and of training alike."""
    best: dict[tuple[bool, str], dict[str, Any]] = {}
    for row in rows:
        at = row["training"], row["shape"]
        if "milliseconds" in row and (at not in best or row["milliseconds"] < best[at]["milliseconds"]):
            best[at] = row
    picked = {
        training: {key: row["backend"] for (t, key), row in best.items() if t == training} for training in (False, True)
    }
    return Choice(picked[False], picked[True], pinned)


def _measure_one(
    shape: Shape, name: str, device: torch.device, dtype: torch.dtype, training: bool, runs: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": shape.key, "backend": name, "training": training}
    if training and torch.are_deterministic_algorithms_enabled() and name not in REPEATABLE:
        return row | {
            "refused": "deterministic algorithms are asked for, and its backward does not give the same bits twice"
        }
    generator = torch.Generator(device).manual_seed(0)

    def rand(length: int) -> Tensor:
        size = (shape.batch, length, shape.heads, shape.dim)
        return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_(training)

    q, k, v, dout = rand(shape.queries), rand(shape.keys), rand(shape.keys), rand(shape.queries).detach()

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            out = attend(q, k, v, name)
        return [out.detach(), *(torch.autograd.grad(out, (q, k, v), dout) if training else ())]

    try:
        found = step()
        row["error"] = max(_relative_error(a, b) for a, b in zip(found, _truth(q, k, v, dout, training), strict=True))
        if not row["error"] <= LARGEST_ERROR:
            return row | {"refused": f"relative error {row['error']:.2g}, allowed {LARGEST_ERROR}"}
        if torch.are_deterministic_algorithms_enabled():
            for _ in range(REPEATS):
                if not all(map(torch.equal, found, step())):
                    return row | {"refused": "it gave other bits the second time"}
        row["milliseconds"] = _median_ms(step, device, runs)
    except Exception as error:  # each package fails in ways of its own
        row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return row


def _truth(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, training: bool) -> list[Tensor]:
    """The first sequence alone, in float32 with every score in memory: enough to tell right from wrong at any size."""
    q, k, v, dout = (t[:1].detach().float().requires_grad_(training) for t in (q, k, v, dout))
    with torch.set_grad_enabled(training):
        out = attend(q, k, v, "math")
    return [out.detach(), *(torch.autograd.grad(out, (q, k, v), dout) if training else ())]


def _relative_error(actual: Tensor, truth: Tensor) -> float:
    return ((actual[:1].float() - truth).norm() / truth.norm()).item()


def _median_ms(call: Callable[[], Any], device: torch.device, runs: int) -> float:
    if device.type != "cuda":
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    for _ in range(3):
        call()
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for before, after in events:
        for _ in range(BUSY):
            flush.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in events)
