"""Weights made from their names, so that two implementations can be compared without a checkpoint."""

import math
import zlib

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def fill_by_rule(module: nn.Module, skip: tuple[str, ...] = ("freqs",)) -> None:
    """Fill every tensor of `module.state_dict()` in place, as a function of its key and shape alone.

    For key k: n = numpy.random.default_rng(crc32(k)).standard_normal(shape), rounded to float32. A tensor of two or
    more dimensions becomes n / sqrt(product of shape[1:]); of one dimension, 1 + 0.1 n where k ends in "weight" (the
    scale of a norm), else 0.1 n; cast to the tensor's dtype. Keys that end in one of `skip` keep their value.
    Pass the whole model: a part of it has other keys (those of a VAE start with "encoder." and "decoder.").
    """
    for key, tensor in module.state_dict().items():
        if key.endswith(skip):
            continue
        assert not tensor.is_meta, f"{key} has no storage to fill"
        normal = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tensor.shape).astype(np.float32)
        if tensor.dim() >= 2:
            normal /= math.sqrt(math.prod(tensor.shape[1:]))
        else:
            normal = 0.1 * normal + (1.0 if key.endswith("weight") else 0.0)
        tensor.copy_(torch.as_tensor(normal))
