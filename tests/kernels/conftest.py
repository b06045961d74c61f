"""What every kernel test is run under."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def new_tensors_hold_nan() -> Iterator[None]:
    """torch fills what torch.empty gives with NaN in this mode: an element that a kernel forgets is seen."""
    with pytest.MonkeyPatch.context() as patch:
        # The engine switches the filling off for its own speed, for the whole process.
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)
