"""Turn the URLs of data sets into URLs that can be requested, as browsers do.

A URL is sent as the data set spells it, because a signed URL breaks when its escapes are spelt differently.
Only characters that a request must not contain (spaces, quotes, non-ASCII letters) are escaped.
"""

from __future__ import annotations

import re
from urllib.parse import quote, urljoin, urlsplit

from yarl import URL

from encode.errors import DownloadError

_DROPPED = {ord(mark): None for mark in "\t\r\n"}
_CONTROLS = "".join(map(chr, range(0x21)))
_SAFE_IN_PATH = "%/:;=@!$&'()*+,~|[]^"
_SAFE_IN_QUERY = _SAFE_IN_PATH + "?{}`\\"
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,11}):", re.IGNORECASE | re.ASCII)


def is_url(source: str) -> bool:
    """Return whether a source is a URL to download rather than a path."""
    return source[:8].lower().startswith(("http://", "https://"))


def host_of(url: URL) -> str:
    """Return the host of a URL in normal form."""
    return (url.raw_host or "").rstrip(".").lower()


def parse_url(text: str, prefix: str = "") -> URL:
    """Return the URL to request.

    Args:
        text: the URL as spelt in a data set or a redirect.
        prefix: beginning of the reason of an error, for example `redirect to `.

    Raises:
        DownloadError: the URL is invalid, or must not be requested.
    """
    text = text.translate(_DROPPED).strip(_CONTROLS)
    try:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https"):
            scheme = _SCHEME.match(text)
            named = f"scheme {scheme[1].lower()}" if scheme else "no scheme"
            raise DownloadError(f"{prefix}a URL with {named}, not http or https")
        if "@" in parts.netloc:
            raise DownloadError(f"{prefix}a URL with a user name or password")
        if not parts.hostname:
            raise DownloadError(f"{prefix}a URL without a host")
        origin = URL.build(scheme=parts.scheme, host=parts.hostname, port=parts.port)
        path = quote(parts.path or "/", safe=_SAFE_IN_PATH, errors="surrogateescape")
        query = quote(parts.query, safe=_SAFE_IN_QUERY, errors="surrogateescape")
        whole = f"{str(origin).rstrip('/')}{path}"
        url = URL(f"{whole}?{query}" if query else whole, encoded=True)
        if not url.host:  # read here because an impossible host name raises only now
            raise DownloadError(f"{prefix}a URL without a host")
    except (ValueError, UnicodeError):
        raise DownloadError(f"{prefix}an invalid URL") from None
    return url


def redirect_url(base: URL, location: str) -> URL:
    """Return the target of a redirect.

    Args:
        base: the URL that answered with the redirect.
        location: its Location header.

    Raises:
        DownloadError: the target is invalid, or must not be requested.
    """
    try:
        joined = urljoin(str(base), location.translate(_DROPPED).strip(_CONTROLS))
    except ValueError:
        raise DownloadError("redirect to an invalid URL") from None
    return parse_url(joined, "redirect to ")
