"""Gradients shared between machines over a network."""

from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.single_merging import DecentralizedTrainer, Mixing, Schedule, SingleMerging

__all__ = ["DGC", "DecentralizedTrainer", "DensityWarmup", "Mixing", "Schedule", "SingleMerging"]
