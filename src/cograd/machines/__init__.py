"""Gradients shared between machines over a network."""

from cograd.machines.dgc import DGC, DensityWarmup

__all__ = ["DGC", "DensityWarmup"]
