"""Updates shared between federated clients and a server."""

from cograd.clients.fedfix import FedFix
from cograd.clients.fedspeed import FedSpeed

__all__ = ["FedFix", "FedSpeed"]
