"""AdamW over all parameters in one pass: gradient in, float32 master, moments and the weight in its own dtype out.

An element is read and written once, 28 bytes with 16-bit weights: gradient 2, master, first and second moment 8 each, weight 2.
The tensors lie where they are: a table holds their addresses, and a program takes CHUNK elements of one of them, so that a
thousand tensors are one launch (one for each dtype of the weights). A tensor without a gradient keeps its state and its count
of steps, as in torch. The gradients' L2 norm is one such pass too, its sums added in a fixed order: same inputs, same bits.
Source: arXiv:1711.05101, algorithm 2, with the operations of torch.optim.AdamW. Never part of compiled code, as addresses are read.
"""

# pyright: reportArgumentType=false
# (in a kernel a constexpr stands for the dtype that it holds)

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .common import cdiv, check, check_runs, jit

CHUNK = 16384  # elements of a program; powers of two, like those below
BLOCK = 1024  # of them at once: four a thread, more and the registers of a step leave room for few warps
SQUARES = 4096  # of them at once for the norm, which reads alone
WARPS = 8
ALIGNED = 16  # bytes, that the widest load wants

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Rates(NamedTuple):
    """lr: of this step. decay: decoupled weight decay."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float


def adamw_step_reference(
    master: Tensor, first: Tensor, second: Tensor, grad: Tensor, count: int, divisor: Tensor, rates: Rates
) -> tuple[Tensor, Tensor, Tensor]:
    """The mathematics, in the master's dtype: master and moments after step `count` (from 1) on grad / divisor."""
    lr, (beta1, beta2), eps, decay = rates
    grad = grad.to(master.dtype) / divisor.to(master.dtype)
    first = first.lerp(grad, 1 - beta1)
    second = second * beta2 + (1 - beta2) * grad * grad
    denominator = second.sqrt() / (1 - beta2**count) ** 0.5 + eps
    return master * (1 - lr * decay) - lr / (1 - beta1**count) * (first / denominator), first, second


def gradient_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, in float64."""
    return torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()


@jit
def _place(chunks_ptr, sizes_ptr, CHUNK: tl.constexpr):
    """A program's tensor, its first element there, and how many elements the tensor has."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk).to(tl.int64)
    return tensor, tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK, tl.load(sizes_ptr + tensor)


@jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, ALIGNED) if ALIGNED > 1 else pointer


@jit
def _step_block(
    grad_ptr, master_ptr, first_ptr, second_ptr, weight_ptr, at, mask, divisor, step, root, keep, new1, beta2, new2, eps,
    OWN: tl.constexpr,
):  # fmt: skip
    grad = tl.div_rn(tl.load(grad_ptr + at, mask=mask).to(tl.float32), divisor)
    first = tl.load(first_ptr + at, mask=mask)
    first += new1 * (grad - first)
    second = beta2 * tl.load(second_ptr + at, mask=mask) + new2 * grad * grad
    denominator = tl.div_rn(tl.sqrt_rn(second), root) + eps
    master = tl.load(master_ptr + at, mask=mask) * keep - step * tl.div_rn(first, denominator)
    tl.store(first_ptr + at, first, mask=mask)
    tl.store(second_ptr + at, second, mask=mask)
    tl.store(master_ptr + at, master, mask=mask)
    if not OWN:
        tl.store(weight_ptr + at, master.to(weight_ptr.dtype.element_ty), mask=mask)


