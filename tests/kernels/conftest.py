"""Without a GPU the kernels run under Triton's interpreter, which must be chosen before they are decorated."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def new_tensors_hold_nan() -> Iterator[None]:
    """torch fills what torch.empty gives with NaN in this mode: an element that a kernel forgets is seen."""
    with pytest.MonkeyPatch.context() as patch:
        # The engine switches the filling off for its own speed, for the whole process.
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)
