"""FedLD: three parts of the global loss, and a remedy for each (arXiv 2408.12300).

Shared between clients and server: what local training changed, 4P bytes up, and the model, 4P bytes down, a
round, as in FedAvg. With local models w_i, the aggregated model x and p_i = n_i / n, the global loss
L = sum_j p_j L_j of the new model is

    L(x) = sum p_i L_i(w_i)  +  sum p_i (L(w_i) - L_i(w_i))  +  sum p_i (L(x) - L(w_i))
           local                distribution shift              aggregation

- `margin`: clients train on CE + lambda log(1 + |f(x)|^2), which keeps them from growing sure of what only
  their own data say (the first two parts);
- `combining`: the server walks along the leading principal directions of the clients' changes, each by its
  share of the energy, instead of along their mean (the last part);
- `parts`: the three parts, measured;
- `method`: all of it as a federated method.
"""

from cograd.clients.fedld.combining import Directions, GramRule, PrincipalGradient
from cograd.clients.fedld.margin import MarginControl, margin_penalty
from cograd.clients.fedld.method import FedLD
from cograd.clients.fedld.parts import LossParts, loss_decomposition, loss_parts

__all__ = [
    "Directions",
    "FedLD",
    "GramRule",
    "LossParts",
    "MarginControl",
    "PrincipalGradient",
    "loss_decomposition",
    "loss_parts",
    "margin_penalty",
]
