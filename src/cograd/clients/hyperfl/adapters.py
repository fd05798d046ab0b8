"""HyperFL-LPM: small trainable adapters in a frozen, pretrained backbone.

    ViT, after each block:      u + LayerNorm(Up(ReLU(Down(u))))        6 tensors, generated
    ResNet, after each stage:   BatchNorm(x + Conv1x1(BatchNorm(x)))    5 tensors, generated

`adapt` puts them in. What is then trainable are the adapters, which `HyperFL` generates, and whatever
classifier is put on top, which is private.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cograd.core.checks import check


class BlockAdapter(nn.Module):
    """A bottleneck beside the residual stream of a transformer: (..., width) -> (..., width).

    Args:
        width: of the stream.
        reduction: the bottleneck is width / reduction wide.
    """

    def __init__(self, width: int, reduction: int = 16) -> None:
        check(
            ("width", width, ">= 1", width >= 1),
            ("reduction", reduction, f"in 1 .. width = {width}", 1 <= reduction <= width),
        )
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, u: Tensor) -> Tensor:
        z: Tensor = self.norm(self.up(self.down(u).relu()))
        return u + z


class StageAdapter(nn.Module):
    """A pointwise convolution between two normalisations, after a stage of a convolutional network:
    (B, width, h, w) -> the same.

    Running statistics are neither generated nor shared: simulate with ``buffers="local"``.
    """

    def __init__(self, width: int) -> None:
        check(("width", width, ">= 1", width >= 1))
        super().__init__()
        self.before = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 1, bias=False)
        self.after = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(x + self.conv(self.before(x)))
        return y


def adapt(backbone: nn.Module, adapters: Mapping[str, nn.Module]) -> nn.Module:
    """Freeze a backbone, and put an adapter behind each submodule that is named; returns the backbone.

    ``NAME`` becomes a sequence of the submodule, ``NAME.0``, and its adapter, ``NAME.1``. Weights of the
    backbone must therefore be loaded before. Raises ValueError for a name that is no submodule, for one inside
    another, and for no adapters.
    """
    if not adapters:
        raise ValueError("adapters must name one submodule or more; got none")
    modules = dict(backbone.named_modules())
    for name in adapters:
        if name not in modules or not name:
            known = ", ".join(n for n in modules if n)
            raise ValueError(f"adapters must name submodules of the backbone ({known}); got {name!r}")
        inside = next((other for other in adapters if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise ValueError(f"adapters must not lie inside one another; got {name!r} and {inside!r}")
    backbone.requires_grad_(False)
    for name, adapter in adapters.items():
        parent, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(parent), last, nn.Sequential(modules[name], adapter))
    return backbone


def block_adapters(names: Mapping[str, int], reduction: int = 16) -> dict[str, nn.Module]:
    """A `BlockAdapter` for each block that is named with its width, as the paper puts them into ViT-S:
    ``block_adapters({f"blocks.{i}": 384 for i in range(12)})``."""
    return {name: BlockAdapter(width, reduction) for name, width in names.items()}


def stage_adapters(names: Mapping[str, int]) -> dict[str, nn.Module]:
    """A `StageAdapter` for each stage that is named with its width, as the paper puts them into ResNet-18:
    ``stage_adapters({"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512})``."""
    return {name: StageAdapter(width) for name, width in names.items()}
