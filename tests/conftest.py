from typing import Any

import pytest
from vidtta.engine.torchvision_ops import declare_missing_operators

declare_missing_operators()


@pytest.fixture
def float8_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own cast to float8 is wrong (test_quantize_rows.py), so torch's stands in for it; all else of a kernel is
    interpreted. On a GPU nothing is to do."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter
    from vidtta.kernels.common import INTERPRETED

    if not INTERPRETED:
        return
    own: Any = interpreter._convert_float

    def convert(data, source, target, rounding):
        if target != tl.float8e4nv:
            return own(data, source, target, rounding)
        assert data.dtype == np.float32
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
