"""What the methods of this room are compared with, from the same code path."""

from cograd.machines.baselines.full_gradient import Backprop, FullZeroth
from cograd.machines.baselines.gradient_dropping import GradientDropping

__all__ = ["Backprop", "FullZeroth", "GradientDropping"]
