"""Blobs in an object store, by obstore; imported only where a store's URL asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore, MemoryStore, S3Store

if TYPE_CHECKING:
    from obstore.store import RetryConfig

from perdure.connectors.blobs import Blob, checked
from perdure.schemas.errors import ConfigurationError, NotFound, Unreachable

_RETRY: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=15)}
"""Of a single request. Whoever can wait for longer asks again, and can be stopped in between."""
_NO_ACCESS = (PermissionDeniedError, UnauthenticatedError, PermissionError)
_BUCKET_MISSING = ("NoSuchBucket", "bucket does not exist")


def open_bucket(url: str) -> ObjectBlobs:
    """The store at `s3://bucket/prefix` or `gs://bucket/prefix`. Raises `ConfigurationError`."""
    kind = S3Store if url.startswith("s3://") else GCSStore
    try:
        return ObjectBlobs(kind.from_url(url, retry_config=_RETRY), url)
    except BaseError as error:
        raise ConfigurationError(f"{url!r} is no place for blobs: {_first_line(error)}") from error


class ObjectBlobs:
    """A bucket, or what in it begins with a prefix. `where`: its address, for people."""

    def __init__(self, store: S3Store | GCSStore | MemoryStore, where: str) -> None:
        self._store, self._where = store, where.rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        """See `Blobs`."""
        with self._told(checked(name)):
            try:
                obstore.put(self._store, name, data)
            except FileNotFoundError as error:  # an upload in parts that the store has given up, or ended already
                if _names_bucket(error):
                    raise
                raise Unreachable(f"{self._where}/{name} was not taken: {_first_line(error)}") from error

    def get(self, name: str) -> bytes:
        """See `Blobs`."""
        with self._told(checked(name)):
            return bytes(obstore.get(self._store, name).bytes())

    def head(self, name: str, size: int) -> bytes:
        """See `Blobs`."""
        with self._told(checked(name)):
            return bytes(obstore.get_range(self._store, name, start=0, length=size))

    def list(self, prefix: str) -> list[Blob]:
        """See `Blobs`."""
        with self._told(checked(prefix)):
            found = [meta for batch in obstore.list(self._store, prefix=prefix) for meta in batch]
        return sorted(Blob(m["path"], m["size"], round(m["last_modified"].timestamp() * 1000)) for m in found)

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        with self._told(checked(name)):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError as error:  # Google says so, others do not
                if _names_bucket(error):
                    raise

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """An error of obstore's as the one that says what it means."""
        try:
            yield
        except (BaseError, OSError) as error:
            where = f"{self._where}/{name}"
            if _names_bucket(error):
                raise ConfigurationError(f"the bucket of {where} does not exist: create it") from error
            if isinstance(error, FileNotFoundError):
                raise NotFound(f"the blob {where} is missing") from error
            if isinstance(error, _NO_ACCESS):
                raise ConfigurationError(f"no access to {where}: {_first_line(error)}") from error
            raise Unreachable(f"the store of {where} did not do it: {_first_line(error)}") from error


def _names_bucket(error: Exception) -> bool:
    return any(text in str(error) for text in _BUCKET_MISSING)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
