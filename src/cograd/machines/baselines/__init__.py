"""What the methods of this room are compared with, from the same code path."""

from cograd.machines.baselines.bitmap_topk import BitmapTopK
from cograd.machines.baselines.diloco import DiLoCo, LocalAveraging
from cograd.machines.baselines.gradient_dropping import GradientDropping

__all__ = ["BitmapTopK", "DiLoCo", "GradientDropping", "LocalAveraging"]
