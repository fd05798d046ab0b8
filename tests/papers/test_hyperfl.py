"""HyperFL's run: who holds what, and that its attacks find what there is to be found."""

from __future__ import annotations

import torch
from torch import Tensor

from cograd.clients.hyperfl import HyperFL
from cograd.core.space import ParamSpace
from cograd.core.streams import stream
from cograd.papers import hyperfl
from cograd.papers._hyperfl_attacks import Victims, invert, psnr


def test_clients_hold_their_dominant_classes_and_no_row_twice() -> None:
    y = torch.arange(5000) % 10
    train, test = hyperfl.divided(y, 10, seed=3)
    rows = torch.cat([*train.parts, *test.parts])
    assert len(rows.unique()) == len(rows) == 10 * (120 + 200)
    for client in range(10):
        dominant = torch.tensor(hyperfl.DOMINANT[client % 5])
        for part, size in ((train.parts[client], 120), (test.parts[client], 200)):
            assert len(part) == size
            share = float(torch.isin(y[part], dominant).double().mean())
            assert 0.85 <= share <= 0.88  # 80 %, and three tenths of the rest
            assert len(y[part].unique()) == 10
    again, other = (hyperfl.divided(y, 10, seed=seed)[0] for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(train.parts, again.parts, strict=True))
    assert not torch.equal(train.parts[0], other.parts[0])


def test_its_networks_are_as_large_as_they_say() -> None:
    for build, extractor, whole in ((hyperfl.network, 7584, 8234), (hyperfl.papers_network, 115_776, 123_774)):
        space = ParamSpace.of(build())
        net = HyperFL(private=("classifier",)).hypernet(space)
        assert (net.generated.numel, space.numel) == (extractor, whole)


def test_an_attack_finds_an_image_from_its_direction_in_a_linear_map() -> None:
    matrix = stream(0, "map").normal(60, 16)
    images = 0.2 + 0.6 * stream(0, "images").uniform(2, 1, 4, 4)

    def observe(x: Tensor) -> Tensor:
        return matrix @ x.flatten() + 1

    seen = torch.stack([observe(x) for x in images])
    found = invert(observe, seen, (1, 4, 4), stream(0, "attack"), iterations=200)
    assert min(psnr(found, images)) > 30
    assert psnr(images, images) == [160.0, 160.0]


def test_victims_messages_give_everything_away() -> None:
    x, y = stream(0, "digits").uniform(3, 1, 14, 14).double(), torch.tensor([1, 5, 7])
    victims = Victims(hyperfl.mlp, x, y, "paper", seed=0, embedding=8, hidden=8)
    assert max(victims.errors()) < 1e-12
    assert min(psnr(victims.closed_form("extractor.1.weight", "extractor.1.bias"), x)) > 60
    for init in ("paper", "target_scaled"):
        small = Victims(hyperfl.network, x[:1].float(), y[:1], init, seed=0, embedding=4, hidden=4)
        small_errors = small.errors()
        assert max(small_errors) < 1e-2  # in single precision
