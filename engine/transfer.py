"""Small tensors between host and device without waiting for the device's other work."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of the CPU on a device, in a dtype, rounded before. A GPU finishes its work before it takes ordinary memory of the
    CPU, and stands still until there is new work; it takes page-locked memory in its turn."""
    tensor = tensor.to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@torch.no_grad()
def on_its_way(numbers: Sequence[Tensor]) -> Callable[[], list[float]]:
    """Begin to bring scalars of one device to the host. What is returned gives them; it waits for the work that they came from, not
    for what was asked of the device since."""
    together = torch.stack([number.double() for number in numbers])
    if not together.is_cuda:
        return together.tolist
    host = torch.empty(len(numbers), dtype=torch.float64, pin_memory=True)
    host.copy_(together, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return wait
