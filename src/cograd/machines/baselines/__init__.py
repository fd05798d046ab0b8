"""What the methods of this room are compared with, from the same code path."""

from cograd.machines.baselines.fetchsgd import FetchSGD
from cograd.machines.baselines.gradient_dropping import GradientDropping

__all__ = ["FetchSGD", "GradientDropping"]
