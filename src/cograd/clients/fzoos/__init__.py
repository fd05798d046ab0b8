"""FZooS: gradients from what has been asked already, shared as random features (arXiv 2308.04077).

Shared between clients and server: a point, d numbers, and a client's *surrogate* of its own function, M weights
of random Fourier features, up and down a round. N clients minimise the mean of functions f_i on a box, each of
which gives values and nothing else. What a client has asked, points and values, stays with it.

    client i, from x_r, T local steps; after each it asks f_i where it stands and at 5 points around
        g <- gradient of the posterior mean through the nearest of all that it has ever asked
        x <- Adam step along g + gamma_t (gradient(x; w) - gradient(x; w_i)),  gamma_t = 1/t,  into the box
    server:   x_{r+1} = x_r - eta sum_i p_i (x_r - x_i)
    client i: asks f_i at x_{r+1} and at 50 points around, fits w_i to what is near
    server:   w = sum_i p_i w_i

Unlike SCAFFOLD's, the correction is that of the point where the client stands, as surrogates can be
differentiated anywhere. Points to ask are those where the gradient is least certain.

- `oracle`: functions that give values alone, counted, and the trajectory of what was asked;
- `gp`: the local surrogate, its gradient and the gradient's uncertainty;
- `features`: the surrogate that travels;
- `rounds`: the round, which the baselines of finite differences share; `optimizers`: its local steps;
- `method`: FZooS itself.

Where this differs from the released code: the surrogate's gradient is analytic (a difference quotient of width
1e-20 is 0 at coordinates that are 0); the uncertainty is the trace over all coordinates, given the queries and
not their sums with x; points are put back into the box after each step (clipping only what the function sees
makes it flat out there); the features' ridge is positive; the safeguard, which asks for exact values of all
clients, is an option, and its queries are counted.
"""

from cograd.clients.fzoos.features import RandomFeatures
from cograd.clients.fzoos.gp import GPSurrogate, Posterior
from cograd.clients.fzoos.method import Active, FZooS, TrajectoryGradient
from cograd.clients.fzoos.optimizers import SGD, Adam
from cograd.clients.fzoos.oracle import BlackBox, Oracle
from cograd.clients.fzoos.rounds import Description, LocalGradient, ZerothOrder

__all__ = [
    "SGD",
    "Active",
    "Adam",
    "BlackBox",
    "Description",
    "FZooS",
    "GPSurrogate",
    "LocalGradient",
    "Oracle",
    "Posterior",
    "RandomFeatures",
    "TrajectoryGradient",
    "ZerothOrder",
]
