"""URLs are sent as the data set spells them, and invalid ones are refused with a reason.

parse_url("http://example.com/a b?sig=%2B")     # http://example.com/a%20b?sig=%2B
"""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from encode.download.client import Fetched
from encode.download.urls import host_of, is_url, parse_url, redirect_url
from encode.errors import DownloadError
from tests.support.web_server import Handler, MakeFetcher, TroubleServer, outcome

SPELLINGS = {
    "/photo-0": "/photo-0",
    "/a%7Eb/%c3%a9": "/a%7Eb/%c3%a9",  # escapes are unchanged: the URL may be signed
    "/a?sig=%2B%2f+x==&&y": "/a?sig=%2B%2f+x==&&y",
    "/100%.jpg": "/100%.jpg",
    "/a//b/../c": "/a//b/../c",
    "/a b": "/a%20b",
    "/é?q=é x": "/%C3%A9?q=%C3%A9%20x",
    '/a"<>': "/a%22%3C%3E",
    "/a#part": "/a",
    "?x=1": "/?x=1",
    "": "/",
    "/a\nb\tc\r": "/abc",
    "/\udcff": "/%FF",
    "/x?a|b{c}": "/x?a|b{c}",
    "/[1](2)": "/[1](2)",
}


def test_is_url() -> None:
    assert is_url("http://a.b/c") and is_url("https://a.b") and is_url("HTTPS://A.B")
    assert not any(map(is_url, ("/http://a", "ftp://a", "https:/a", "", "a.jpg", "hf:x#1")))


def test_paths_and_queries_are_sent_as_spelt(
    monkeypatch: pytest.MonkeyPatch, fetcher: MakeFetcher
) -> None:
    seen: list[str] = []

    def note(h: Handler) -> None:
        seen.append(h.path)
        h.send(b"ok")

    monkeypatch.setattr(Handler, "do_GET", note)
    with TroubleServer(photos=1) as server:
        one = fetcher(per_host=1)
        for spelt, sent in SPELLINGS.items():
            got = outcome(one.submit(f" {server.base}{spelt} "))
            assert isinstance(got, Fetched), f"{spelt!r}: {got}"
            assert seen[-1] == sent


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ftp://a.b/c", "a URL with scheme ftp, not http or https"),
        ("file:///etc/passwd", "a URL with scheme file, not http or https"),
        ("javascript:alert(1)", "a URL with scheme javascript, not http or https"),
        ("/etc/passwd", "a URL with no scheme, not http or https"),
        ("http://", "a URL without a host"),
        ("http:///a.jpg", "a URL without a host"),
        ("http://u:p@a.b/", "a URL with a user name or password"),
        ("http://a.b\\@c.d/", "a URL with a user name or password"),
        ("http://a.b:99999/", "an invalid URL"),
        ("http://a.b:x/", "an invalid URL"),
        ("http://[::1/", "an invalid URL"),
        ("http://[zz]/", "an invalid URL"),
        ("http://a b/", "an invalid URL"),
        ("http://a\x00b/", "an invalid URL"),
    ],
)
def test_an_invalid_url_has_its_reason(text: str, reason: str) -> None:
    with pytest.raises(DownloadError) as caught:
        parse_url(text)
    assert caught.value.reason == reason
    assert not caught.value.retryable


@given(st.text())
@example("http://xn--/")
@example("http://a..b/")
@example("http://" + "x" * 300)
@example("http://a.b/\ud800")
@example("http://\ud800/")
def test_any_text_is_a_valid_url_or_an_error(text: str) -> None:
    for whole in (text, f"http://{text}", f"https://a.b/{text}", f"http://a.b?{text}"):
        try:
            url = parse_url(whole)
        except (DownloadError, UnicodeEncodeError) as error:
            assert isinstance(error, DownloadError), repr(whole)
            continue
        assert url.scheme in ("http", "https") and url.host and not url.user
        assert re.fullmatch(r"[!-~]+", url.raw_path_qs), repr(url.raw_path_qs)
        assert url.raw_path.startswith("/")


@given(st.text())
def test_any_location_is_a_valid_url_or_an_error(location: str) -> None:
    try:
        url = redirect_url(URL("http://a.b/c/d?e"), location)
    except DownloadError as error:
        assert "\n" not in error.reason and "redirect" in error.reason
        return
    assert url.scheme in ("http", "https") and url.host


def test_redirects_are_relative_to_their_url() -> None:
    base = URL("https://a.b/c/d?e=f")
    for location, target in {
        "x.jpg": "https://a.b/c/x.jpg",
        "/x.jpg?y": "https://a.b/x.jpg?y",
        "//h.i/x": "https://h.i/x",
        "?z": "https://a.b/c/d?z",
        "http://h.i": "http://h.i/",
        " /sp ace ": "https://a.b/sp%20ace",
    }.items():
        assert str(redirect_url(base, location)) == target


def test_hosts_have_a_normal_form() -> None:
    assert host_of(parse_url("http://EXAMPLE.com./a")) == "example.com"
    assert host_of(parse_url("http://bücher.de/")) == "xn--bcher-kva.de"


def test_malformed_urls_do_not_break_the_fetcher(
    server: TroubleServer, fetcher: MakeFetcher
) -> None:
    one = fetcher()
    wild = [
        "http://" + "x" * 300 + "/",
        "http://a..b/",
        "http://-/",
        "http://xn--/",
        "http://a\u202eb.invalid/",
        "http://\ud800/",
        f"{server.base}/\ud800",
        f"{server.base}/" + "y" * 100_000,
        "http://127.0.0.1:0/",
        "not a url",
        "",
    ]
    for url in wild:
        got = outcome(one.submit(url))
        assert not isinstance(got, Fetched), url
        assert got.stage == "fetch" and "download failed" not in got.reason, (url, got.reason)
    assert isinstance(outcome(one.submit(server.url("photo-0"))), Fetched)
