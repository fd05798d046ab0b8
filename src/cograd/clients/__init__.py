"""Updates shared between federated clients and a server."""

from cograd.clients.fedspeed import FedSpeed, ProxCorrectedSAM

__all__ = ["FedSpeed", "ProxCorrectedSAM"]
