"""Muon against PyTorch's own, and what it is for."""

import pytest
import torch
from torch import nn
from vidtta.engine.demo.muon import Muon, orthogonalised

from ..tiny import noise

SHAPES = [(6, 6), (6, 24), (24, 6), (6, 6), (18, 6)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_it_takes_the_steps_of_pytorchs():
    ours, theirs = ([nn.Parameter(noise(k, *shape)) for k, shape in enumerate(SHAPES)] for _ in range(2))
    mine = Muon(ours, 0.02)
    reference = torch.optim.Muon(theirs, 0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.02 / (step + 1)
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad, b.grad = (noise(100 * step + k, *a.shape).clone() for _ in range(2))
        mine.step()
        reference.step()
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        moved = (b - noise(k, *b.shape)).norm()
        # Both iterate in bfloat16 and round apart.
        assert (a - b).norm() < 0.03 * moved, SHAPES[k]


def test_singular_values_come_to_about_one():
    values = torch.linalg.svdvals(orthogonalised(noise(1, 3, 8, 20)).float())
    assert ((values > 0.6) & (values < 1.3)).all()
