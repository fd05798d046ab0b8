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
from cograd.machines.one_byte import LocalPeers, LogByte, OneByte

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
    "LocalPeers",
    "LogByte",
    "MailboxCluster",
    "OneByte",
    "RepetitionGC",
    "SimulatedCluster",
    "Trace",
    "Uncoded",
    "select",
]
