"""Parameter shapes of well-known networks: for byte accounting and timing without building them."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def alexnet() -> Shapes:
    """AlexNet with grouped convolutions and 1000 classes: 60,965,224 parameters, 10,568 of them biases."""
    weights = {
        "conv1": (96, 3, 11, 11),
        "conv2": (256, 48, 5, 5),
        "conv3": (384, 256, 3, 3),
        "conv4": (384, 192, 3, 3),
        "conv5": (256, 192, 3, 3),
        "fc6": (4096, 9216),
        "fc7": (4096, 4096),
        "fc8": (1000, 4096),
    }
    shapes: Shapes = {}
    for name, shape in weights.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def resnet50() -> Shapes:
    """ResNet-50 with 1000 classes: 25,557,032 parameters, 54,120 of them in one-dimensional tensors."""
    shapes: Shapes = {}

    def conv_bn(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.conv.weight"] = (out, into, kernel, kernel)
        shapes[f"{name}.bn.weight"] = shapes[f"{name}.bn.bias"] = (out,)

    conv_bn("stem", 64, 3, 7)
    channels = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            conv_bn(f"{name}.reduce", width, channels, 1)
            conv_bn(f"{name}.spatial", width, width, 3)
            conv_bn(f"{name}.expand", 4 * width, width, 1)
            if block == 0:
                conv_bn(f"{name}.shortcut", 4 * width, channels, 1)
            channels = 4 * width
    shapes |= {"fc.weight": (1000, channels), "fc.bias": (1000,)}
    return shapes


def ptb_lstm() -> Shapes:
    """Two LSTM layers of 1500 on 10,000 words, output tied to the embedding: 51,034,000 parameters, 34,000
    of them biases."""
    shapes: Shapes = {"embedding.weight": (10000, 1500)}
    for layer in range(2):
        shapes |= {f"lstm.weight_{kind}_l{layer}": (6000, 1500) for kind in ("ih", "hh")}
        shapes |= {f"lstm.bias_{kind}_l{layer}": (6000,) for kind in ("ih", "hh")}
    return shapes | {"output.bias": (10000,)}
