"""AGLFOP (arXiv 2307.11333): global and local fairness of one federated model, and the best that both allow.

Shared between clients and server, besides whatever trains the model: a table of counts, once. Client s counts
its examples by group z of a sensitive attribute and prediction h, 4 integers for two groups and classes, or by
label y as well, 8 integers. The server joins them to P(s,z,y,h) and says

    global disparity   I(Z;H)                  what predictions tell of the group
    local disparity    I(Z;H|S)                the same inside the clients
    unique             min_Q I_Q(Z;H|S)        over Q with P's marginals (Z,H) and (Z,S)
    redundant          global - unique         what no client can see in its own data
    masked             local - unique          what does not show in all the data together

Neither of the first two bounds the other: the examples of one client may be fair and all together not
(redundant), or the reverse (masked). AGLFOP is the convex program whose value is the best accuracy that any
predictor can have with both below given bounds; a trained model's distance to it is what its method leaves on
the table.

- `joint`: the joint distribution, and the message of a client;
- `information`: mutual information, and the unique information, which is a convex program of its own;
- `measures`: disparities, statistical parity, Pinsker's bound, and the baseline of chance;
- `program`: AGLFOP, its surface over a grid, and the randomised predictor that attains it;
- `splits`: data sets dealt so that disparity is unique, redundant or masked;
- `federated`: the numbers in every row of a simulation.
"""

from cograd.clients.aglfop.federated import AGLFOP, GroupedData, with_groups
from cograd.clients.aglfop.joint import ClientJoint, client_counts
from cograd.clients.aglfop.measures import (
    Baseline,
    Disparities,
    disparities,
    permutation_baseline,
    pinsker,
)
from cograd.clients.aglfop.program import Optimum, Rule, Surface, aglfop, frontier
from cograd.clients.aglfop.splits import split

__all__ = [
    "AGLFOP",
    "Baseline",
    "ClientJoint",
    "Disparities",
    "GroupedData",
    "Optimum",
    "Rule",
    "Surface",
    "aglfop",
    "client_counts",
    "disparities",
    "frontier",
    "permutation_baseline",
    "pinsker",
    "split",
    "with_groups",
]
