"""Updates shared between federated clients and a server."""

from cograd.clients.aglfop import AGLFOP, ClientJoint
from cograd.clients.curricula import (
    ClientCurriculum,
    Curriculum,
    DataCurriculum,
    Expert,
    PacedSampler,
    PacedSGD,
    Pacing,
)
from cograd.clients.fedcac import FedCAC, critical_mask, mask_overlap
from cograd.clients.fedfix import FedFix
from cograd.clients.fedld import FedLD, MarginControl, PrincipalGradient, loss_decomposition
from cograd.clients.fedlex import FedLEx, LocalAdam, guidance_matrix, scale_gradients, squared_travel
from cograd.clients.fedspeed import FedSpeed, ProxCorrectedSAM
from cograd.clients.fzoos import FZooS
from cograd.clients.hyperfl import HyperFL

__all__ = [
    "AGLFOP",
    "ClientCurriculum",
    "ClientJoint",
    "Curriculum",
    "DataCurriculum",
    "Expert",
    "FZooS",
    "FedCAC",
    "FedFix",
    "FedLD",
    "FedLEx",
    "FedSpeed",
    "HyperFL",
    "LocalAdam",
    "MarginControl",
    "PacedSGD",
    "PacedSampler",
    "Pacing",
    "PrincipalGradient",
    "ProxCorrectedSAM",
    "critical_mask",
    "guidance_matrix",
    "loss_decomposition",
    "mask_overlap",
    "scale_gradients",
    "squared_travel",
]
