"""Open the store that a URL names: https://, s3:// or hf://."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

from cache.errors import CacheError, NotFoundError, RequestError
from cache.remote.http import HttpStore
from cache.remote.listing import FileInfo
from cache.remote.net import is_loopback
from cache.remote.retry import RetryPolicy, with_retries

if TYPE_CHECKING:
    import obstore.store


class Store(Protocol):
    """The files of a remote cache. Any number of threads may call all methods."""

    url: str
    """The URL that the user gave, for messages."""

    def read(self, name: str, offset: int, target: memoryview, size: int | None) -> None:
        """Fill `target` with the bytes of a file from `offset` on. Make one attempt.

        Args:
            name: the file, relative to the root of the cache.
            offset: the first byte to read.
            target: receives len(target) bytes.
            size: the file must have this many bytes; None: any size.

        Raises:
            RequestError: the attempt failed; its `got` counts the bytes that arrived.
        """

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """Return a whole file of at most `max_bytes`. Make one attempt.

        Raises:
            RequestError: the attempt failed, or the file is larger.
        """

    def list_files(self) -> dict[str, FileInfo]:
        """Return every file below the root of the cache, by its name relative to the root.

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
                store.read(name, offset + received, rest, size)
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
        self._obstore = obstore
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
        """Return every object below the prefix; see Store."""
        found = {}
        with self._request_errors():
            # 1000 objects a page: the most that S3 returns.
            for page in self._obstore.list(self._store, chunk_size=1000):
                for meta in page:
                    tag = f"{meta['e_tag'] or ''} {meta['last_modified']}"
                    found[meta["path"]] = FileInfo(nbytes=meta["size"], tag=tag)
        return found

    def read(self, name: str, offset: int, target: memoryview, size: int | None) -> None:
        """Fill `target` from an object; see Store."""
        wanted = (offset, offset + len(target))
        with self._request_errors():
            result = self._obstore.get(self._store, name, options={"range": wanted})
            if size is not None and result.meta["size"] != size:
                what = f"{result.meta['size']:,} bytes, not the {size:,} of its commit"
                raise RequestError(what, again=False)
            if result.range != wanted:
                raise RequestError(f"bytes {result.range} instead of {wanted}", again=True)
            with memoryview(result.bytes()) as data:
                target[:] = data

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """Return a whole object; see Store."""
        with self._request_errors():
            result = self._obstore.get(self._store, name)
            if result.meta["size"] > max_bytes:
                raise RequestError(f"{name} has more than {max_bytes:,} bytes", again=False)
            return bytes(result.bytes())

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
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise RequestError(what, again=True) from None


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

        self._api = HfApi()

        def resolve() -> tuple[HfFileSystemResolvedRepositoryPath, dict[str, Any], str | None]:
            with _hub_answers():
                at = HfFileSystem().resolve_path(url)
                if not isinstance(at, HfFileSystemResolvedRepositoryPath):
                    raise CacheError(f"{url}: a bucket; write hf://datasets/ORG/NAME")
                repo: dict[str, Any] = {"repo_id": at.repo_id, "repo_type": at.repo_type}
                return at, repo, self._api.repo_info(**repo, revision=at.revision).sha

        try:
            at, repo, commit = with_retries(policy, url, resolve)
        except (OSError, ValueError, NotImplementedError) as error:  # the hub's errors are OSErrors
            why = " ".join(str(error).split())[:200]
            raise NotFoundError(
                f"{url}: the hub has no such repository for you, or does not answer ({why}); a private one "
                "needs HF_TOKEN or `hf auth login`"
            ) from None
        self._tree = {**repo, "revision": commit, "recursive": True}
        self._folder = at.path_in_repo.strip("/")
        prefix = constants.REPO_TYPES_URL_PREFIXES.get(at.repo_type, "")
        base = f"{self._api.endpoint}/{prefix}{at.repo_id}/resolve/{commit}/{quote(self._folder)}"
        headers = {k: v for k, v in build_hf_headers().items() if k.lower() == "authorization"}
        super().__init__(base, policy, url=url.rstrip("/"), headers=headers)

    def list_files(self) -> dict[str, FileInfo]:
        """Return every file below the folder; see Store."""
        from huggingface_hub import RepoFile

        found = {}
        try:
            with _hub_answers():
                items = self._api.list_repo_tree(path_in_repo=self._folder or None, **self._tree)
                for item in items:
                    if isinstance(item, RepoFile):
                        name = item.path.removeprefix(self._folder).lstrip("/")
                        tag = f"sha256:{item.lfs.sha256}" if item.lfs else f"blob:{item.blob_id}"
                        found[name] = FileInfo(nbytes=item.size, tag=tag)
        except OSError as error:
            raise RequestError(" ".join(str(error).split())[:160], again=True) from None
        return found


@contextlib.contextmanager
def _hub_answers() -> Iterator[None]:
    """Translate errors of the connection to the hub, whose classes its client takes from httpx."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        if isinstance(error, OSError):  # the hub has answered, with an error
            raise
        raise RequestError(f"the hub: {' '.join(str(error).split())[:160]}", again=True) from None
