"""Gradients shared between machines over a network."""

from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.diff2 import BVRLocalSGD, Diff2, Diff2Plan, GDRoutine

__all__ = ["DGC", "BVRLocalSGD", "DensityWarmup", "Diff2", "Diff2Plan", "GDRoutine"]
