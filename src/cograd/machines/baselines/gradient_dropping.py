"""Gradient dropping (Aji & Heafield 2017, arXiv:1704.05021), as DGC's paper uses it (Algorithm 1, Eq. 5).

What accumulates on a worker is the gradient itself, v <- v + g; the momentum is applied by everyone to the
sum of what was sent. No masking, no local clipping, no warm-up unless asked for.
"""

from __future__ import annotations

from torch import Tensor

from cograd.core.transforms import Accumulate, Transform
from cograd.machines.dgc import DGC, DensityWarmup


class GradientDropping(DGC):
    """DGC's exchange without its corrections; arguments as there."""

    def __init__(
        self,
        density: float = 0.001,
        momentum: float = 0.9,
        *,
        nesterov: bool = False,
        warmup: DensityWarmup | None = None,
        sample_ratio: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(
            density,
            momentum,
            nesterov=nesterov,
            masking=False,
            warmup=warmup,
            sample_ratio=sample_ratio,
            seed=seed,
        )

    @property
    def local(self) -> tuple[Transform, ...]:
        return (Accumulate(),)

    def after(self, update: Tensor) -> None:
        self._apply_velocity(update)

    def _hand_over(self) -> None:
        """The velocity is the sum's before and after sparsification begins."""

    def _replicated(self) -> list[str]:
        return [s.name for s in self.space]
