"""FedLEx: a few clients explore, and how far each entry travelled guides everybody (arXiv 2506.18640).

Shared between clients and server, beside what a base method shares: before the first round a map of travel from
every *explorer*, and after that one *guidance* value G in [0, 1] an entry, which all clients multiply their
gradients or updates by. No data and no knowledge of their distribution.

    exploration, once    explorer i trains from w0 on its own data;  D_i = (w0 - v)^2
    the server           G = mean_i of N(D_i)       "per_client", the paper's picture
                         G = N(mean_i of D_i)       "after_mean", the released code
                         N(D) = (D - min D) / (max D - min D), over one tensor or the whole model
    rounds of the base   g <- G * g  before the clip and the step of SGD            "gradient", the code
                         delta_i <- G * (v - w)  at the end of local training       "update", the picture

- `guidance`: maps, their normalisation, and `scale_gradients` for a training loop of one's own;
- `method`: the phases in the federated protocol, around any base method of rounds;
- `adam`: local training by Adam, which the authors use, and which cancels G on gradients.

What the released code does instead is in none of them: it hands out a map that does not depend on exploration;
its first version explores on the server's own model, one client after another, so that the rounds begin at a
trained model. `baselines.warm_start` is that, by itself.
"""

from cograd.clients.fedlex.adam import LocalAdam
from cograd.clients.fedlex.guidance import ScaledGradients, guidance_matrix, scale_gradients, squared_travel
from cograd.clients.fedlex.method import FedLEx

__all__ = [
    "FedLEx",
    "LocalAdam",
    "ScaledGradients",
    "guidance_matrix",
    "scale_gradients",
    "squared_travel",
]
