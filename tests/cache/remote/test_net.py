"""Which addresses may be connected to.

    refusal_reason("10.0.0.1", allow_private=False)     # "a private address 10.0.0.1"
    refusal_reason("1.1.1.1", allow_private=False)      # None: it may

The same rules on the wire (names, redirects, sockets) are in tests/encode/download/test_session.py.
"""

from __future__ import annotations

import ipaddress
import ssl
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cache.remote.net import is_loopback, literal_address, refusal_reason, tls_context

# kind of address -> examples
NEVER = {
    "a link-local": "169.254.169.254 169.254.0.1 fe80::1 fe80::1%lo ::ffff:169.254.169.254 "
    "64:ff9b::169.254.169.254 2002:a9fe:a9fe::1",
    "an unspecified": "0.0.0.0 :: ::ffff:0.0.0.0",
    "a reserved": "0.1.2.3 240.0.0.1 255.255.255.255 192.0.2.7 192.0.0.192 198.18.0.1 64:ff9b:1::a00:1 "
    "::169.254.169.254 2001::1 2001:db8::1 4000::1",
    "a multicast": "224.0.0.1 239.255.255.255 ff02::1",
    "a cloud metadata": "100.100.100.200 168.63.129.16 fd00:ec2::254",
}
ON_REQUEST = {
    "a loopback": "127.0.0.1 127.255.255.254 ::1 ::ffff:127.0.0.1 2002:7f00:1::",
    "a private": "10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 fc00::1 fdff::1 fec0::1 "
    "::ffff:10.0.0.1 64:ff9b::10.0.0.1 2002:c0a8:101::1",
}
PUBLIC = (
    "1.1.1.1 8.8.8.8 172.15.255.255 172.32.0.0 100.63.255.255 100.128.0.0 192.0.1.1 "
    "223.255.255.255 2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"
)


def test_each_address_has_its_kind() -> None:
    for kinds, permitted in ((NEVER, False), (ON_REQUEST, True)):
        for kind, addresses in kinds.items():
            for address in addresses.split():
                reason = f"{kind} address {address}"
                assert refusal_reason(address, False) == reason
                assert refusal_reason(address, True) == (None if permitted else reason)
    assert [a for a in PUBLIC.split() if refusal_reason(a, False)] == []


@given(st.ip_addresses(), st.booleans())
def test_what_python_calls_special_is_never_global(address: Any, allow_private: bool) -> None:
    """Python's lists are an independent reading of the registries."""
    reason = refusal_reason(str(address), allow_private)
    if address.is_multicast or address.is_link_local or address.is_unspecified:
        assert reason is not None
    if not allow_private and not address.is_global:
        assert reason is not None


@given(st.ip_addresses(v=4), st.booleans())
def test_an_embedded_address_is_judged_as_itself(
    address: ipaddress.IPv4Address, allow_private: bool
) -> None:
    number = int(address)
    plain = refusal_reason(str(address), allow_private)
    for network in ("::ffff:0:0", "64:ff9b::"):
        wrapped = ipaddress.IPv6Address(int(ipaddress.IPv6Address(network)) | number)
        assert (refusal_reason(str(wrapped), allow_private) is None) == (plain is None)
    six_to_four = ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1)
    assert (refusal_reason(str(six_to_four), allow_private) is None) == (plain is None)


def test_loopback_hosts_are_known_without_a_look_up() -> None:
    assert all(map(is_loopback, ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1"]))
    others = ["localhost.example", "10.0.0.1", "1.1.1.1", "127.0.0.1.example"]
    assert not any(map(is_loopback, others))


def test_a_name_is_no_literal_address() -> None:
    assert literal_address("::0001") == "::1"
    assert literal_address("one.example") is None


def test_certificates_and_host_names_are_verified() -> None:
    context = tls_context()
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert context.get_ca_certs()
