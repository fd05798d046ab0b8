"""FedFix (arXiv 2206.10189): one server for clients of any speed, and the weights that keep it unbiased.

Shared between clients and server: the model, 4P bytes down, and what local training changed, 4P bytes up, a
participation. Clients train all the time; the server decides when to aggregate and how much each change counts.
With M clients of importance p_i (sum 1) and response time tau_i, a server rate eta and weights d_i:

    client i, from the model it received:  Delta_i = LocalSGD(x^rho_i) - x^rho_i
    aggregation n, of the clients S_n:     x^{n+1} = x^n + eta sum_{i in S_n} d_i Delta_i        (eq. 3)
    those of S_n alone get x^{n+1}; the others go on with the model they have

Delta_i is a difference to the model that the client *received*, and the weights of an aggregation need not sum
to 1. If client i takes part in a share f_i of the aggregations, what is minimised is the *surrogate* loss,
whose importances are proportional to f_i d_i. So d_i = p_i / f_i is *unbiased*:

    scheme              in the literature   aggregates                S_n                  1 / f_i
    Every(period)       FedFix              every so much time        who has answered     ceil(tau_i / period)
    Arrivals(1)         asynchronous FedAvg at each answer            one client           tau_i sum_j 1 / tau_j
    Arrivals(c)         FedBuff             when c have answered      the c earliest       from the schedule
    Arrivals()          FedAvg              when all have answered    all                  1

Centralized SGD is ``Arrivals()`` with one local step. Weights that are *identical* for all clients, as
asynchronous FedAvg and FedBuff have them, minimise a surrogate in which fast clients count more.

- `schedule`: response times, schemes, and the schedule that follows from them;
- `server`: the recursion, as `FedFix`, and its special cases.
"""

from cograd.clients.fedfix.schedule import (
    Aggregation,
    Arrivals,
    Every,
    Schedule,
    response_times,
    schedule,
    surrogate,
)
from cograd.clients.fedfix.server import FedFix, async_fed_avg, centralized_sgd, fed_avg, fed_buff

__all__ = [
    "Aggregation",
    "Arrivals",
    "Every",
    "FedFix",
    "Schedule",
    "async_fed_avg",
    "centralized_sgd",
    "fed_avg",
    "fed_buff",
    "response_times",
    "schedule",
    "surrogate",
]
