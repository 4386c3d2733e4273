"""Which addresses may be connected to.

    refusal_reason("10.0.0.1", allow_private=False)     # "a private address 10.0.0.1"
    refusal_reason("1.1.1.1", allow_private=False)      # None: it may

The same rules on the wire (names, redirects, sockets) are in tests/encode/download/test_session.py.
"""

from __future__ import annotations

import ipaddress
import ssl
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.remote.net import is_loopback, literal_address, refusal_reason, tls_context

NEVER = {
    "169.254.169.254": "a link-local",
    "169.254.0.1": "a link-local",
    "0.0.0.0": "an unspecified",
    "0.1.2.3": "a reserved",
    "224.0.0.1": "a multicast",
    "239.255.255.255": "a multicast",
    "240.0.0.1": "a reserved",
    "255.255.255.255": "a reserved",
    "192.0.2.7": "a reserved",
    "192.0.0.192": "a reserved",
    "198.18.0.1": "a reserved",
    "100.100.100.200": "a cloud metadata",
    "168.63.129.16": "a cloud metadata",
    "::": "an unspecified",
    "fe80::1": "a link-local",
    "fe80::1%lo": "a link-local",
    "ff02::1": "a multicast",
    "fd00:ec2::254": "a cloud metadata",
    "::ffff:169.254.169.254": "a link-local",
    "::ffff:0.0.0.0": "an unspecified",
    "64:ff9b::169.254.169.254": "a link-local",
    "64:ff9b:1::a00:1": "a reserved",
    "2002:a9fe:a9fe::1": "a link-local",
    "::169.254.169.254": "a reserved",
    "2001::1": "a reserved",
    "2001:db8::1": "a reserved",
    "4000::1": "a reserved",
}
ON_REQUEST = {
    "127.0.0.1": "a loopback",
    "127.255.255.254": "a loopback",
    "10.0.0.1": "a private",
    "172.16.0.1": "a private",
    "172.31.255.255": "a private",
    "192.168.1.1": "a private",
    "100.64.0.1": "a private",
    "::1": "a loopback",
    "fc00::1": "a private",
    "fdff::1": "a private",
    "fec0::1": "a private",
    "::ffff:127.0.0.1": "a loopback",
    "::ffff:10.0.0.1": "a private",
    "64:ff9b::10.0.0.1": "a private",
    "2002:7f00:1::": "a loopback",
    "2002:c0a8:101::1": "a private",
}
PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "172.15.255.255",
    "172.32.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "192.0.1.1",
    "223.255.255.255",
    "2606:4700::1111",
    "2a00:1450::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
)


def test_each_address_has_its_kind() -> None:
    for address, kind in NEVER.items():
        assert refusal_reason(address, False) == f"{kind} address {address}"
        assert refusal_reason(address, True) == f"{kind} address {address}"
    for address, kind in ON_REQUEST.items():
        assert refusal_reason(address, False) == f"{kind} address {address}"
        assert refusal_reason(address, True) is None
    for address in PUBLIC:
        assert refusal_reason(address, False) is None


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


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_hosts(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example", "10.0.0.1", "1.1.1.1", "127.0.0.1.example"])
def test_other_hosts_are_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_name_is_no_literal_address() -> None:
    assert literal_address("::0001") == "::1"
    assert literal_address("one.example") is None


def test_certificates_and_host_names_are_verified() -> None:
    context = tls_context()
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert context.get_ca_certs()
