"""Activation checkpointing: what a clip that ran out of memory is tried again with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .models.stdit3 import STDiT3


@contextmanager
def recomputed(dit: STDiT3) -> Iterator[None]:
    """Inside, each layer keeps its input alone for the backward pass and computes the rest again there (arXiv:1604.06174).

    The same operations on the same numbers, so the same gradients to the bit; memory falls from all activations to one layer's
    and the layers' inputs, time grows by a forward pass a step. Layers hold no randomness.
    """

    def kept_small(forward: Callable[..., Any]) -> Callable[..., Any]:
        def again(*inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*inputs)
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

        return again

    own = [layer.__dict__.get("forward") for layer in dit.layers]
    for layer in dit.layers:
        layer.forward = kept_small(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(dit.layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
