"""Where the files of a data set are: inside the package, on this machine, or at their official home."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO
from urllib.request import urlopen

import platformdirs
from rich.console import Console
from rich.progress import Progress

TIMEOUT = 30.0
"""Seconds a server may stay silent."""

LIMIT = 512 * 2**20
"""Bytes of the largest download, and of what an archive unpacks to. CIFAR-10, the largest set, has 144 MB."""

_CHUNK = 2**20
_SHOW_PROGRESS_FROM = 8 * 2**20


class DataUnavailable(Exception):
    """The files of a data set are neither on this machine nor to be had from their home."""


class DataDamaged(ValueError):
    """A file is there and is not what it should be."""


@dataclass(frozen=True)
class Files:
    """The files of one data set.

    ``urls`` maps each file's name, which is also its name in the set's folder, to its official home. Of an
    embedded set the home is None. ``archive`` is the address of a zip that holds them all, for a set that is
    published so; the urls are then not used.
    """

    folder: str
    urls: Mapping[str, str | None]
    archive: str | None = None


@dataclass(frozen=True)
class Origin:
    """What a reader gets: which split of which set it is asked for, and the files to read it from."""

    name: str
    split: str
    digest: str
    files: Mapping[str, Traversable]

    @contextmanager
    def reading(self, file: str) -> Iterator[bytes]:
        """The bytes of a file; whatever goes wrong in parsing them comes out as `DataDamaged`.

        A file that cannot be read at all raises OSError, which names it.
        """
        raw = self.files[file].read_bytes()
        try:
            yield raw
        except Exception as error:
            raise DataDamaged(
                f"{self.files[file]} is not what {self.name} should have there "
                f"({type(error).__name__}: {error}); remove it and load again, or put a sound one there"
            ) from error


def cache_dir() -> Path:
    """The user's cache of cograd, which may not exist yet."""
    return Path(platformdirs.user_cache_dir("cograd", appauthor=False))


def embedded(files: Files) -> dict[str, Traversable]:
    """The files of a set that ships inside the package."""
    folder = package_files("cograd.data") / files.folder
    return {file: folder / file for file in files.urls}


def locate(name: str, files: Files) -> dict[str, Traversable]:
    """The files of a set: in $COGRAD_DATA, else in the user cache, else downloaded into that cache.

    All come from one folder, so that two versions of a set never mix. Raises `DataUnavailable` when some
    file is in neither place and its home does not answer.
    """
    cache = cache_dir()
    given = os.environ.get("COGRAD_DATA")
    for root in [Path(given)] if given else []:
        if _missing(files, root / files.folder) == []:
            return {file: root / files.folder / file for file in files.urls}
    try:
        _download_missing(files, cache / files.folder)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, DataDamaged) as error:
        raise DataUnavailable(_advice(name, files, cache, given, error)) from error
    return {file: cache / files.folder / file for file in files.urls}


def digest(files: Mapping[str, Traversable]) -> str:
    """BLAKE2b-256 of one file's bytes, or of the digests of several, in order."""
    digests = []
    for file in files.values():
        with file.open("rb") as source:
            state = _blake2b()
            while chunk := source.read(_CHUNK):
                state.update(chunk)
        digests.append(state.digest())
    return digests[0].hex() if len(digests) == 1 else _blake2b(b"".join(digests)).hexdigest()


def _blake2b(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=32)


def _missing(files: Files, folder: Path) -> list[str]:
    return [file for file in files.urls if not (folder / file).is_file()]


def _advice(name: str, files: Files, cache: Path, given: str | None, error: Exception) -> str:
    places = [cache / files.folder]
    if given:
        places.insert(0, Path(given) / files.folder)
    missing = min((_missing(files, place) for place in places), key=len)
    shown = [*missing[:8], f"... {len(missing) - 8} more"] if len(missing) > 8 else missing
    if files.archive:
        lines = [f"  {', '.join(shown)}", f"    in {files.archive}"]
    else:
        lines = [f"  {file}  from {files.urls[file]}" if file in files.urls else f"  {file}" for file in shown]
    where = f"{places[0]} or {places[-1]}" if given else f"{places[0]} or $COGRAD_DATA/{files.folder}"
    head = f"{name} is not on this machine, and downloading it failed ({error}). Missing:"
    return "\n".join([head, *lines, f"Put {'it' if len(missing) == 1 else 'them'} into {where}."])


def _download_missing(files: Files, folder: Path) -> None:
    missing = _missing(files, folder)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if files.archive:
        with tempfile.TemporaryFile() as archive:
            _copy_url(files.archive, archive)
            _unpack(archive, missing, folder)
        return
    for file in missing:
        url = files.urls[file]
        assert url is not None, "an embedded set is never downloaded"
        with replacing(folder / file) as target:
            _copy_url(url, target)


def _copy_url(url: str, target: IO[bytes]) -> None:
    """Download into an open file. Raises OSError, which URLError and a time-out are, or DataDamaged."""
    with urlopen(url, timeout=TIMEOUT) as source:
        size = int(source.headers.get("Content-Length") or 0)
        if size > LIMIT:
            raise DataDamaged(f"{url} announces {size} bytes; at most {LIMIT} are taken")
        quiet = size < _SHOW_PROGRESS_FROM
        with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
            bar = progress.add_task(url.rsplit("/", 1)[-1], total=size or None)
            got = 0
            while chunk := source.read(_CHUNK):
                got += len(chunk)
                if got > LIMIT:
                    raise DataDamaged(f"{url} sends more than {LIMIT} bytes")
                target.write(chunk)
                progress.advance(bar, len(chunk))
    if size and got != size:
        raise DataDamaged(f"{url} announced {size} bytes and sent {got}")


def _unpack(archive: IO[bytes], wanted: list[str], folder: Path) -> None:
    """Write the wanted members, found by their last name alone, so that no member chooses where it goes."""
    with zipfile.ZipFile(archive) as source:
        members = {info.filename.rsplit("/", 1)[-1]: info for info in source.infolist()}
        absent = [file for file in wanted if file not in members]
        if absent:
            raise DataDamaged(f"the archive lacks {', '.join(absent[:8])}")
        if sum(members[file].file_size for file in wanted) > LIMIT:
            raise DataDamaged(f"the archive unpacks to more than {LIMIT} bytes")
        for file in wanted:
            with replacing(folder / file) as target:
                target.write(source.read(members[file]))


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only when all is written, and vanishes on an error."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as target:
        try:
            yield target
            target.close()
            os.replace(target.name, path)
        except BaseException:
            target.close()
            os.unlink(target.name)
            raise
