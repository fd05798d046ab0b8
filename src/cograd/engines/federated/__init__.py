"""Federated clients and their server: the protocol, and the engine that simulates it in one process."""

from cograd.data.clients import ClientData, Clients, matching
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import (
    Action,
    After,
    ClientContext,
    Content,
    Event,
    Lost,
    Method,
    NoReplies,
    Reply,
    Send,
    Session,
    Start,
    State,
    Synchronous,
    Task,
    Timer,
    mean_of,
    sizes_of,
    sum_of,
)
from cograd.engines.federated.row import Row
from cograd.engines.federated.samplers import Available, Bernoulli, Cyclic, Everyone, Sampler, Uniform
from cograd.engines.federated.simulation import Simulation
from cograd.engines.federated.training import LocalSGD
from cograd.engines.federated.workers import ClientError, NotFinite

__all__ = [
    "Action",
    "After",
    "Available",
    "Bernoulli",
    "ClientContext",
    "ClientData",
    "ClientError",
    "Clients",
    "Content",
    "Cyclic",
    "Event",
    "Everyone",
    "LocalModel",
    "LocalSGD",
    "Lost",
    "Method",
    "NoReplies",
    "NotFinite",
    "Reply",
    "Row",
    "Sampler",
    "Send",
    "Session",
    "Simulation",
    "Start",
    "State",
    "Synchronous",
    "Task",
    "Timer",
    "Uniform",
    "matching",
    "mean_of",
    "sizes_of",
    "sum_of",
]
