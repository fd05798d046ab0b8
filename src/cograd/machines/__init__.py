"""Gradients shared between machines over a network."""

from cograd.machines.dadao import DADAO, Graph, gossip_rates
from cograd.machines.dgc import DGC, DensityWarmup
from cograd.machines.diff2 import BVRLocalSGD, Diff2, Diff2Plan, GDRoutine
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
from cograd.machines.linear_sketch import GaussianDP, LinearSketch, Sketch, SketchedFedAvg
from cograd.machines.one_byte import LocalPeers, LogByte, OneByte
from cograd.machines.single_merging import DecentralizedTrainer, Mixing, Schedule, SingleMerging
from cograd.machines.streaming_diloco import E3M0, StreamingDiLoCo

__all__ = [
    "DADAO",
    "DGC",
    "E3M0",
    "GC",
    "MSGC",
    "SRSGC",
    "BVRLocalSGD",
    "CyclicGC",
    "CyclicMDS",
    "DecentralizedTrainer",
    "DensityWarmup",
    "Diff2",
    "Diff2Plan",
    "GDRoutine",
    "GaussianDP",
    "GilbertElliott",
    "GradientCoding",
    "Graph",
    "Learner",
    "LinearSketch",
    "LocalPeers",
    "LogByte",
    "MailboxCluster",
    "Mixing",
    "OneByte",
    "RepetitionGC",
    "Schedule",
    "SimulatedCluster",
    "SingleMerging",
    "Sketch",
    "SketchedFedAvg",
    "StreamingDiLoCo",
    "Trace",
    "Uncoded",
    "gossip_rates",
    "select",
]
