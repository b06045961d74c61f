"""Make the registry's torchvision importable beside a CPU-only torch.

Its compiled operators need CUDA libraries, and importing it then fails on the missing schema of `torchvision::nms`. Nothing
here uses those operators, so their schemas are declared (without an implementation: calling one still raises).
"""

import torch

_declared: list[torch.library.Library] = []  # keeps the declarations alive


def declare_missing_operators() -> None:
    """Declare `nms` and `qnms` on a torch with neither CUDA nor ROCm. Call before the first import of torchvision, lpips or T5."""
    if torch.version.cuda or torch.version.hip or _declared:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
