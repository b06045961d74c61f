"""Parts of a layer that training computes again in the backward pass rather than keep, for the same bits (arXiv:1604.06174).

rotation       queries, keys and values, from their projection, where their norms are trained: three widths of the network a token, for
               one pass of the kernel (and one where the regions of windowed attention are laid together)
hidden         what enters GELU in a frozen MLP, from the residual stream: four widths, for a norm and a product
half_hidden    the same in every other layer, those of windowed attention: half the memory for half the time
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T = TypeVar("T", list[Tensor], tuple[Tensor, Tensor])
Again = Literal["rotation", "hidden", "half_hidden"]

_aten = torch.ops.aten
_KEPT = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
}
"""What is too dear to compute again. Attention of packages is no operation that torch sees here: outside a compiled step it would run
twice."""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def again(function: Callable[..., T], *inputs: Any) -> T:
    """function(*inputs); of what it computes, only attention's results are kept. It may hold no randomness."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)  # type: ignore[return-value]
