"""Same inputs, same bits: deterministic algorithms for everything the engine runs."""

import os

import torch


def make_deterministic() -> None:
    """Let torch use deterministic algorithms alone; an operation that has none raises. Call before the first work on a GPU.

    Without this, the backward pass of attention on a GPU adds in an order that differs from run to run. On an H200 it makes
    a training step of the plain path slower by a tenth to a half (runs on several machines).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor costs a pass over memory, and nothing here reads what it did not write.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (set on a module's hidden class)
