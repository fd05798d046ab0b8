"""DADAO (arXiv:2208.00779): nodes minimise sum_i f_i together, gradients and averagings on clocks of their own.

Every f_i is L-smooth and mu-strongly convex and known to node i alone; neighbours in a graph share one vector,
y + z. Gradients and pairwise averagings are two independent families of Poisson events, so neither waits for
the other. No inner consensus loop, no gradient tracking, no dual gradient, no proximal step. In the paper's
order:

- `graph`: the communication graph, chi_1 (inverse spectral gap) and chi_2 (half the largest effective
  resistance of an edge) of its rate Laplacian;
- `rates`: how often each edge averages, such that chi_1 chi_2 <= 1/2: uniform rates, the rates of least total
  (a semidefinite program), and graphs that take turns;
- `node`: the six vectors x, x~, y, y~, z, z~ of a node, their linear flow between events, and the two jumps.
  With s = sqrt(nu / L), nu = mu / 2:

      dx  = eta (x~ - x) dt                  dx~ = eta (x - x~) dt
      dy  = alpha (y~ - y) dt                dy~ = -theta (nu x~ + y + z) dt
      dz  = alpha (z~ - z) dt                dz~ = alpha~ (z - z~) dt

      gradient at i:     g = grad f_i(x) - nu x - y~;   x -= gamma g;  x~ -= gamma~ g;  y~ += (delta + delta~) g
      averaging (i, j):  p = (y_i + z_i) - (y_j + z_j); z_i -= beta p; z~_i -= beta~ p; the opposite at j

- `clock`: the Poisson clocks of all nodes and edges, superposed;
- `run`: `DADAO`, all nodes in one process;
- `member`: `Member`, a node in a process of its own, and how the members' logs are replayed;
- `objectives`: gradients of a PyTorch model on each node's data.

To precision eps the method takes O(n sqrt(L/mu) log 1/eps) gradients and O(n sqrt(chi_1 chi_2) sqrt(L/mu) log
1/eps) averagings (chi of the edges' probabilities), each of which is two messages of d numbers.

    rates = gossip_rates(Graph.star(16))
    run = DADAO(gradients, x0, mu=mu, L=L, rates=rates)
    run.run(until=200)
    x = run.sync()
"""

from cograd.machines.dadao.clock import Event, PoissonClock
from cograd.machines.dadao.graph import Graph
from cograd.machines.dadao.member import Member, merged
from cograd.machines.dadao.node import Constants, Flow, Gradient, Node
from cograd.machines.dadao.objectives import module_gradients
from cograd.machines.dadao.rates import GossipRates, gossip_rates
from cograd.machines.dadao.run import DADAO

__all__ = [
    "DADAO",
    "Constants",
    "Event",
    "Flow",
    "GossipRates",
    "Gradient",
    "Graph",
    "Member",
    "Node",
    "PoissonClock",
    "gossip_rates",
    "merged",
    "module_gradients",
]
