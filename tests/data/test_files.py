"""Where files are found, how they are downloaded, and what is said when they cannot be had."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from email.message import Message
from pathlib import Path
from urllib.request import urlopen

import pytest

from cograd import data
from cograd.data import files
from cograd.data.catalogue import CATALOGUE
from cograd.data.texts import BROWN_FILES

LINES = {"train.tsv": b"good film\t1\nbad film\t0", "dev.tsv": b"fine\t1\n", "test.tsv": b"dull\t0\n"}


def put(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)


class Answer(io.BytesIO):
    """What urlopen gives, from memory."""

    def __init__(self, raw: bytes, announced: int | None = None) -> None:
        super().__init__(raw)
        self.headers = Message()
        if announced is not None:
            self.headers["Content-Length"] = str(announced)


def test_the_given_folder_comes_before_the_cache(given: Path, cache: Path) -> None:
    put(cache / "sst2", LINES)
    assert data.load("sst2", "val")[0] == ("fine", 1)
    put(given / "sst2", LINES | {"dev.tsv": b"other\t0\n"})
    assert data.load("sst2", "val")[0] == ("other", 0)


def test_an_incomplete_folder_is_passed_over(given: Path, cache: Path) -> None:
    put(cache / "sst2", LINES)
    put(given / "sst2", {"dev.tsv": b"other\t0\n"})
    assert data.load("sst2", "val")[0] == ("fine", 1)


def test_without_network_the_error_says_what_to_put_where(given: Path, cache: Path) -> None:
    with pytest.raises(data.DataUnavailable) as caught:
        data.load("mnist")
    text = str(caught.value)
    assert "mnist is not on this machine" in text
    assert "Name or service not known" in text
    for split in ("train", "test"):
        home = "https://huggingface.co/datasets/ylecun/mnist/resolve/main/mnist"
        assert f"{split}.parquet  from {home}/{split}-00000-of-00001.parquet" in text
    assert f"Put them into {given / 'mnist'} or {cache / 'mnist'}." in text


def test_the_error_names_only_what_is_missing(cache: Path) -> None:
    put(cache / "sst2", {name: LINES[name] for name in ("train.tsv", "dev.tsv")})
    with pytest.raises(data.DataUnavailable) as caught:
        data.digest("sst2")
    assert "test.tsv" in str(caught.value)
    assert "train.tsv" not in str(caught.value)
    assert f"Put it into {cache / 'sst2'} or $COGRAD_DATA/sst2." in str(caught.value)


def test_the_error_about_an_archive_names_the_archive(given: Path) -> None:
    with pytest.raises(data.DataUnavailable, match=r"ca01, .*\.\.\. 492 more") as caught:
        data.load("brown")
    assert "/corpora/brown.zip" in str(caught.value)


def test_a_download_lands_in_the_cache_and_is_not_repeated(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    put(home, LINES)
    source = CATALOGUE["sst2"]
    there = replace(source.files, urls={name: (home / name).as_uri() for name in source.files.urls})
    monkeypatch.setitem(CATALOGUE, "sst2", replace(source, files=there))
    monkeypatch.setattr(files, "urlopen", urlopen)
    monkeypatch.setattr(files, "_SHOW_PROGRESS_FROM", 0)
    first = data.load("sst2")
    assert repr(first) == "Records(sst2/train: 2 x Sentence)"
    assert [row.label for row in first] == [1, 0]
    assert first.rows == (("good film", 1), ("bad film", 0))
    assert sorted(path.name for path in (cache / "sst2").iterdir()) == sorted(LINES)
    for name in LINES:
        (home / name).unlink()
    assert data.load("sst2").digest == first.digest


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: Answer(b"short", announced=50), "announced 50 bytes and sent 5"),
        (lambda: Answer(b"x", announced=10**12), "announces 1000000000000 bytes; at most"),
        (lambda: Answer(b"x" * 200), "sends more than 100 bytes"),
    ],
)
def test_a_bad_download_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch, answer: type[Answer], message: str
) -> None:
    monkeypatch.setattr(files, "LIMIT", 100)
    monkeypatch.setattr(files, "urlopen", lambda url, timeout: answer())
    with pytest.raises(data.DataUnavailable, match=message):
        data.load("gsm8k")
    assert list((cache / "gsm8k").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_of(cache: Path) -> None:
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(data.DataUnavailable, match=r"downloading it failed \(.*cache"):
        data.load("gsm8k")


def archive(members: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        for name, raw in members.items():
            out.writestr(name, raw)
    return target.getvalue()


def serve(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(files, "urlopen", lambda url, timeout: Answer(raw, len(raw)))


def test_brown_comes_out_of_its_archive(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"brown/{name}": f"\n\n\tIn/in {name}/np ./.\n".encode() for name in BROWN_FILES[1:]}
    text = b"\n\tThe/at and/or/cc choice/nn ./.\n\n\n\tYes/rb\n"
    serve(monkeypatch, archive(members | {"../../ca01": text, "brown/README": b"no"}))
    rows = data.load("brown").rows
    assert len(rows) == 501
    assert rows[0] == (("The", "and/or", "choice", "."), ("at", "cc", "nn", "."), "news", "ca01")
    assert rows[1] == (("Yes",), ("rb",), "news", "ca01")
    assert rows[-1] == (("In", "cr09", "."), ("in", "np", "."), "humor", "cr09")
    assert len({row.genre for row in rows}) == 15
    assert sorted(path.name for path in (cache / "brown").iterdir()) == sorted(BROWN_FILES)
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cache"]


def test_bad_archives_are_refused(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, archive({"brown/ca01": b"The/at"}))
    with pytest.raises(data.DataUnavailable, match="the archive lacks ca02, ca03"):
        data.load("brown")
    serve(monkeypatch, b"<html>not a zip</html>")
    with pytest.raises(data.DataUnavailable, match="not a zip file"):
        data.load("brown")
    monkeypatch.setattr(files, "LIMIT", 99_000)
    serve(monkeypatch, packed_tightly())
    with pytest.raises(data.DataUnavailable, match="unpacks to more than 99000 bytes"):
        data.load("brown")


def packed_tightly() -> bytes:
    """A small zip whose members are large together."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in BROWN_FILES:
            out.writestr(f"brown/{name}", b"x" * 2000)
    return target.getvalue()
