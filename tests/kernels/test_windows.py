"""Regions of windows as views of grouped rows."""

import torch
from vidtta.kernels.windows import Grid, regions, split_windows

from tests.kernels.accuracy import DEVICE, rand


def test_the_gradient_of_regions_is_one_concatenation():
    """A slice each would fill the rows of all others with zeros, and add as many tensors of them as there are regions."""
    grid = Grid(2, 11, 9)
    rows = rand(grid.tokens, 3).requires_grad_()
    views = split_windows(rows, 1, grid)
    assert len(views) == len(regions(grid)) == 4
    assert {view.grad_fn.next_functions[0][0].name() for view in views if view.grad_fn} == {"SplitWithSizesBackward0"}
    weights = [rand(*view.shape, seed=k) for k, view in enumerate(views)]
    (gradient,) = torch.autograd.grad(sum((v * w).sum() for v, w in zip(views, weights, strict=True)), rows)  # type: ignore[arg-type]
    assert torch.equal(gradient, torch.cat([w.flatten(0, 1) for w in weights]).to(DEVICE))
