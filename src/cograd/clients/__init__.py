"""Updates shared between federated clients and a server."""

from cograd.clients.fedcac import FedCAC, critical_mask, mask_overlap
from cograd.clients.fedspeed import FedSpeed

__all__ = ["FedCAC", "FedSpeed", "critical_mask", "mask_overlap"]
