"""FZooS: gradients from what has been asked already, shared as random features (arXiv 2308.04077)."""

from cograd.clients.fzoos.features import RandomFeatures
from cograd.clients.fzoos.gp import GPSurrogate, Posterior
from cograd.clients.fzoos.method import Active, FZooS, TrajectoryGradient
from cograd.clients.fzoos.optimizers import SGD, Adam
from cograd.clients.fzoos.oracle import BlackBox, Oracle
from cograd.clients.fzoos.rounds import Description, LocalGradient, ZerothOrder

__all__ = [
    "SGD",
    "Active",
    "Adam",
    "BlackBox",
    "Description",
    "FZooS",
    "GPSurrogate",
    "LocalGradient",
    "Oracle",
    "Posterior",
    "RandomFeatures",
    "TrajectoryGradient",
    "ZerothOrder",
]
