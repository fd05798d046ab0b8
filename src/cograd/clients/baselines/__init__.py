"""What federated methods are compared with: published methods that are not among the library's own, by the same
protocol."""

from cograd.clients.baselines.fedadam import FedAdam
from cograd.clients.baselines.fedasync import FedAsync
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.fedbuff import FedBuff
from cograd.clients.baselines.fedper import FedPer
from cograd.clients.baselines.fedrep import FedRep
from cograd.clients.baselines.fedzo import FedZO, FiniteDifferences
from cograd.clients.baselines.fine_tuned import FineTuned
from cograd.clients.baselines.local_only import LocalOnly
from cograd.clients.baselines.scaffold import Scaffold
from cograd.clients.baselines.zo_fedprox import ZOFedProx
from cograd.clients.baselines.zo_scaffold import ZOScaffold

__all__ = [
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "FedPer",
    "FedRep",
    "FedZO",
    "FineTuned",
    "FiniteDifferences",
    "LocalOnly",
    "Scaffold",
    "ZOFedProx",
    "ZOScaffold",
]
