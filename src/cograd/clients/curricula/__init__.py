"""Curricula: easy examples first within a round, easy clients first along the rounds (arXiv 2212.12712).

Shared between clients and server: what the method underneath shares. The *data curriculum* adds nothing to it:
a client orders its own examples by what it has received. The *client curriculum* adds, once in several rounds,
the model to all N clients and the mean score of each client's examples back.

Scores, low where an example is easy, under the received model w, the client's last own model w_i, an expert:

    s_G = loss(w);  s_L = loss(w_i);  s_LG = s_G + s_L;  s_E = loss(expert);  or 0/1 errors instead of losses

Data curriculum, a client's round of S steps:    order by score;  s = 0
    while s < S:  window = order[: max(g(s), 32)];  one shuffled pass over it;  s += its minibatches

Client curriculum, u the client updates so far:  while u < budget
    all clients answer with their mean score;  order them;  pool = the first g(u)
    the pool is shuffled and cut into groups;  a round a group, whose members train;  u += its members

g grows from a share of everything to everything (`Pacing`). ``order="hard_first"`` is the reverse ("anti"),
``random`` the control that has the window and no order. Full windows, or full pools with everybody in each
round, are the method underneath, bit for bit.

Where this differs from the released code: FedProx's pull is real (there it is that of a model to itself), and
equal scores come in random order rather than in that of the data set.
"""

from cograd.clients.curricula.local import DataCurriculum, PacedSGD
from cograd.clients.curricula.method import ClientCurriculum, Curriculum, Expert
from cograd.clients.curricula.pacing import ORDERS, PACINGS, PacedSampler, Pacing, ranked, windows
from cograd.clients.curricula.partition import by_difficulty, difficulty_spread, dirichlet_by_client
from cograd.clients.curricula.scoring import JUDGES, SCORES, Difficulty, Judging, losses

__all__ = [
    "JUDGES",
    "ORDERS",
    "PACINGS",
    "SCORES",
    "ClientCurriculum",
    "Curriculum",
    "DataCurriculum",
    "Difficulty",
    "Expert",
    "Judging",
    "PacedSGD",
    "PacedSampler",
    "Pacing",
    "by_difficulty",
    "difficulty_spread",
    "dirichlet_by_client",
    "losses",
    "ranked",
    "windows",
]
