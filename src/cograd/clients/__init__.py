"""Updates shared between federated clients and a server."""

from cograd.clients.fedcac import FedCAC, critical_mask, mask_overlap
from cograd.clients.fedfix import FedFix
from cograd.clients.fedspeed import FedSpeed, ProxCorrectedSAM
from cograd.clients.fzoos import FZooS

__all__ = ["FZooS", "FedCAC", "FedFix", "FedSpeed", "ProxCorrectedSAM", "critical_mask", "mask_overlap"]
