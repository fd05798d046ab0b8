"""What federated methods are compared with: published methods that are not among the library"s own, by the same
protocol."""

from cograd.clients.baselines.centaur import CENTAUR
from cograd.clients.baselines.dp_fedavg import DPFedAvg, Privacy
from cograd.clients.baselines.fedadam import FedAdam
from cograd.clients.baselines.fedasync import FedAsync
from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.baselines.fedbuff import FedBuff
from cograd.clients.baselines.fedper import FedPer
from cograd.clients.baselines.fedrep import FedRep
from cograd.clients.baselines.fedzo import FedZO, FiniteDifferences
from cograd.clients.baselines.fine_tuned import FineTuned
from cograd.clients.baselines.local_only import LocalOnly
from cograd.clients.baselines.mean_guided import MeanGuided
from cograd.clients.baselines.pcgrad import PCGrad
from cograd.clients.baselines.permuted_guidance import PermutedGuidance
from cograd.clients.baselines.power_of_choice import PowerOfChoice
from cograd.clients.baselines.ppsgd import PPSGD
from cograd.clients.baselines.scaffold import Scaffold
from cograd.clients.baselines.warm_start import WarmStart
from cograd.clients.baselines.zo_fedprox import ZOFedProx
from cograd.clients.baselines.zo_scaffold import ZOScaffold

__all__ = [
    "CENTAUR",
    "PPSGD",
    "DPFedAvg",
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
    "MeanGuided",
    "PCGrad",
    "PermutedGuidance",
    "PowerOfChoice",
    "Privacy",
    "Scaffold",
    "WarmStart",
    "ZOFedProx",
    "ZOScaffold",
]