@jit
def _step_kernel(
    chunks_ptr, sizes_ptr, addresses_ptr, grads_ptr, corrections_ptr, divisor_ptr, keep, new1, beta2, new2, eps,
    DTYPE: tl.constexpr, OWN: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk's step. addresses: [n, 4], of master, moments and weight; OWN: a weight is its own master."""
    tensor, start, size = _place(chunks_ptr, sizes_ptr, CHUNK)
    address = tl.load(grads_ptr + tensor)
    divisor = tl.load(divisor_ptr)
    if (address != 0) & (divisor > 0):
        grad_ptr = _pointer(address, DTYPE, ALIGNED)
        row = addresses_ptr + 4 * tensor
        master_ptr = _pointer(tl.load(row), tl.float32, ALIGNED)
        first_ptr = _pointer(tl.load(row + 1), tl.float32, ALIGNED)
        second_ptr = _pointer(tl.load(row + 2), tl.float32, ALIGNED)
        weight_ptr = _pointer(tl.load(row + 3), DTYPE, ALIGNED)
        step, root = tl.load(corrections_ptr + 2 * tensor), tl.load(corrections_ptr + 2 * tensor + 1)
        if start + CHUNK <= size:  # without a mask the loads are wide
            for block in range(0, CHUNK, BLOCK):
                at = start + block + tl.arange(0, BLOCK)
                _step_block(
                    grad_ptr, master_ptr, first_ptr, second_ptr, weight_ptr, at, None,
                    divisor, step, root, keep, new1, beta2, new2, eps, OWN,
                )  # fmt: skip
        else:
            for at_block in range(start, size, BLOCK):
                at = at_block + tl.arange(0, BLOCK)
                _step_block(
                    grad_ptr, master_ptr, first_ptr, second_ptr, weight_ptr, at, at < size,
                    divisor, step, root, keep, new1, beta2, new2, eps, OWN,
                )  # fmt: skip


@jit
def _square_kernel(
    chunks_ptr, sizes_ptr, grads_ptr, out_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk's sum of squares; zero without a gradient."""
    tensor, start, size = _place(chunks_ptr, sizes_ptr, CHUNK)
    address = tl.load(grads_ptr + tensor)
    total = tl.zeros((BLOCK,), tl.float32)
    if address != 0:
        grad_ptr = _pointer(address, DTYPE, ALIGNED)
        if start + CHUNK <= size:
            for block in range(0, CHUNK, BLOCK):
                grad = tl.load(grad_ptr + (start + block + tl.arange(0, BLOCK))).to(tl.float32)
                total += grad * grad
        else:
            for at_block in range(start, size, BLOCK):
                at = at_block + tl.arange(0, BLOCK)
                grad = tl.load(grad_ptr + at, mask=at < size, other=0.0).to(tl.float32)
                total += grad * grad
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


class _Group:
    """The tensors of one dtype, own: whose weights are their masters. which: their numbers among all parameters."""

    def __init__(self, dtype: torch.dtype, own: bool, which: list[int], columns: list[list[Tensor]]) -> None:
        self.dtype, self.own, self.which = dtype, own, which
        weights = columns[-1]
        device, sizes = weights[0].device, [w.numel() for w in weights]
        pieces = torch.tensor([cdiv(size, CHUNK) for size in sizes])
        numbers = torch.arange(len(sizes)).repeat_interleave(pieces)
        places = torch.arange(len(numbers)) - (pieces.cumsum(0) - pieces)[numbers]
        self.chunks = torch.stack([numbers, places], 1).int().to(device)  # [chunks, 2]: tensor, chunk of it
        self.sizes = torch.tensor(sizes).to(device)
        addresses = [[t.data_ptr() for t in row] for row in zip(*columns, strict=True)]
        self.addresses = torch.tensor(addresses).to(device)  # [n, 4]: master, first, second, weight
        self.wide = all(address % ALIGNED == 0 for row in addresses for address in row)
        self.counts = torch.zeros(len(sizes), dtype=torch.float64, device=device)
        self.pointed: list[int] = []
        self.grads = self.given = torch.empty(0)
        self.options: dict[str, object] = {}

    def point(self, addresses: list[int]) -> None:
        """Take the gradients' addresses, 0 where there is none."""
        if addresses != self.pointed:
            self.pointed, device = addresses, self.counts.device
            self.grads = torch.tensor(addresses).to(device, non_blocking=True)
            self.given = (self.grads != 0).double()
            wide = self.wide and all(address % ALIGNED == 0 for address in addresses)
            aligned = ALIGNED if wide else 1
            self.options = {"DTYPE": DTYPES[self.dtype], "ALIGNED": aligned, "CHUNK": CHUNK, "num_warps": WARPS}


class AdamWState:
    """Parameters with their masters, and AdamW's moments and counts of steps, which start from zero.

    weights, masters: contiguous, on one device, of equal shapes; masters float32, and a float32 weight may be its own. All keep
    their storage. Raises ValueError for what the kernels do not take.
    """

    def __init__(self, weights: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
        self.weights, self.masters = [w.detach() for w in weights], [m.detach() for m in masters]
        groups: dict[tuple[torch.dtype, bool], list[int]] = {}
        for i, (weight, master) in enumerate(zip(self.weights, self.masters, strict=True)):
            check_runs("adamw_step", weight)
            check(
                master.dtype == torch.float32 and master.shape == weight.shape and master.device == weight.device
                and weight.device == self.weights[0].device and weight.is_contiguous() and master.is_contiguous(),
                f"adamw_step: weight {i} is {weight.dtype} {list(weight.shape)} on {weight.device}, its master {master.dtype} "
                f"{list(master.shape)} on {master.device}; they must be contiguous, alike, on one device, the master float32",
            )  # fmt: skip
            if weight.numel():
                groups.setdefault((weight.dtype, weight.data_ptr() == master.data_ptr()), []).append(i)
        self.first, self.second = ([torch.zeros_like(m) for m in self.masters] for _ in range(2))
        columns = self.masters, self.first, self.second, self.weights
        self.groups = [_Group(*key, which, [[c[i] for i in which] for c in columns]) for key, which in groups.items()]
        self.held: list[Tensor] | None = None

    def point(self, grads: Sequence[Tensor | None]) -> None:
        """Say where this step's gradients lie, None for a parameter that is left as it is; they are held until the step.

        Of their weight's shape and dtype. Copies addresses to the device only where these changed; waits for nothing.
        """
        self.held = []
        for group in self.groups:
            addresses = []
            for i in group.which:
                grad = grads[i]
                if grad is not None:
                    if grad.dtype != group.dtype or grad.shape != self.weights[i].shape:
                        raise ValueError(
                            f"adamw_step: gradient {i} is {grad.dtype} {list(grad.shape)}, "
                            f"its weight {group.dtype} {list(self.weights[i].shape)}"
                        )
                    grad = grad.contiguous()
                    self.held.append(grad)
                addresses.append(0 if grad is None else grad.data_ptr())
            group.point(addresses)


def gradient_norm(state: AdamWState) -> Tensor:
    """L2 norm over all gradients that `point` named, a float32 scalar on the device; the same bits for the same gradients."""
    assert state.held is not None, "say where the gradients lie"
    parts = [torch.empty(len(g.chunks), dtype=torch.float32, device=g.counts.device) for g in state.groups]
    for group, part in zip(state.groups, parts, strict=True):
        _square_kernel[(len(part),)](group.chunks, group.sizes, group.grads, part, BLOCK=SQUARES, **group.options)
    # Each part is a sum of at most CHUNK squares; adding the parts in float64 leaves their rounding alone.
    return torch.cat(parts).double().sum().sqrt().float()


def adamw_step(state: AdamWState, divisor: Tensor, rates: Rates) -> None:
    """One step on the gradients that `point` named, each divided by `divisor` (a float32 scalar on the device), in place. A divisor
    of NaN leaves all as it is: a step that must not be taken.

    What the host knows of the step are numbers that compile nothing anew; nothing is asked of the device.
    """
    assert state.held is not None, "say where the gradients of this step lie"
    lr, (beta1, beta2), eps, decay = rates
    taken = (divisor > 0).double()
    for group in state.groups:
        group.counts += group.given * taken
        corrections = torch.stack([lr / (1 - beta1**group.counts), (1 - beta2**group.counts).sqrt()], 1).float()
        _step_kernel[(len(group.chunks),)](
            group.chunks, group.sizes, group.addresses, group.grads, corrections, divisor,
            1.0 - lr * decay, 1.0 - beta1, float(beta2), 1.0 - beta2, float(eps),
            OWN=group.own, BLOCK=BLOCK, **group.options,
        )  # fmt: skip
    state.held = None
