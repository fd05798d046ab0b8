"""Gaussian noise on clipped gradients, and what it guarantees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianDP:
    """Differential privacy of every client's examples: clip, sum, add Gaussian noise.

    A local step samples each example with probability ``sampling_rate``, clips its gradient to norm ``clip``,
    and divides the sum plus N(0, (noise_multiplier * clip)^2 I) by the expected number of examples (so the
    noise of the mean has sigma = noise_multiplier * clip / (sampling_rate * n)). R_t is public and independent
    of the data: sketching what came out is post-processing and changes no guarantee.

    ``noise_in="sketch"`` instead adds the noise to the sketch, b numbers instead of d. The sketch of a clipped
    gradient has sensitivity clip * ||R||, which `Sketch.norm` must bound, and only one local step is allowed:
    the second would start from what was not yet made private.

    The guarantee is for adding or removing one example of one client, against whoever sees all of its
    sketches; the number of its examples is public, ``delta`` is the user's, and noise is float32 arithmetic,
    with no defence against attacks on its last bits.

    Raises ValueError at construction for an argument out of range.
    """

    clip: float
    noise_multiplier: float
    delta: float
    sampling_rate: float = 1.0
    noise_in: Literal["gradient", "sketch"] = "gradient"

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be a positive number; got {self.clip}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be a number >= 0; got {self.noise_multiplier}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1); got {self.delta}")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1]; got {self.sampling_rate}")
        if self.noise_in not in ("gradient", "sketch"):
            raise ValueError(f"noise_in must be gradient or sketch; got {self.noise_in!r}")

    def epsilon(self, steps: int) -> float:
        """Epsilon at ``delta`` of ``steps`` local steps, by Renyi accounting of the sampled Gaussian mechanism.

        Infinite without noise. Needs dp-accounting (the extra ``privacy``).
        """
        if steps < 0:
            raise ValueError(f"steps must be >= 0; got {steps}")
        if not steps:
            return 0.0
        if not self.noise_multiplier:
            return math.inf
        try:
            import dp_accounting
            from dp_accounting.rdp import RdpAccountant
        except ImportError as error:
            raise ImportError("accounting needs dp-accounting: pip install 'cograd[privacy]'") from error
        event = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, event)
        return float(RdpAccountant().compose(event, steps).get_epsilon(self.delta))

    @classmethod
    def for_epsilon(
        cls,
        epsilon: float,
        steps: int,
        *,
        clip: float,
        delta: float,
        sampling_rate: float = 1.0,
        noise_in: Literal["gradient", "sketch"] = "gradient",
    ) -> GaussianDP:
        """The least noise, within 0.1 %, whose ``steps`` steps stay within ``epsilon`` (infinity: no noise)."""
        if not epsilon > 0:
            raise ValueError(f"epsilon must be > 0; got {epsilon}")

        def with_noise(multiplier: float) -> GaussianDP:
            return cls(clip, multiplier, delta, sampling_rate, noise_in)

        if epsilon == math.inf:
            return with_noise(0.0)
        high = 1.0
        while with_noise(high).epsilon(steps) > epsilon:
            high *= 2
        low = high / 2 if high > 1 else 0.0
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if with_noise(middle).epsilon(steps) > epsilon else (low, middle)
        return with_noise(high)


def clipped_sum(gradients: Tensor, clip: float) -> Tensor:
    """Per-example gradients (n, d) -> the sum (d,) of each scaled to norm ``clip`` at most."""
    norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    total: Tensor = (gradients * (clip / norms.clamp_min(clip))).sum(0)
    return total
