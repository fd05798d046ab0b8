"""The data sets inside the package: what `load` promises of them, and what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import typing

import pytest
import torch

from cograd import data
from cograd.data import catalogue, loading
from cograd.data.catalogue import CATALOGUE

PIXELS = {
    ("mnist-5k", "train"): "74c695cd53784267900ced4f08a28b29",
    ("mnist-5k", "test"): "777c6846cdb877533e3e1a13beb677f8",
    ("cifar-5k", "train"): "4c7aecf405bdb32b900d1273d35740de",
    ("cifar-5k", "test"): "dfe6c156508799fb6a688409ad461b19",
}
"""BLAKE2b-128 of the decoded uint8 tensors: a JPEG decoder that rounds otherwise gives other pixels."""


def fingerprint(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


@pytest.mark.parametrize(("name", "channels", "side"), [("mnist-5k", 1, 28), ("cifar-5k", 3, 32)])
@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 100)])
def test_images_are_balanced_and_always_the_same(
    name: str, channels: int, side: int, split: str, per_class: int
) -> None:
    raw = data.load(name, split, dtype=torch.uint8)
    assert isinstance(raw, data.Images)
    assert raw.x.shape == (10 * per_class, channels, side, side)
    assert raw.x.is_contiguous()
    assert raw.y.dtype == torch.int64
    assert raw.y.bincount().tolist() == [per_class] * 10
    assert raw.y[:20].unique().numel() > 3, "the classes are mixed, not one after another"
    assert fingerprint(raw.x.numpy().tobytes()) == PIXELS[name, split]


def test_images_come_as_floats_in_0_to_1() -> None:
    raw, images = data.load("mnist-5k", dtype=torch.uint8), data.load("mnist-5k")
    assert images.x.dtype == torch.float32
    assert torch.equal(images.x, raw.x / 255)
    assert (images.x.min(), images.x.max()) == (0, 1)
    assert data.load("mnist-5k", "test", dtype=torch.float64).x.dtype == torch.float64
    assert repr(images) == "Images(mnist-5k/train: 4000 x 1 x 28 x 28 float32, 10 classes)"


def test_normalised_images_have_mean_0_and_deviation_1() -> None:
    train, test = data.load("cifar-5k"), data.load("cifar-5k", "test")
    mean, std = train.normalised(*train.moments()).moments()
    assert mean.tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert std.tolist() == pytest.approx([1] * 3, abs=1e-5)
    centre, spread = train.moments()
    moved = test.normalised(centre, spread)
    torch.testing.assert_close(moved.x[7, 1], (test.x[7, 1] - centre[1]) / spread[1])
    assert moved.digest == test.digest


def test_normalising_refuses_what_it_cannot_do() -> None:
    images = data.load("mnist-5k", "test")
    with pytest.raises(ValueError, match=r"mean must have shape \(1,\); got \(3,\)"):
        images.normalised(torch.zeros(3), torch.ones(1))
    with pytest.raises(ValueError, match=r"std must be positive"):
        images.normalised(torch.zeros(1), torch.zeros(1))
    with pytest.raises(TypeError, match=r"x must be floating point here; got torch.uint8"):
        data.load("mnist-5k", "test", dtype=torch.uint8).moments()


def test_shakespeare_is_whole_and_split_by_position() -> None:
    train, val, test = (data.load("tiny-shakespeare", split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1_003_854, 55_770, 55_770)
    text = "".join(part.decode(part.tokens) for part in (train, val, test))
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")
    assert train.vocabulary == val.vocabulary == tuple(sorted(set(text)))
    assert len(train.vocabulary) == 65
    assert train.tokens.dtype == torch.int64


def test_text_encodes_what_it_decodes() -> None:
    text = data.load("tiny-shakespeare", "val")
    line = "O Romeo, Romeo!\n"
    assert text.decode(text.encode(line)) == line
    with pytest.raises(ValueError, match=r"outside the vocabulary of tiny-shakespeare: \['#', 'é'\]"):
        text.encode("#café")


@pytest.mark.parametrize("name", ["mnist-5k", "cifar-5k", "tiny-shakespeare"])
def test_the_digest_is_that_of_the_files(name: str) -> None:
    assert data.load(name).digest == data.digest(name)
    assert data.load(name, "test").digest == data.digest(name)
    assert len(bytes.fromhex(data.digest(name))) == 32


def test_the_digest_of_one_file_is_that_of_its_bytes() -> None:
    folder = loading.package_files("cograd.data") / "embedded"
    raw = (folder / "tiny-shakespeare.txt.bz2").read_bytes()
    assert data.digest("tiny-shakespeare") == hashlib.blake2b(raw, digest_size=32).hexdigest()


def test_digits_are_a_fixed_1400_and_397_of_scikit_learns() -> None:
    train, test = data.load("digits"), data.load("digits", "test", dtype=torch.float64)
    assert train.x.shape == (1400, 1, 8, 8)
    assert test.x.shape == (397, 1, 8, 8)
    assert (test.x.dtype, train.x.min(), train.x.max()) == (torch.float64, 0, 1)
    assert torch.equal((train.x * 16).round(), train.x * 16)
    assert fingerprint(train.x.numpy().tobytes()) == "b238d4e2f0143d46ae6c663318df531a"
    with pytest.raises(ValueError, match=r"dtype must be a floating type; got torch.uint8"):
        data.load("digits", dtype=torch.uint8)


def test_breast_cancer_is_standardised() -> None:
    table = data.load("breast-cancer")
    assert table.x.shape == (569, 30)
    assert table.y.bincount().tolist() == [212, 357]
    assert table.x.mean(0).tolist() == pytest.approx([0] * 30, abs=1e-5)
    assert table.x.std(0, correction=0).tolist() == pytest.approx([1] * 30, abs=1e-5)
    assert repr(table) == "Table(breast-cancer/all: 569 x 30 float32, 2 classes)"
    assert table.without("mean_radius").x.shape == (569, 29)


def test_an_embedded_file_that_was_altered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_recorded", lambda: {"mnist-5k": "00"})
    with pytest.raises(data.DataDamaged, match="mnist-5k inside the package"):
        data.load("mnist-5k")
    with pytest.raises(data.DataDamaged, match="mnist-5k inside the package"):
        data.digest("mnist-5k")


def test_a_set_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.load("mnist-5k", "test").name = "mine"  # type: ignore[misc]


def test_no_split_means_the_first() -> None:
    assert data.load("tiny-shakespeare").split == "train"
    assert {info.splits[0] for info in data.names()} == {"train", "all"}


def test_names_lists_every_set_with_its_terms() -> None:
    listed = data.names()
    assert [info.name for info in listed] == list(CATALOGUE)
    assert [info.name for info in listed if info.embedded] == [
        *("mnist-5k", "cifar-5k", "tiny-shakespeare", "digits", "breast-cancer")
    ]
    assert all(info.licence and "\n" not in info.description for info in listed)


def test_the_types_know_every_set_of_their_kind() -> None:
    for alias, kind in (
        (catalogue.ImagesName, data.Images),
        (catalogue.TextName, data.Text),
        (catalogue.TableName, data.Table),
        (catalogue.GraphName, data.Graph),
    ):
        known = [name for name, source in CATALOGUE.items() if source.kind is kind]
        assert list(typing.get_args(alias)) == known


def test_unknown_names_and_splits_are_refused_with_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"no data set 'MNIST5k'; did you mean 'mnist-5k'\? There are mnist-5k,"
    ):
        data.load("MNIST5k")
    with pytest.raises(ValueError, match=r"no data set 'zzz'\. There are"):
        data.digest("zzz")
    with pytest.raises(ValueError, match="split of mnist-5k must be 'train' or 'test'; got 'val'"):
        data.load("mnist-5k", "val")


def test_dtypes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch.uint8 or a floating type; got torch.int64"):
        data.load("mnist-5k", "test", dtype=torch.int64)
    with pytest.raises(ValueError, match="dtype is for images; tiny-shakespeare is Text"):
        data.load("tiny-shakespeare", dtype=torch.float32)
