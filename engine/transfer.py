"""Small tensors between host and device without waiting for the device's other work."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on the device, in order with its work; from ordinary memory a copy would wait until that is done."""
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
