"""What can be seen of one image that a client trained on: the attacks of HyperFL's comparison.

The client holds one image and trains an untrained network on it for one step. Attackers read its real message.
They know the label.

- *FedAvg*: the whole model's update.
- *naive*: the update of Phi; the attacker draws an embedding and a classifier of its own, and replays the
  client's round with them. This is how the paper attacks HyperFL.
- *adaptive*: the attacker recovers the extractor and its gradient from the update of Phi first (`leak`), and
  attacks that gradient. A classifier acts on it through nothing but the gradient at the features, which is
  found along the way; its start is the gradient of the extractor's last bias.

The attack itself is inverting gradients (Geiping et al. 2020, arXiv 2003.14053): the input whose observation
has the direction of what was sent, and little total variation, by Adam on signs of gradients, with pixels kept
in [0, 1]. All images, and restarts, are attacked at once; they do not act on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cograd.clients.baselines.fedavg import FedAvg
from cograd.clients.hyperfl import HyperFL, Leak, first_input, leak
from cograd.core.streams import Stream, seed_for, stream
from cograd.data.clients import ClientData
from cograd.engines.federated.local import LocalModel
from cograd.engines.federated.protocol import ClientContext, Session
from cograd.engines.federated.training import LocalSGD

ITERATIONS, RESTARTS, PIXEL_STEP, FEATURE_STEP, VARIATION = 600, 2, 0.1, 0.02, 1e-4
ONE_STEP = LocalSGD(lr=0.1, batch_size=1)
UNTRAINED = LocalSGD(lr=1e-6, batch_size=1)
"""Phase 1: the classifier is as untrained as FedAvg's. At the paper's rate one step may learn a single image by
heart, and a loss of zero has no gradient; that would be no merit of the hypernetwork."""


def invert(
    observe: Callable[..., Tensor], seen: Tensor, shape: tuple[int, ...], draws: Stream,
    *, known: Sequence[Tensor] = (), features: Tensor | None = None, iterations: int = ITERATIONS,
) -> Tensor:  # fmt: skip
    """Images (n, *shape) whose observations have the directions of ``seen`` (n, entries).

    ``observe(image, *known)`` is what is seen of one image; with ``features`` (n, entries), a start, it is
    ``observe(image, features, *known)``, and features are found along the way. ``known`` are of n rows as well.
    """
    n = len(seen)
    seen, *known = (t.repeat(RESTARTS, *[1] * (t.ndim - 1)) for t in (seen, *known))
    unknown = [draws.uniform(len(seen), *shape).to(seen)]
    groups: list[dict[str, Any]] = [{"params": unknown[:1], "lr": PIXEL_STEP}]
    if features is not None:
        unknown.append((features / features.std(1, keepdim=True)).repeat(RESTARTS, 1))
        groups.append({"params": unknown[1:], "lr": FEATURE_STEP})
    for part in unknown:
        part.requires_grad_()
    optimizer = torch.optim.Adam(groups)
    drops = [round(iterations * part) for part in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)

    def losses() -> Tensor:
        found = vmap(observe)(*unknown, *known)
        return 1 - nn.functional.cosine_similarity(found, seen) + VARIATION * variation(unknown[0])

    for _ in range(iterations):
        for part, g in zip(unknown, torch.autograd.grad(losses().sum(), unknown), strict=True):
            part.grad = g.sign() if part is unknown[0] else g
        optimizer.step()
        schedule.step()
        unknown[0].data.clamp_(0, 1)
    best = losses().detach().view(RESTARTS, n).argmin(0)
    return unknown[0].detach().view(RESTARTS, n, *shape)[best, torch.arange(n)]


def variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, of each image."""
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return across.abs().flatten(1).mean(1) + down.abs().flatten(1).mean(1)


def psnr(found: Tensor, true: Tensor) -> list[float]:
    """Peak signal to noise of each image in [0, 1], in dB; 160 at most, where floats end."""
    errors = (found - true).square().flatten(1).mean(1).double()
    return [float(value) for value in -10 * errors.clamp_min(1e-16).log10()]


