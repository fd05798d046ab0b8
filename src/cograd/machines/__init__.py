"""Gradients shared between machines over a network."""

from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.gradient_coding import (
    GC,
    MSGC,
    SRSGC,
    CyclicGC,
    CyclicMDS,
    GilbertElliott,
    GradientCoding,
    Learner,
    MailboxCluster,
    RepetitionGC,
    SimulatedCluster,
    Trace,
    Uncoded,
    select,
)

__all__ = [
    "DGC",
    "GC",
    "MSGC",
    "SRSGC",
    "CyclicGC",
    "CyclicMDS",
    "DensityWarmup",
    "GilbertElliott",
    "GradientCoding",
    "Learner",
    "MailboxCluster",
    "RepetitionGC",
    "SimulatedCluster",
    "Trace",
    "Uncoded",
    "select",
]
