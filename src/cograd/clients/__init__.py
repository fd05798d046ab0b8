"""Updates shared between federated clients and a server."""

from cograd.clients.fedcac import FedCAC, critical_mask, mask_overlap
from cograd.clients.fedfix import FedFix
from cograd.clients.fedlex import FedLEx, LocalAdam, guidance_matrix, scale_gradients, squared_travel
from cograd.clients.fedspeed import FedSpeed, ProxCorrectedSAM

__all__ = [
    "FedCAC",
    "FedFix",
    "FedLEx",
    "FedSpeed",
    "LocalAdam",
    "ProxCorrectedSAM",
    "critical_mask",
    "guidance_matrix",
    "mask_overlap",
    "scale_gradients",
    "squared_travel",
]
