"""Open the store that a URL names: https://, s3:// or hf://."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol
from urllib.parse import quote, urljoin, urlsplit

import msgspec

from cache.errors import CacheError, CorruptError, NotFoundError, RequestError
from cache.format.gate import decode
from cache.remote.connections import origin_of
from cache.remote.deadline import Deadline, apart, plain_text
from cache.remote.http import MAX_URL, HttpStore, whole_body
from cache.remote.listing import FileInfo, file_info, is_table
from cache.remote.net import is_loopback
from cache.remote.retry import RetryPolicy, with_retries

if TYPE_CHECKING:
    import obstore.store

MAX_FILES = 10_000_000
"""Objects below a prefix, at most."""
MAX_PAGES = 1000
"""Pages of the hub's list of files, at most. One has 1,000 files."""
MAX_PAGE_BYTES = 8 << 20
STREAM_BYTES = 1 << 20
"""Bytes of an answer that are received at a time."""


class Store(Protocol):
    """The files of a remote cache. Any number of threads may call all methods."""

    url: str
    """The URL that the user gave, for messages."""

    def read(
        self,
        name: str,
        offset: int,
        target: memoryview,
        size: int | None,
        stop: threading.Event | None = None,
    ) -> None:
        """Fill `target` with the bytes of a file from `offset` on. Make one attempt.

        Args:
            name: the file, relative to the root of the cache.
            offset: the first byte to read.
            target: receives len(target) bytes.
            size: the file must have this many bytes; None: any size.
            stop: ends the attempt when it is set.

        Raises:
            RequestError: the attempt failed; its `got` counts the bytes that arrived.
        """

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """Return a whole file of at most `max_bytes`. Make one attempt.

        Raises:
            RequestError: the attempt failed, or the file is larger.
        """

    def list_files(self) -> dict[str, FileInfo]:
        """Return every table below the root of the cache, by its name relative to the root.

        Raises:
            RequestError: the attempt failed.
            NotFoundError: the store cannot list its files.
        """


def open_store(url: str, policy: RetryPolicy) -> Store:
    """Return the store that a URL names.

    Only for hf:// a request is made: it asks which commit the revision is.

    Raises:
        CacheError: the scheme is not supported, or a library is missing.
        NotFoundError: no such repository.
    """
    stores = {"http": HttpStore, "https": HttpStore, "s3": ObjectStore, "hf": HubStore}
    scheme = url.partition("://")[0].lower()
    if scheme not in stores:
        raise CacheError(f"{url}: features are read from https://, s3://, hf:// or a folder")
    return stores[scheme](url, policy)


def read_range(
    store: Store,
    policy: RetryPolicy,
    name: str,
    offset: int,
    target: memoryview,
    size: int | None,
    stop: threading.Event | None = None,
) -> None:
    """Fill `target` from a file, with retries that continue a broken body where it ended.

    Args:
        store: the store.
        policy: pauses and limits.
        name: the file, relative to the root of the cache.
        offset: the first byte to read.
        target: receives len(target) bytes.
        size: the file must have this many bytes; None: any size.
        stop: cancels the read when it is set.

    Raises:
        UnreachableError: a failure that repeating cannot cure, no progress for too long, or `stop`.
    """
    received = 0

    def attempt() -> None:
        nonlocal received
        try:
            # Released in any case: an error's traceback keeps the view, and a mapped file with views that
            # are not released cannot be closed.
            with target[received:] as rest:
                store.read(name, offset + received, rest, size, stop)
        except RequestError as error:
            received += error.got
            raise

    with_retries(policy, f"{store.url}/{name}", attempt, stop)


# ---- s3


