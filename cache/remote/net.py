"""Which addresses may be connected to: a table, and one question asked of it.

A URL from elsewhere, or a redirect of one that looked harmless, must not make this machine talk to its own
services, its neighbours, or the metadata service of its cloud. Whoever connects asks about the very address
it connects to: see `encode.download.session` for downloads, `cache.remote.http` for features from
elsewhere. The networks are spelt out because Python's own `is_global` changed between patch releases.
"""

from __future__ import annotations

import ipaddress

__all__ = ["RefusedAddressError", "is_loopback", "literal", "refusal"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# IANA's special-purpose registries, read 2026-11. First match wins; what matches nothing is global.
_KINDS_4 = (
    ("127.0.0.0/8", "loopback"),
    ("100.100.100.200/32", "cloud metadata"),  # Alibaba's, inside the shared 100.64.0.0/10
    ("168.63.129.16/32", "cloud metadata"),  # Azure's, inside a public network
    ("10.0.0.0/8", "private"),
    ("172.16.0.0/12", "private"),
    ("192.168.0.0/16", "private"),
    ("100.64.0.0/10", "private"),  # behind carriers' NAT, and Tailscale's
    ("0.0.0.0/32", "unspecified"),
    ("0.0.0.0/8", "reserved"),
    ("169.254.0.0/16", "link-local"),  # where most clouds serve credentials
    ("192.0.0.0/24", "reserved"),
    ("192.0.2.0/24", "reserved"),
    ("192.88.99.0/24", "reserved"),
    ("198.18.0.0/15", "reserved"),
    ("198.51.100.0/24", "reserved"),
    ("203.0.113.0/24", "reserved"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
)
_KINDS_6 = (
    ("::1/128", "loopback"),
    ("::/128", "unspecified"),
    ("fd00:ec2::254/128", "cloud metadata"),  # Amazon's
    ("fd20:ce::254/128", "cloud metadata"),  # Google's
    ("fc00::/7", "private"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "private"),  # site-local, deprecated
    ("ff00::/8", "multicast"),
    ("2001::/23", "reserved"),  # Teredo, ORCHID, benchmarking
    ("2001:db8::/32", "reserved"),
    ("3fff::/20", "reserved"),
    ("2000::/3", "global"),
    ("::/0", "reserved"),  # nothing else is handed out
)
_GLOBAL = "global"
_ON_REQUEST = ("loopback", "private")
"""Reached when the rules allow private addresses; the other kinds never are."""

# Where an IPv6 network carries an IPv4 address, the IPv4 address is what one talks to: shift in bits.
_EMBEDDINGS = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)
_NETWORKS_4 = tuple((ipaddress.IPv4Network(network), kind) for network, kind in _KINDS_4)
_NETWORKS_6 = tuple((ipaddress.IPv6Network(network), kind) for network, kind in _KINDS_6)


class RefusedAddressError(OSError):
    """An address the rules keep us from; an OSError because aiohttp passes those through."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        """Kind and address: `a private address 10.0.0.1`."""


def refusal(address: str, allow_private: bool) -> str | None:
    """Why `address` is not connected to, as `a private address 10.0.0.1`; None when it may be.

    Args:
        address: an IPv4 or IPv6 address, in the notation of `getaddrinfo`.
        allow_private: private and loopback addresses will do.
    """
    kind = _kind(ipaddress.ip_address(address))
    if kind == _GLOBAL or (allow_private and kind in _ON_REQUEST):
        return None
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} address {address}"


def literal(host: str) -> str | None:
    """`host` as an address, when it is one and no name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _kind(address: Address) -> str:
    if isinstance(address, ipaddress.IPv6Address):
        address = ipaddress.IPv6Address(int(address))  # without the scope of fe80::1%eth0
        for network, shift in _EMBEDDINGS:
            if address in network:
                return _kind(ipaddress.IPv4Address((int(address) >> shift) & 0xFFFFFFFF))
        return next(kind for network, kind in _NETWORKS_6 if address in network)
    return next((kind for network, kind in _NETWORKS_4 if address in network), _GLOBAL)


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine by its very name, without asking a name server."""
    address = literal(host)
    return host.lower() == "localhost" or bool(
        address and _kind(ipaddress.ip_address(address)) == "loopback"
    )
