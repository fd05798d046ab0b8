"""Gradients shared between machines over a network."""

from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.streaming_diloco import E3M0, StreamingDiLoCo

__all__ = ["DGC", "E3M0", "DensityWarmup", "StreamingDiLoCo"]