class ObjectStore:
    """A bucket, or a prefix of one, read through obstore (bindings of the Rust library object_store)."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        """Connect to nothing yet. Credentials, region and endpoint come from the AWS environment.

        Raises:
            CacheError: obstore is not installed, or the endpoint is plain http.
        """
        try:
            import obstore
        except ImportError:
            raise CacheError(f"{url}: needs obstore: pip install 'nanomolmo2[s3]'") from None
        parts = urlsplit(url)
        self.url = url.rstrip("/")
        self._obstore, self._policy = obstore, policy
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        endpoint_parts = urlsplit(endpoint)
        plain_http = endpoint_parts.scheme == "http"
        if plain_http and not (policy.allow_private or is_loopback(endpoint_parts.hostname or "")):
            raise CacheError(
                f"{url}: AWS_ENDPOINT_URL {endpoint} is plain http; if you trust it: --allow-private"
            )
        config, provider = _credentials()
        if endpoint:
            config["endpoint"] = endpoint
        self._store: obstore.store.S3Store = obstore.store.S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            config=config,  # type: ignore[arg-type]  # a TypedDict, made of parts
            credential_provider=provider,
            client_options={
                "allow_http": plain_http,
                "connect_timeout": datetime.timedelta(seconds=policy.connect_s),
                "read_timeout": datetime.timedelta(seconds=policy.read_s),
                "timeout": datetime.timedelta(seconds=policy.request_s),
            },
            # `with_retries` repeats requests, so that pauses and messages are those of every store.
            retry_config={"max_retries": 0},
        )

    def list_files(self) -> dict[str, FileInfo]:
        """Return every table below the prefix; see Store."""

        def pages() -> dict[str, FileInfo]:
            found, seen = {}, 0
            # 1000 objects a page: the most that S3 returns.
            for page in self._obstore.list(self._store, chunk_size=1000):
                seen += len(page)
                if seen > MAX_FILES:
                    raise RequestError(f"more than {MAX_FILES:,} objects", again=False)
                for meta in page:
                    if is_table(meta["path"]):
                        tag = f"{meta['e_tag'] or ''} {meta['last_modified']}"
                        found[meta["path"]] = file_info(meta["path"], meta["size"], tag)
            return found

        with self._request_errors():
            return apart(pages, Deadline(self._policy.give_up_after_s))

    def read(
        self,
        name: str,
        offset: int,
        target: memoryview,
        size: int | None,
        stop: threading.Event | None = None,
    ) -> None:
        """Fill `target` from an object; see Store."""
        wanted = (offset, offset + len(target))

        def get() -> list[bytes]:
            result = self._obstore.get(self._store, name, options={"range": wanted})
            if size is not None and result.meta["size"] != size:
                what = f"{result.meta['size']:,} bytes, not the {size:,} of its commit"
                raise RequestError(what, again=False)
            if result.range != wanted:
                raise RequestError(f"bytes {result.range} instead of {wanted}", again=True)
            return _chunks(result, wanted[1] - wanted[0])

        with self._request_errors():
            chunks = apart(get, Deadline(self._policy.request_s, stop))
        received = 0
        for chunk in chunks:
            with memoryview(chunk) as data:
                target[received : received + len(data)] = data
                received += len(data)
        if received < len(target):
            raise RequestError("the body ends early", again=True)

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """Return a whole object; see Store."""

        def get() -> bytes:
            result = self._obstore.get(self._store, name)
            size = result.meta["size"]
            if size > max_bytes:
                raise RequestError(f"{name} has more than {max_bytes:,} bytes", again=False)
            return b"".join(bytes(chunk) for chunk in _chunks(result, size))

        with self._request_errors():
            return apart(get, Deadline(self._policy.request_s))

    @contextlib.contextmanager
    def _request_errors(self) -> Iterator[None]:
        """Translate errors of obstore, whose type tells the cause and whose text has many lines."""
        errors = self._obstore.exceptions
        try:
            yield
        except (FileNotFoundError, errors.NotFoundError):
            raise RequestError("no such object", again=False, missing=True) from None
        except (errors.PermissionDeniedError, errors.UnauthenticatedError):
            what = "not allowed with the credentials that were found (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...)"
            raise RequestError(what, again=False) from None
        except errors.BaseError as error:
            what = plain_text(f"{type(error).__name__}: {error}")
            raise RequestError(what, again=True) from None


def _chunks(result: obstore.GetResult, most: int) -> list[bytes]:
    """Return the body of an answer in chunks. One that is longer than was asked for is not received."""
    chunks: list[bytes] = []
    received = 0
    for chunk in result.stream(min_chunk_size=STREAM_BYTES):
        received += len(chunk)
        if received > most:
            raise RequestError("more bytes than were requested", again=False)
        chunks.append(chunk)
    return chunks


def _credentials() -> tuple[dict[str, Any], Any]:
    """Return a configuration for obstore, and its credential provider.

    With boto3, all credentials that it finds are used (environment, profiles, SSO, roles). Without boto3,
    obstore reads the environment. Requests are unsigned when there are no credentials.
    """
    if "AWS_SKIP_SIGNATURE" in os.environ:
        return {}, None
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}, None
    session = boto3.Session()
    config = {"region": session.region_name} if session.region_name else {}
    if session.get_credentials() is None:
        return {**config, "skip_signature": True}, None
    return config, Boto3CredentialProvider(session)


# ---- the hub


class HubStore(HttpStore):
    """A repository of the Hugging Face hub at one commit: its API lists it, our http client reads it.

    huggingface_hub resolves the URL and finds the user's token (HF_TOKEN, `hf auth login`, HF_ENDPOINT). Our
    own client reads the files, because that library's file system makes one or two more requests for a range.
    """

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        """Resolve hf://datasets/ORG/NAME[@REVISION][/FOLDER], or hf://ORG/NAME for a model.

        Raises:
            CacheError: the URL names a bucket of the hub.
            UnreachableError: no connection to the hub, after all retries.
            NotFoundError: no such repository or revision for this user, or the hub does not answer.
        """
        from huggingface_hub import HfApi, HfFileSystem, constants
        from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        api = HfApi()

        def ask() -> tuple[HfFileSystemResolvedRepositoryPath, str | None]:
            with _hub_answers():
                at = HfFileSystem().resolve_path(url)
                if not isinstance(at, HfFileSystemResolvedRepositoryPath):
                    raise CacheError(f"{url}: a bucket; write hf://datasets/ORG/NAME")
                repo: dict[str, Any] = {"repo_id": at.repo_id, "repo_type": at.repo_type}
                return at, api.repo_info(**repo, revision=at.revision).sha

        def resolve() -> tuple[HfFileSystemResolvedRepositoryPath, str | None]:
            return apart(ask, Deadline(policy.request_s))

        try:
            at, commit = with_retries(policy, url, resolve)
        except (OSError, ValueError, NotImplementedError) as error:  # the hub's errors are OSErrors
            why = plain_text(error)
            raise NotFoundError(
                f"{url}: the hub has no such repository for you, or does not answer ({why}); a private one "
                "needs HF_TOKEN or `hf auth login`"
            ) from None
        if not re.fullmatch("[0-9a-f]{40}", str(commit)):
            raise NotFoundError(f"{url}: the hub names no commit of it")
        self._folder = at.path_in_repo.strip("/")
        prefix = constants.REPO_TYPES_URL_PREFIXES.get(at.repo_type, "")
        here = f"{at.repo_id}/resolve/{commit}/{quote(self._folder)}"
        headers = {k: v for k, v in build_hf_headers().items() if k.lower() == "authorization"}
        super().__init__(
            f"{api.endpoint}/{prefix}{here}", policy, url=url.rstrip("/"), headers=headers
        )
        folder = f"/{quote(self._folder, safe='')}" if self._folder else ""
        tree = f"{at.repo_type}s/{at.repo_id}/tree/{commit}{folder}?recursive=true"
        self._tree = f"{api.endpoint}/api/{tree}"

    def list_files(self) -> dict[str, FileInfo]:
        """Return every table below the folder; see Store."""
        found: dict[str, FileInfo] = {}
        deadline = Deadline(self._policy.give_up_after_s)
        page: str | None = self._tree
        for _ in range(MAX_PAGES):
            entries, page = self._page(str(page), deadline)
            for entry in entries:
                name = entry.path.removeprefix(self._folder).lstrip("/")
                if entry.type == "file" and is_table(name):
                    tag = f"sha256:{entry.lfs.oid}" if entry.lfs else f"blob:{entry.oid}"
                    found[name] = file_info(name, entry.size, tag)
            if page is None:
                return found
            if not entries:
                break
        raise RequestError("the hub's list of files does not end", again=False)

    def _page(self, url: str, deadline: Deadline) -> tuple[list[_Entry], str | None]:
        """Return a page of the repository's list of files, and the URL of the next one."""
        exchange = deadline.within(self._policy.request_s)
        with self._open(url, {}, MAX_PAGE_BYTES, exchange) as response:
            data = whole_body(response, "the list of files", MAX_PAGE_BYTES)
            following = _NEXT.search(response.headers.get("Link", "")[:MAX_URL])
        try:
            entries = decode(data, list[_Entry], Path("tree"))
            target = urljoin(url, following[1]) if following else None
            if target and origin_of(target) != self._origin:
                raise ValueError
        except (CorruptError, ValueError):
            raise RequestError("the hub's list of files is not valid", again=False) from None
        return entries, target


_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_NEXT = re.compile(r'<([^<>]+)>\s{0,9};\s{0,9}rel="?next"?')


class _Lfs(msgspec.Struct):
    oid: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Entry(msgspec.Struct):
    """A file or folder in the hub's list; its other keys are not read."""

    type: _Text
    path: _Text
    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)] = 0
    oid: Annotated[str, msgspec.Meta(max_length=64)] = ""
    lfs: _Lfs | None = None


@contextlib.contextmanager
def _hub_answers() -> Iterator[None]:
    """Translate errors of the hub's client: of the connection, and of what it makes of an odd answer."""
    try:
        yield
    except (CacheError, OSError, ValueError, NotImplementedError):  # the hub's errors are OSErrors
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
            raise RequestError(plain_text(f"the hub: {error}"), again=True) from None
        raise ValueError(f"an answer that is not valid ({type(error).__name__})") from None
