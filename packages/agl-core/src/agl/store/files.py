"""Folders in a store, as versions of a resource: who reads the store needs no disk in common with who wrote it.

The resource's metadata have the manifest: by file the SHA-256 of its parts, which `Store.get_resource_part` returns.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from agl.errors import DamageError, FolderError, StoreError
from agl.store.protocol import MAX_PART_BYTES, Resource, Store

_MANIFEST: Final = "files"


def publish(store: Store, name: str, version: int, folder: Path, metadata: Mapping[str, Any] | None = None) -> Resource:
    """Store all files in `folder` as this version, in place of earlier ones; returns when all of them are stored."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {file: [digest_of(part) for part in _parts(path)] for file, path in files.items()}
    resource = Resource(name, version, str(folder), {**(metadata or {}), _MANIFEST: manifest})
    store.put_resource(resource)
    for part in (part for path in files.values() for part in _parts(path)):
        store.put_resource_part(name, version, digest_of(part), part)
    return resource


def fetch(store: Store, resource: Resource, folder: Path) -> None:
    """Write the files of `resource` to `folder`, in the place of what is there. Whoever sees the folder sees all of it.

    Raises StoreError if a part is missing, DamageError if one is damaged, FolderError if the folder cannot be written.
    """
    title = f"{resource.name}@{resource.version}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary, folder.name)
            new.mkdir()
            for file, digests in resource.metadata.get(_MANIFEST, {}).items():
                path = new / _relative(title, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as output:
                    for digest in digests:
                        output.write(_part(store, resource, file, digest))
            shutil.rmtree(folder, ignore_errors=True)
            new.replace(folder)
    except OSError as error:
        raise FolderError(f"cannot write the files of {title} to {folder}: {error.strerror or error}") from error


def content_digest(resource: Resource) -> str:
    """Digest of all its files: equal for equal folders."""
    return digest_of(repr(sorted(resource.metadata.get(_MANIFEST, {}).items())).encode())


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(MAX_PART_BYTES):
            yield part


def _part(store: Store, resource: Resource, file: str, digest: str) -> bytes:
    part = store.get_resource_part(resource.name, resource.version, digest)
    title = f"part {digest} of {file} of {resource.name}@{resource.version} in {store.uri}"
    if part is None:
        raise StoreError(f"{title} is missing: its version was deleted, or is not complete yet")
    if digest_of(part) != digest:
        raise DamageError(f"{title} is damaged: its SHA-256 is {digest_of(part)}; publish it again")
    return part


def _relative(title: str, file: str) -> PurePosixPath:
    """Raises StoreError for a path out of the folder."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise StoreError(f"{title} has the file {file!r}, which is not in its folder")
    return path
