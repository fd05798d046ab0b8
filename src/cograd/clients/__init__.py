"""Updates shared between federated clients and a server."""

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
from cograd.clients.fedspeed import FedSpeed, ProxCorrectedSAM

__all__ = [
    "ClientCurriculum",
    "Curriculum",
    "DataCurriculum",
    "Expert",
    "FedCAC",
    "FedFix",
    "FedSpeed",
    "PacedSGD",
    "PacedSampler",
    "Pacing",
    "ProxCorrectedSAM",
    "critical_mask",
    "mask_overlap",
]
