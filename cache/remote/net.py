"""Decide which IP addresses may be connected to, and which TLS certificates are trusted.

A URL in a data set, or a redirect from a harmless one, must not make this machine connect to its own
services, to its local network, or to the metadata service of its cloud. The caller checks the very address
it connects to, so a host name that changes its address between check and use (DNS rebinding) is no way
round: `encode.download.session` does this for downloads, `cache.remote.http` for remote caches.
"""

from __future__ import annotations

import ipaddress
import ssl

# IANA's special-purpose address registries, read 2026-11. The first match decides. An IPv4 address that
# matches nothing is global. The tables are written out because Python's `is_global` changed its answers
# between patch releases.
_NETWORKS = tuple(
    (ipaddress.ip_network(network), kind)
    for network, kind in (
        ("127.0.0.0/8", "loopback"),
        ("100.100.100.200/32", "cloud metadata"),  # Alibaba Cloud, inside the shared 100.64.0.0/10
        ("168.63.129.16/32", "cloud metadata"),  # Azure, inside a public network
        ("10.0.0.0/8", "private"),
        ("172.16.0.0/12", "private"),
        ("192.168.0.0/16", "private"),
        ("100.64.0.0/10", "private"),  # carrier-grade NAT, and Tailscale
        ("0.0.0.0/32", "unspecified"),
        ("0.0.0.0/8", "reserved"),
        ("169.254.0.0/16", "link-local"),  # most clouds serve credentials at 169.254.169.254
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "reserved"),
        ("192.88.99.0/24", "reserved"),
        ("198.18.0.0/15", "reserved"),
        ("198.51.100.0/24", "reserved"),
        ("203.0.113.0/24", "reserved"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("::1/128", "loopback"),
        ("::/128", "unspecified"),
        ("fd00:ec2::254/128", "cloud metadata"),  # Amazon
        ("fd20:ce::254/128", "cloud metadata"),  # Google
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),  # site-local, deprecated
        ("ff00::/8", "multicast"),
        ("2001::/23", "reserved"),  # Teredo, ORCHID, benchmarking
        ("2001:db8::/32", "reserved"),
        ("3fff::/20", "reserved"),
        ("2000::/3", "global"),
        ("::/0", "reserved"),  # IANA has allocated nothing else
    )
)
_GLOBAL = "global"
_ON_REQUEST = ("loopback", "private")
"""Kinds that `allow_private` permits. All other kinds except global are always refused."""

# IPv6 networks whose addresses contain an IPv4 address, which is the machine that is reached; and the
# position of the IPv4 address, in bits from the right.
_EMBEDDINGS = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)


def refusal_reason(address: str, allow_private: bool) -> str | None:
    """Return why an address must not be connected to, or None when it may be.

    Args:
        address: an IPv4 or IPv6 address in the notation of `getaddrinfo` (`fe80::1%eth0` included).
        allow_private: permit private and loopback addresses.

    Returns:
        the kind and the address, as `a private address 10.0.0.1`; None when the address is allowed.

    Raises:
        ValueError: `address` is not an IP address.
    """
    kind = _kind(address)
    if kind == _GLOBAL or (allow_private and kind in _ON_REQUEST):
        return None
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} address {address}"


def literal_address(host: str) -> str | None:
    """Return the host of a URL in normal form when it is an IP address, or None when it is a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether the host of a URL is `localhost` or a loopback address. No name is looked up."""
    address = literal_address(host)
    return host.lower() == "localhost" if address is None else _kind(address) == "loopback"


def tls_context() -> ssl.SSLContext:
    """Return a TLS client context that verifies certificates and host names, for HTTP/1.1."""
    context = ssl.create_default_context()
    # Some builds of Python, such as those for macOS, do not find the certificates of the system.
    if not context.get_ca_certs():
        import certifi  # reading a local cache needs no certificates

        context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(("http/1.1",))  # neither client speaks HTTP/2
    return context


def _kind(text: str) -> str:
    """Return the kind of an address, which for an embedded IPv4 address is the kind of that address."""
    address = ipaddress.ip_address(text)
    if address.version == 6:
        address = ipaddress.IPv6Address(int(address))  # drops the scope of fe80::1%eth0
        for network, shift in _EMBEDDINGS:
            if address in network:
                return _kind(str(ipaddress.IPv4Address((int(address) >> shift) & 0xFFFFFFFF)))
    return next((kind for network, kind in _NETWORKS if address in network), _GLOBAL)
