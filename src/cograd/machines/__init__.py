"""Gradients shared between machines over a network."""

from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.linear_sketch import GaussianDP, LinearSketch, Sketch, SketchedFedAvg

__all__ = ["DGC", "DensityWarmup", "GaussianDP", "LinearSketch", "Sketch", "SketchedFedAvg"]
