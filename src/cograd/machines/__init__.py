"""Gradients shared between machines over a network."""

from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.one_byte import LocalPeers, LogByte, OneByte

__all__ = ["DGC", "DensityWarmup", "LocalPeers", "LogByte", "OneByte"]
