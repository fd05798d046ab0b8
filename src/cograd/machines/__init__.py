"""Gradients shared between machines over a network."""

from cograd.machines.dadao import DADAO, Graph, gossip_rates
from cograd.machines.dgc import DGC, DensityWarmup

__all__ = ["DADAO", "DGC", "DensityWarmup", "Graph", "gossip_rates"]
