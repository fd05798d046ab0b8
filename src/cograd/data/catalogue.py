"""The data sets by name: what each is, its terms, its splits, its files and who reads them.

A registry: results are stamped with the readers of the sets that they name, not with this list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cograd.data import images, texts, uci
from cograd.data.adult import adult
from cograd.data.files import Files, Origin
from cograd.data.kinds import DataSet, Graph, Images, Records, Table, Text
from cograd.data.planetoid import PARTS, planetoid

__registry__ = True

ImagesName: TypeAlias = Literal["mnist-5k", "cifar-5k", "digits", "mnist", "fashion-mnist", "cifar10"]
TextName: TypeAlias = Literal["tiny-shakespeare"]
TableName: TypeAlias = Literal["breast-cancer", "adult"]
GraphName: TypeAlias = Literal["cora", "citeseer"]

HUB = "https://huggingface.co/datasets"
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Source:
    """One entry: the first split is what `load` takes when none is named."""

    kind: type[DataSet]
    description: str
    licence: str
    splits: tuple[str, ...]
    files: Files
    read: Callable[[Origin], DataSet]

    @property
    def embedded(self) -> bool:
        """Whether the set ships inside the package."""
        return self.files.folder == "embedded"


def _embedded(*files: str) -> Files:
    return Files("embedded", dict.fromkeys(files))


def _under(home: str, *files: str) -> dict[str, str | None]:
    return {file: f"{home}/{file}" for file in files}


def _hub_images(
    folder: str, home: str, column: str, look: tuple[str, int], classes: tuple[str, ...]
) -> tuple[tuple[str, ...], Files, Callable[[Origin], DataSet]]:
    """Splits, files and reader of a set of the Hub in a train and a test file."""
    splits = ("train", "test")
    urls = {f"{split}.parquet": f"{HUB}/{home}/{split}-00000-of-00001.parquet" for split in splits}
    return splits, Files(folder, urls), images.reader("{split}.parquet", column, look, classes, cached=True)


def _planetoid(name: str) -> tuple[tuple[str, ...], Files, Callable[[Origin], DataSet]]:
    files = [f"ind.{name}.{part}" for part in PARTS]
    return ("all",), Files(name, _under(f"{GITHUB}/kimiyoung/planetoid/master/data", *files)), planetoid


CATALOGUE: dict[str, Source] = {
    "mnist-5k": Source(
        Images,
        "4,000 + 1,000 handwritten digits of MNIST, 1 x 28 x 28, balanced; in the package",
        "CC BY-SA 3.0",
        ("train", "test"),
        _embedded("mnist-5k-train.parquet", "mnist-5k-test.parquet"),
        images.reader("mnist-5k-{split}.parquet", "image", images.GREY, images.DIGITS),
    ),
    "cifar-5k": Source(
        Images,
        "4,000 + 1,000 photographs of CIFAR-10, 3 x 32 x 32, balanced, JPEG-compressed; in the package",
        "none stated by its authors",
        ("train", "test"),
        _embedded("cifar-5k-train.parquet", "cifar-5k-test.parquet"),
        images.reader("cifar-5k-{split}.parquet", "img", images.COLOUR, images.OBJECTS),
    ),
    "tiny-shakespeare": Source(
        Text,
        "1.1 million characters of Shakespeare's plays, split 90/5/5 by position; in the package",
        "public domain",
        ("train", "val", "test"),
        _embedded("tiny-shakespeare.txt.bz2"),
        texts.shakespeare,
    ),
    "digits": Source(
        Images,
        "1,400 + 397 handwritten digits of 43 people, 1 x 8 x 8; in the package",
        "CC BY 4.0",
        ("train", "test"),
        _embedded("digits.csv.bz2"),
        uci.digits,
    ),
    "breast-cancer": Source(
        Table,
        "569 breast tumours by 30 measurements: is it benign?; in the package",
        "CC BY 4.0",
        ("all",),
        _embedded("breast-cancer.csv.bz2"),
        uci.breast_cancer,
    ),
    "mnist": Source(
        Images,
        "60,000 + 10,000 handwritten digits, 1 x 28 x 28",
        "CC BY-SA 3.0",
        *_hub_images("mnist", "ylecun/mnist/resolve/main/mnist", "image", images.GREY, images.DIGITS),
    ),
    "fashion-mnist": Source(
        Images,
        "60,000 + 10,000 pictures of clothes, 1 x 28 x 28",
        "MIT",
        *_hub_images(
            "fashion-mnist",
            "zalando-datasets/fashion_mnist/resolve/main/fashion_mnist",
            "image",
            images.GREY,
            images.CLOTHES,
        ),
    ),
    "cifar10": Source(
        Images,
        "50,000 + 10,000 photographs in ten classes, 3 x 32 x 32",
        "none stated by its authors",
        *_hub_images(
            "cifar10", "uoft-cs/cifar10/resolve/main/plain_text", "img", images.COLOUR, images.OBJECTS
        ),
    ),
    "adult": Source(
        Table,
        "32,561 people of the 1994 US census: is the income above 50,000 dollars? (adult.data)",
        "CC BY 4.0",
        ("train",),
        Files(
            "adult",
            _under("https://archive.ics.uci.edu/ml/machine-learning-databases/adult", "adult.data"),
        ),
        adult,
    ),
    "cora": Source(Graph, "2,708 papers in 7 fields and their citations", "as Planetoid", *_planetoid("cora")),
    "citeseer": Source(
        Graph, "3,327 papers in 6 fields and their citations", "as Planetoid", *_planetoid("citeseer")
    ),
    "gsm8k": Source(
        Records,
        "7,473 + 1,319 grade-school maths problems with worked answers",
        "MIT",
        ("train", "test"),
        Files(
            "gsm8k",
            _under(
                f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data",
                "train.jsonl",
                "test.jsonl",
            ),
        ),
        texts.gsm8k,
    ),
    "sst2": Source(
        Records,
        "6,920 + 872 + 1,821 sentences of film reviews, positive or negative",
        "as the Stanford Sentiment Treebank",
        ("train", "val", "test"),
        Files(
            "sst2",
            _under(
                f"{GITHUB}/clairett/pytorch-sentiment-classification/master/data/SST2",
                "train.tsv",
                "dev.tsv",
                "test.tsv",
            ),
        ),
        texts.sst2,
    ),
    "brown": Source(
        Records,
        "500 texts of American English in 15 genres, every word tagged with its part of speech",
        "redistribution permitted",
        ("all",),
        Files(
            "brown",
            dict.fromkeys(texts.BROWN_FILES),
            archive=f"{GITHUB}/nltk/nltk_data/gh-pages/packages/corpora/brown.zip",
        ),
        texts.brown,
    ),
}