class Victims:
    """Clients of one image each, their messages, and what it takes to attack them.

    ``build`` makes the network, a sequence of ``extractor`` and ``classifier``; ``init`` is of the
    hypernetwork, None stands for FedAvg.
    """

    def __init__(
        self, build: Callable[[], nn.Module], x: Tensor, y: Tensor, init: str | None, seed: int,
        embedding: int, hidden: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed_for(seed, "attacked"))
        self.model = LocalModel(build().to(x.dtype), nn.functional.cross_entropy)
        self.initial = self.model.theta.clone()
        self.x, self.y, self.seed, n = x, y, seed, len(x)
        self.method: Any = FedAvg(ONE_STEP)
        if init is not None:
            self.method = HyperFL(
                ONE_STEP, UNTRAINED, private=("classifier",), embedding=embedding, hidden=hidden, init=init
            )
        session = Session(self.model.space, self.initial, [1] * n, seed, lambda round: list(range(n)))
        self.sent: Tensor = self.method.start(session)["x"]
        self.states, self.replies = [], []
        for client in range(n):
            image, label = x[client : client + 1], y[client : client + 1]
            data = ClientData(image, label, image[:0], label[:0])
            self.model.at(self.initial)
            state, reply = self.method.train({}, {"x": self.sent}, data, self.context(client))
            self.states.append(state)
            self.replies.append(reply["delta"])

    def context(self, client: int) -> ClientContext:
        sizes = [1] * len(self.x)
        return ClientContext(client, 0, self.seed, sizes, self.model, self.initial)

    def leaks(self) -> list[Leak]:
        """What `leak` recovers of each client."""
        net = self.method.hypernet(self.model.space)
        return [leak(net, self.sent, delta, lr=ONE_STEP.lr) for delta in self.replies]

    def fedavg(self) -> Tensor:
        """Images, from updates of the whole model."""
        module = self.model.module

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.model.loss(functional_call(module, weights, (x[None],)), y[None])

        def observe(x: Tensor, y: Tensor) -> Tensor:
            return -self._flat(grad(loss)(self.model.space.views(self.initial), x, y))

        return self._invert(observe, torch.stack(self.replies), known=[self.y])

    def naive(self) -> Tensor:
        """Images, from updates of Phi, with an embedding and a classifier of the attacker's own."""
        draws = stream(self.seed, "attacker")
        v = draws.normal(len(self.x), self.method.embedding).to(self.x)
        heads = []
        for _ in self.x:
            head = nn.Linear(self._classifier.in_features, self._classifier.out_features)
            heads.append(torch.cat([p.detach().reshape(-1) for p in head.parameters()]).to(self.x))
        ctx = self.context(0)

        def observe(x: Tensor, y: Tensor, v: Tensor, h: Tensor) -> Tensor:
            replay = self.method.observable({"v": v, "h": h}, (x[None], y[None]), ctx, {"x": self.sent})
            update: Tensor = replay["delta"]
            return update

        return self._invert(observe, torch.stack(self.replies), known=[self.y, v, torch.stack(heads)])

    def adaptive(self) -> Tensor:
        """Images, from extractors and their gradients as recovered."""
        found = self.leaks()
        space, extractor = found[0].net.generated, self.model.module.get_submodule("extractor")

        def action(weights: dict[str, Tensor], x: Tensor, features: Tensor) -> Tensor:
            named = {name.removeprefix("extractor."): t for name, t in weights.items()}
            found: Tensor = functional_call(extractor, named, (x[None],))[0]
            return (found * features).sum()

        def observe(x: Tensor, features: Tensor, theta: Tensor) -> Tensor:
            return self._flat(grad(action)(space.views(theta), x, features))

        gradients = torch.stack([each.gradient for each in found])
        start = gradients[:, -self._classifier.in_features :]
        theta = torch.stack([each.theta for each in found])
        return self._invert(observe, gradients, known=[theta], features=start)

    def closed_form(self, weight: str, bias: str) -> Tensor:
        """Images, as the input of the extractor's first layer, which must be linear."""
        rows = [first_input(each.tensors()[1], weight, bias) for each in self.leaks()]
        return torch.stack(rows).view_as(self.x)

    def errors(self) -> list[float]:
        """The largest relative error of s, theta and G as recovered, of each client."""
        net, worst = self.method.hypernet(self.model.space), []
        for client, (state, found) in enumerate(zip(self.states, self.leaks(), strict=True)):
            v = self.context(client).stream("embedding").normal(self.method.embedding).to(self.x)
            weights = net.weights(self.sent)
            theta, image = weights.generate(v), slice(client, client + 1)
            whole = torch.cat([theta, state["h"]])
            g = self.model.gradient(whole, self.x[image], self.y[image])[: len(theta)]
            pairs = ((found.units, weights.units(v)), (found.theta, theta), (found.gradient, g))
            worst.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
        return worst

    @property
    def _classifier(self) -> nn.Linear:
        layer = self.model.module.get_submodule("classifier")
        assert isinstance(layer, nn.Linear)
        return layer

    def _flat(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors.values()])

    def _invert(self, observe: Callable[..., Tensor], seen: Tensor, **options: Any) -> Tensor:
        draws = stream(self.seed, "attack")
        return invert(observe, seen, tuple(self.x.shape[1:]), draws, **options)
