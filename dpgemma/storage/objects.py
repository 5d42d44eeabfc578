"""Objects under one address of an object storage: gs:// or s3://, by fsspec."""

import contextlib
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from accounting.errors import InputError

# By scheme, what installs its package.
_EXTRAS = {"s3": "s3", "gs": "gcs"}


def is_address(place: str) -> bool:
    """Whether a place is not on this computer's disks.

    >>> is_address("s3://bucket/run"), is_address("runs/first")
    (True, False)
    """
    return "://" in place


def _storage_of(address: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of an address.

    Raises:
      InputError: another kind of address, or a package that is not installed.
    """
    import fsspec

    scheme = address.partition("://")[0]
    if scheme not in _EXTRAS:
        raise InputError(f"{address} is no address that can be used: give gs://BUCKET/... or s3://BUCKET/...")
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    except ImportError:
        raise InputError(f"{address} needs another package: pip install 'dpgemma[{_EXTRAS[scheme]}]'") from None
    return found


@contextlib.contextmanager
def _reported(address: str, what: str, passed: type[Exception] = InputError) -> Iterator[None]:
    """One sentence for whatever goes wrong but `passed`, which the user of the content raises."""
    try:
        yield
    except passed:
        raise
    except Exception as error:  # each storage has exceptions of its own
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise InputError(
            f"{address} cannot be {what} ({reason}): check that the bucket exists, that you may read and write"
            " it, and that the network is up, and run the same command again"
        ) from None


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """An object that is read like a file.

    Attributes:
      address: its own.
      size: bytes.
    """

    address: str
    size: int
    storage: Any = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @contextlib.contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Its bytes.

        Raises:
          InputError: the storage does not let them be read.
        """
        with _reported(self.address, "read", ValueError), self.storage.open(self.address, "rb") as file:
            yield io.BufferedReader(file)


def files(address: str) -> list[StoredFile]:
    """The objects at an address, sorted: the one of that name, those below it, or those that match its * and **.

    Raises:
      InputError: the storage cannot be read.
    """
    storage, root = _storage_of(address)
    scheme = address.partition("://")[0]
    with _reported(address, "read"):
        found = storage.glob(root, detail=True) if set(root) & set("*?[") else storage.find(root, detail=True)
    sizes = {path: facts["size"] for path, facts in found.items() if facts["type"] == "file"}
    return [StoredFile(f"{scheme}://{path}", sizes[path], storage) for path in sorted(sizes) if not path.endswith("/")]


class Objects:
    """What lies under an address, by name: `private/keys.json` is the object at ADDRESS/private/keys.json.

    Every method raises InputError, one sentence, where the storage does not let it do its work.
    """

    def __init__(self, address: str) -> None:
        """Args:
          address: gs://BUCKET/... or s3://BUCKET/...

        Raises:
          InputError: another kind of address, or a package that is not installed.
        """
        scheme, _, path = address.partition("://")
        self.address = address.rstrip("/")
        if scheme not in _EXTRAS or "/" not in path.strip("/") or set(path) & set("*?[]:"):
            raise InputError(
                f"{address} is no folder that can be used: give one on a disk, or gs://BUCKET/FOLDER or"
                " s3://BUCKET/FOLDER without any of * ? [ ] :"
            )
        self._storage: Any
        self._storage, self._root = _storage_of(self.address)

    def _reported(self, what: str) -> contextlib.AbstractContextManager[None]:
        return _reported(self.address, what)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def names(self, folder: str = "") -> list[str]:
        """Of all objects in a folder and in those below it, sorted."""
        start = self._path(folder) if folder else self._root
        with self._reported("read"):
            self._storage.invalidate_cache()
            try:
                found = self._storage.find(start)
            except FileNotFoundError:  # as some storages call a folder without objects; a bucket must exist
                self._storage.ls(self._root.partition("/")[0])
                found = []
        # Consoles mark folders by empty objects whose names end in a slash.
        names = (path.removeprefix(f"{self._root}/") for path in found if path != self._root)
        return sorted(name for name in names if name and not name.endswith("/"))

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Contents by name; names without an object are left out."""
        if not names:
            return {}
        by_path = {self._path(name): name for name in names}
        with self._reported("read"):
            contents = self._storage.cat(list(by_path), on_error="return")
            for content in contents.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return {by_path[path]: content for path, content in contents.items() if isinstance(content, bytes)}

    def write(self, name: str, content: bytes) -> None:
        """Creates or replaces an object."""
        with self._reported("written"):
            self._storage.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Creates an object; False if there is one of this name, whose content then stays."""
        with self._reported("written"):
            try:
                self._storage.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def upload(self, file: pathlib.Path, name: str) -> None:
        """Creates or replaces an object by a file that may be large."""
        with self._reported("written"):
            self._storage.put_file(str(file), self._path(name))

    def download(self, name: str, file: pathlib.Path) -> None:
        """Writes an object, which may be large, into a file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._reported("read"):
            self._storage.get_file(self._path(name), str(file))

    def digest(self, name: str) -> str:
        """SHA-256 of an object, which may be large."""
        with self._reported("read"), self._storage.open(self._path(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def move(self, folder: str, target: str) -> None:
        """Moves all objects of a folder."""
        with self._reported("written"):
            for name in self.names(folder):
                self._storage.mv(self._path(name), self._path(target + name.removeprefix(folder)))

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects; names without one are passed over."""
        with self._reported("written"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._storage.rm_file(self._path(name))
