"""The network is one graph for the compiler, and the same graph for every clip of one shape."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from vidtta.engine.models.stdit3 import Caption

from tests.engine.test_stdit3 import PIXELS, Case, noise


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(case: Case, seed: int, length: int = 6) -> tuple[Any, ...]:
    """Another latent, timestep, caption and geometry object of one shape."""
    model, caption = case.model, Caption(noise(seed, 1, length, 8))
    texts = model.text_states(caption), model.text_states(model.null_caption(caption))
    tables = model.geometry(case.geometry.frames, case.geometry.latent_size, PIXELS, (2, 0))
    return noise(seed, *case.x.shape), torch.tensor([float(seed)]), case.fps, *texts, tables, case.condition


def counted(case: Case) -> tuple[CompileCounter, Any]:
    counter = CompileCounter()
    return counter, torch.compile(case.model, fullgraph=True, backend=counter)


@pytest.mark.parametrize("grad", [False, True], ids=["sampling", "adapting"])
def test_one_graph_serves_all_clips_of_a_shape(grad: bool):
    case = Case(frames=3, size=(18, 10), known=(2, 0), depth=1)
    counter, compiled = counted(case)
    with torch.set_grad_enabled(grad):
        for seed in (1, 2, 3):
            arguments = inputs(case, seed)
            actual: Tensor = compiled(*arguments)
            assert torch.equal(actual, case.model(*arguments))
    assert counter.frame_count == 1


def test_another_caption_length_compiles_once_more():
    """The second length makes the length symbolic; from then on every length of two or more shares that graph."""
    case = Case(frames=3, size=(8, 8), known=(2, 0), depth=1)
    counter, compiled = counted(case)
    with torch.no_grad():
        graphs = []
        for length in (6, 6, 4, 3, 5, 2):
            compiled(*inputs(case, 1, length))
            graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2, 2, 2]
