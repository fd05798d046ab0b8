"""What federated methods are compared with: published methods that are not among the library's own, by the same
protocol."""

from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.fedper import FedPer
from cograd.clients.baselines.fedrep import FedRep
from cograd.clients.baselines.fine_tuned import FineTuned
from cograd.clients.baselines.local_only import LocalOnly
from cograd.clients.baselines.scaffold import Scaffold

__all__ = ["FedAvg", "FedPer", "FedRep", "FineTuned", "LocalOnly", "Scaffold"]
