"""Feature caching across sampling steps: between refreshes the later layers are not run; what they last added is added again.

Kept is a residual, x after the last layer - x before the first cached one, as in the Delta-Cache of Delta-DiT (arXiv:2406.01125):
the step's own input, which the layers before have computed anew, passes through. The schedule is fixed, as in DeepCache
(arXiv:2312.00858) and FORA (arXiv:2407.01425): no threshold on what a clip holds decides, so all clips and arms skip the same work.
Embeddings, timestep modulation, the first layers and the final layer are computed at every step.

A residual belongs to one guidance branch. Branches that run in one batch are refreshed together: where one of them has no residual,
or one that was computed `every` steps ago or earlier (a step without guidance refreshes the prompt's alone), all are.
sampler.md has what this costs in quality.
"""

from collections import Counter
from collections.abc import Callable

from torch import Tensor

from .models.stdit3 import Embedded


class FeatureCache:
    """The residuals of one continuation, a row of [branches, N, D] for each guidance branch, in the model's dtype.

    every: steps that a residual serves, the one that computed it included; first: layers before the cached ones; layers: all of the
    network. The storage stays the same from the first step on. counts: evaluations of a layer, a branch each, that were `computed`
    and `reused`. Raises ValueError where no layer is left to cache.
    """

    def __init__(self, every: int, first: int, layers: int, branches: int = 3) -> None:
        if every < 1 or not 0 <= first < layers:
            raise ValueError(f"every must be at least 1 and first in 0 .. {layers - 1}, were {every} and {first}")
        self.every, self.first, self.layers = every, first, layers
        self.counts: Counter[str] = Counter(computed=0, reused=0)
        self._step = -1
        self._computed_at: list[int | None] = [None] * branches
        self._residual_BND: Tensor | None = None

    def next_step(self) -> None:
        """Another step of the sampler begins."""
        self._step += 1

    def run(self, branches: slice, state: Embedded, layers: Callable[..., Embedded]) -> Embedded:
        """The state of a batch of these branches after all layers. layers(state, start=, stop=) runs some of them."""
        state = layers(state, stop=self.first)
        before_BND = state.tokens
        if reused := self._serves(branches):
            assert self._residual_BND is not None
            state = state._replace(tokens=before_BND + self._residual_BND[branches])
        else:
            state = layers(state, start=self.first)
            self._keep(branches, state.tokens - before_BND)
        B, cached = before_BND.shape[0], (self.layers - self.first) * reused
        self.counts.update(computed=B * (self.layers - cached), reused=B * cached)
        return state

    def _serves(self, branches: slice) -> bool:
        """Whether each of these branches has a residual of fewer than `every` steps ago."""
        return all(at is not None and self._step - at < self.every for at in self._computed_at[branches])

    def _keep(self, branches: slice, residual_BND: Tensor) -> None:
        if self._residual_BND is None:
            self._residual_BND = residual_BND.new_empty(len(self._computed_at), *residual_BND.shape[1:])
        self._residual_BND[branches] = residual_BND
        self._computed_at[branches] = [self._step] * residual_BND.shape[0]
