"""Image sets from the standard Hugging Face parquet files: a struct column of encoded images, and labels."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from cograd.data.files import Origin, cache_dir, replacing
from cograd.data.kinds import Images

DIGITS = tuple("0123456789")
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
GREY = ("L", 28)
COLOUR = ("RGB", 32)


def reader(
    file: str, column: str, look: tuple[str, int], classes: tuple[str, ...], *, cached: bool = False
) -> Callable[[Origin], Images]:
    """A reader of the file of a split: images in ``column``, of a Pillow mode and a side; uint8 tensors."""

    def read(origin: Origin) -> Images:
        def decode() -> tuple[Tensor, Tensor]:
            return _decode(origin, file.format(split=origin.split), column, look, len(classes))

        x, y = _cached(origin, decode) if cached else decode()
        return Images(origin.name, origin.split, origin.digest, x, y, classes)

    return read


def as_dtype(images: Images, dtype: torch.dtype) -> Tensor:
    """The pixels of uint8 images as they are, or in [0, 1]. Raises ValueError for an integer type that the
    pixels do not have."""
    if images.x.is_floating_point() and dtype.is_floating_point:
        return images.x.to(dtype)
    if dtype == torch.uint8 == images.x.dtype:
        return images.x
    if not dtype.is_floating_point:
        allowed = "a floating type" if images.x.is_floating_point() else "torch.uint8 or a floating type"
        raise ValueError(f"dtype must be {allowed}; got {dtype}")
    return images.x.to(dtype).div_(255)


def _decode(
    origin: Origin, file: str, column: str, look: tuple[str, int], n_classes: int
) -> tuple[Tensor, Tensor]:
    mode, side = look
    with origin.reading(file) as raw:
        table = pq.read_table(pa.BufferReader(raw), columns=[column, "label"], use_threads=False)
        encoded = table[column].combine_chunks().field("bytes")
        y = torch.tensor(table["label"].to_numpy(), dtype=torch.int64)
        if len(y) == 0 or int(y.min()) < 0 or int(y.max()) >= n_classes:
            raise ValueError(f"labels must be there and in 0 .. {n_classes - 1}")
        x = np.empty((len(y), side, side, len(mode)), dtype=np.uint8)
        for i, image in enumerate(encoded):
            with Image.open(io.BytesIO(image.as_py()), formats=("PNG", "JPEG")) as picture:
                if picture.size != (side, side):
                    raise ValueError(f"image {i} is {picture.size}, not {(side, side)}")
                x[i] = np.asarray(picture.convert(mode)).reshape(side, side, len(mode))
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), y


def _cached(origin: Origin, decode: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Decoded once and kept in the user cache under the digest of the source; decoding takes seconds."""
    path = cache_dir() / "decoded" / f"{origin.name}-{origin.split}-{origin.digest[:32]}.safetensors"
    try:
        kept = load_file(path)
        return kept["x"], kept["y"]
    except Exception:  # absent, cut short or unreadable alike: decode again
        x, y = decode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as target:
            target.write(save({"x": x, "y": y}))
    except OSError:
        pass  # a cache that cannot be written costs time, not correctness
    return x, y
