"""One global merge (arXiv:2507.06542): decentralized nodes share their models late, and once with everyone.

m nodes hold the weights theta_k of one architecture, their own data and their own optimizer state. A round is
H local steps of every node, then a communication: theta_k <- sum_l W_t[k, l] theta_l, all at once, where row k
of the *mixing matrix* W_t says whom node k hears. What passes between nodes is the model: its trainable
parameters, and BatchNorm's running statistics with them.

- `Schedule`: how many peers r(t) a node hears in round t. With r = 0.2 it hears one random peer in a fifth of
  the rounds. The paper's *single merge* is r = 0.2 in every round and all others in the last one, the only
  dense round; a *window* is dense for some rounds only, at the same cost wherever it lies.
- `Mixing`: which peers. ``random`` pulls, whose rows are independent (the official code), or ``pairwise``
  matchings, which keep the mean of the nodes, as the theory has it; fixed graphs; draws from these; one's own.
- `merge`: the average of the nodes at any time, with BatchNorm re-estimated. That this *counterfactual* model
  is good all along, while nodes look as bad as if they trained alone, is the paper's finding; it needs some
  communication, however little.
- `consensus_error`, `mergeability`, `Mixing.quality`, `descent_term`: what the theory is about. The merged
  model can match parallel SGD's rate since the nodes' disagreement enters its descent lemma with a helpful
  sign where the loss sharpens along the way (U_t, Theorem 1).

Two ways to run, with the same matrices and the same numbers: `SingleMerging` around the training loop of each
of m processes, and `DecentralizedTrainer` for m nodes in one process. Payload: an ordinary round sends one
model for every peer heard, r m P s bytes in expectation (P elements of s bytes); a dense round is a ring
all-reduce, 2 (m - 1) P s over all nodes.

    merging = SingleMerging(model, optimizer, schedule=Schedule.single_merge(rounds=100), local_steps=10)

The training loop stays as it is.
"""

from cograd.machines.single_merging.attachment import SingleMerging
from cograd.machines.single_merging.measures import DescentTerm, consensus_error, descent_term, mergeability
from cograd.machines.single_merging.merging import Diverged, merge, recalibrated
from cograd.machines.single_merging.mixing import Mixing, contraction
from cograd.machines.single_merging.sampling import class_weighted
from cograd.machines.single_merging.schedule import Schedule
from cograd.machines.single_merging.trainer import DecentralizedTrainer, replicas

__all__ = [
    "DecentralizedTrainer",
    "DescentTerm",
    "Diverged",
    "Mixing",
    "Schedule",
    "SingleMerging",
    "class_weighted",
    "consensus_error",
    "contraction",
    "descent_term",
    "merge",
    "mergeability",
    "recalibrated",
    "replicas",
]
