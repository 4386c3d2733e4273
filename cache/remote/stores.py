"""Where a cache can lie: https://, s3://, hf://, and what each of them is read through."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from cache.errors import CacheError, NotFoundError, RequestError
from cache.remote.http import HttpStore
from cache.remote.net import is_loopback
from cache.remote.retry import Entry, RetryPolicy, Store

if TYPE_CHECKING:
    import obstore.store

ARRAYS = ("https://", "s3://", "hf://")


def open_store(url: str, rules: RetryPolicy) -> Store:
    """The store a URL names. The hub is asked which commit a branch stands at; nobody else is asked anything.

    Raises:
        CacheError: no such kind of place, a library that is missing, a repository that is not there.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return HttpStore(url, rules)
    if scheme == "s3":
        return ObjectStore(url, rules)
    if scheme == "hf":
        return hub_store(url, rules)
    raise CacheError(f"{url}: features are read from {', '.join(ARRAYS)} or a folder")


# ---- s3


class ObjectStore:
    """A bucket, or what stands below a prefix of it, through obstore (the Rust library object_store)."""

    needs_listing = False

    def __init__(self, url: str, rules: RetryPolicy) -> None:
        """Connect to nothing yet. Credentials, region and endpoint are those of the AWS tools.

        Raises:
            CacheError: obstore is not installed, or the URL names no bucket.
        """
        try:
            import obstore
        except ImportError:
            raise CacheError(f"{url}: needs obstore: pip install 'nanomolmo2[s3]'") from None
        parts = urlsplit(url)
        if not parts.netloc:
            raise CacheError(f"{url}: no bucket; write s3://bucket/prefix")
        self.place = url.rstrip("/")
        self._obstore = obstore
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        plain = urlsplit(endpoint)
        if plain.scheme == "http" and not (
            rules.allow_private or is_loopback(plain.hostname or "")
        ):
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
                "allow_http": plain.scheme == "http",
                "connect_timeout": datetime.timedelta(seconds=rules.connect_s),
                "read_timeout": datetime.timedelta(seconds=rules.read_s),
                "timeout": datetime.timedelta(seconds=rules.request_s),
            },
            # One try: pauses, patience and what to say of them are the same for every store.
            retry_config={"max_retries": 0},
        )

    def names(self) -> dict[str, Entry]:
        """See Store."""
        found = {}
        try:
            for page in self._obstore.list(self._store, chunk_size=1000):
                for meta in page:
                    tag = f"{meta['e_tag'] or ''} {meta['last_modified']}"
                    found[meta["path"]] = Entry(nbytes=meta["size"], tag=tag)
        except (FileNotFoundError, self._obstore.exceptions.BaseError) as error:
            raise self._trouble(error) from None
        return found

    def read(self, name: str, offset: int, target: memoryview, size: int | None) -> None:
        """See Store."""
        wanted = (offset, offset + len(target))
        try:
            result = self._obstore.get(self._store, name, options={"range": wanted})
            if size is not None and result.meta["size"] != size:
                what = f"{result.meta['size']:,} bytes, not the {size:,} of its commit"
                raise RequestError(what, again=False)
            if result.range != wanted:
                raise RequestError(f"bytes {result.range} instead of {wanted}", again=True)
            with memoryview(result.bytes()) as data:
                target[:] = data
        except (FileNotFoundError, self._obstore.exceptions.BaseError) as error:
            raise self._trouble(error) from None

    def whole(self, name: str, most: int) -> bytes:
        """See Store."""
        try:
            result = self._obstore.get(self._store, name)
            if result.meta["size"] > most:
                raise RequestError(f"{name} has more than {most:,} bytes", again=False)
            return bytes(result.bytes())
        except (FileNotFoundError, self._obstore.exceptions.BaseError) as error:
            raise self._trouble(error) from None

    def _trouble(self, error: Exception) -> RequestError:
        """obstore tells errors apart by type; its text goes over many lines."""
        errors = self._obstore.exceptions
        if isinstance(error, FileNotFoundError | errors.NotFoundError):
            return RequestError("no such object", again=False, missing=True)
        if isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError):
            what = "not allowed with the credentials that were found (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...)"
            return RequestError(what, again=False)
        return RequestError(
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", again=True
        )


def _credentials() -> tuple[dict[str, Any], Any]:
    """obstore's configuration, and who gives it credentials: all that boto3 finds (environment, profiles,
    SSO, roles); without boto3 what obstore finds in the environment; without any, requests are unsigned.
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
    """A repository of the Hugging Face hub at one commit: listed by its API, read as any web server."""

    needs_listing = False

    def __init__(
        self, base: str, rules: RetryPolicy, place: str, headers: Mapping[str, str], tree: Any
    ) -> None:
        """`tree` gives (name, bytes, tag) of every file below `base`."""
        super().__init__(base, rules, place=place, headers=headers)
        self._tree = tree

    def names(self) -> dict[str, Entry]:
        """See Store."""
        return {name: Entry(nbytes=nbytes, tag=tag) for name, nbytes, tag in self._tree()}


def hub_store(url: str, rules: RetryPolicy) -> HubStore:
    """The store of hf://datasets/ORG/NAME[@REVISION][/FOLDER] (or hf://ORG/NAME, a model repository).

    The hub's library says where things are and which token is ours (HF_TOKEN, `hf auth login`, HF_ENDPOINT);
    our own client reads them, so that a range is one request, and limits are those of every other server.

    Raises:
        CacheError: the repository, or the revision, is not there for us; or the hub does not answer.
    """
    from huggingface_hub import HfApi, HfFileSystem, RepoFile, constants
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    api = HfApi()
    try:
        at = HfFileSystem().resolve_path(url)
        if not isinstance(at, HfFileSystemResolvedRepositoryPath):
            raise CacheError(f"{url}: a bucket; write hf://datasets/ORG/NAME")
        info = api.repo_info(at.repo_id, repo_type=at.repo_type, revision=at.revision)
    except (
        OSError,
        ValueError,
        NotImplementedError,
    ) as error:  # all of the hub's errors are OSErrors
        why = " ".join(str(error).split())[:200]
        raise NotFoundError(
            f"{url}: the hub has no such repository for you, or does not answer ({why}); a private one "
            "needs HF_TOKEN or `hf auth login`"
        ) from None
    commit, folder = str(info.sha), at.path_in_repo.strip("/")
    prefix = constants.REPO_TYPES_URL_PREFIXES.get(at.repo_type, "")
    base = f"{api.endpoint}/{prefix}{at.repo_id}/resolve/{commit}/{quote(folder)}"

    def tree() -> list[tuple[str, int, str]]:
        kind: dict[str, Any] = {"repo_type": at.repo_type, "revision": commit, "recursive": True}
        found = []
        try:
            for item in api.list_repo_tree(at.repo_id, folder or None, **kind):
                if isinstance(item, RepoFile):
                    name = item.path.removeprefix(folder).lstrip("/")
                    tag = f"sha256:{item.lfs.sha256}" if item.lfs else f"blob:{item.blob_id}"
                    found.append((name, item.size, tag))
        except OSError as error:
            raise RequestError(" ".join(str(error).split())[:160], again=True) from None
        return found

    headers = {k: v for k, v in build_hf_headers().items() if k.lower() == "authorization"}
    return HubStore(base, rules, url.rstrip("/"), headers, tree)
