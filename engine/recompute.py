"""Activation checkpointing: what a clip that ran out of memory is tried again with."""

from collections.abc import Iterator
from contextlib import contextmanager

from .models.stdit3 import STDiT3


@contextmanager
def recomputed(dit: STDiT3) -> Iterator[None]:
    """Inside, each layer keeps its input alone for the backward pass and computes the rest again there (arXiv:1604.06174).

    The same operations on the same numbers, so the same gradients to the bit, on the plain path and on the fast ones; memory falls
    from all activations to one layer's and the layers' inputs, time grows by a forward pass a step. Layers hold no randomness.
    """
    before, dit.recompute = dit.recompute, True
    try:
        yield
    finally:
        dit.recompute = before
