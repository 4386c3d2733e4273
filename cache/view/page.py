"""The page of `cache.view`: what was gathered about a space, as one HTML text that needs nothing else.

Captions, paths, URLs and reasons come from strangers: every text is escaped, no source becomes a link, and
the page's own policy (CSP) lets it load nothing and run nothing but the one script below.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

import numpy as np

from cache.view import thumbnails as images
from cache.view.cards import gallery, key_code, neighbours, touch_data
from cache.view.collect import Findings
from cache.view.sections import KIND_NAMES, coverage, distributions, failures, percent
from cache.view.statistics import OUTLIER
from cache.view.style import SCRIPT, STYLE
from configs.console import bytes_text

BANNER = 12
"""Feature maps across the top."""


def render(found: Findings) -> str:
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    sections = (
        gallery("image", found),
        gallery("frame", found),
        neighbours(found),
        distributions(found),
        coverage(found),
        failures(found),
        recipe(found),
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.reader.paths.name)}</title><style>{STYLE}</style></head><body>"
        f"{head(found)}<main>{boxes(found)}{facts(found)}{''.join(sections)}</main>"
        f"{foot(found)}{touch_data(found)}<script>{SCRIPT}</script></body></html>\n"
    )


def head(found: Findings) -> str:
    """Its name, some of its maps, and what all this is, for who has never seen one."""
    spec, kind = found.reader.spec, found.channels_kind
    side, pool = spec.grid // spec.pool(kind), spec.pool(kind)
    pooled = f", each the mean of {pool} × {pool} patches" if pool > 1 else ""
    lead = (
        f"A frozen vision encoder looked at every {kind} once and wrote down what it saw: "
        f"{side} × {side} tokens{pooled}, each of them {spec.width:,} numbers. Training reads these "
        "numbers instead of pixels. This page turns them back into something to look at."
    )
    maps = [one.tiles[0].colours for one in found.shown[:BANNER]]
    banner = "".join(f'<img alt="" src="{images.png(pixels)}">' for pixels in maps)
    return (
        f'<header><div class="banner" aria-hidden="true">{banner}</div><div class="inner">'
        f'<p class="eyebrow">Feature space</p><h1>{escape(found.reader.paths.name)}</h1>'
        f'<p class="lead">{escape(lead)}</p></div></header>'
    )


def boxes(found: Findings) -> str:
    """The figures that matter, large."""
    reader = found.reader
    nbytes = sum(sum(index.nbytes.values()) for index in reader.index.values())
    shown = [(f"{reader.rows(kind):,}", KIND_NAMES[kind], "rows") for kind in found.norms]
    shown.append((bytes_text(nbytes), "on disk", f"as {reader.spec.codec}, checksums included"))
    errors = [one.values for one in found.errors.values() if len(one.values)]
    if errors:
        every = np.concatenate(errors)
        shown.append((f"{every.mean():.2%}", "codec error", f"mean; {every.max():.2%} at most"))
    long = np.concatenate([one.values > one.limit for one in found.norms.values()])
    share = f"{long.mean():.2%}" if long.any() else "none"
    shown.append((share, "outlier tokens", f"longer than {OUTLIER:g} × the median"))
    if found.datasets:
        total = sum(one.samples for one in found.datasets)
        covered = sum(one.coverage[reader.paths.name] * one.samples for one in found.datasets)
        share = percent(covered / total if total else 1.0)
        shown.append((share, "covered", f"of {total:,} samples"))
    cells = "".join(
        f"<div><strong>{escape(value)}</strong><b>{escape(label)}</b><small>{escape(note)}</small></div>"
        for value, label, note in shown
    )
    return f'<div class="boxes">{cells}</div>'


def facts(found: Findings) -> str:
    """What decides a row, in short."""
    spec = found.reader.spec
    sizes = dict.fromkeys(bytes_text(spec.row_bytes(kind)) for kind in found.norms)
    listed = [
        ("encoder", f"{spec.encoder} ({spec.architecture})"),
        ("blocks, from 0", ", ".join(map(str, spec.blocks))),
        ("input", f"{spec.image_size} × {spec.image_size} px, {spec.fit}"),
        *((f"one {kind} is", _tokens(found, kind)) for kind in found.norms),
        ("computed in", f"{spec.compute_dtype}, batches of {spec.batch_size}"),
        ("stored as", f"{spec.codec} in {spec.container}, {' or '.join(sizes)} a row"),
        ("newest shard", f"{found.newest:%Y-%m-%d %H:%M} UTC" if found.newest else "unknown"),
    ]
    if found.writer:
        listed.append(("being written by", found.writer))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in listed
    )
    fingerprint = f"<div><dt>fingerprint</dt><dd>{key_code(spec.fingerprint)}</dd></div>"
    return f'<dl class="facts">{cells}{fingerprint}</dl>'


def _tokens(found: Findings, kind: str) -> str:
    spec = found.reader.spec
    side, pool = spec.grid // spec.pool(kind), spec.pool(kind)
    cls = " and a CLS token" if spec.keep_cls else ""
    pooled = f", pooled {pool} × {pool}" if pool > 1 else ""
    return f"{side} × {side} tokens of {spec.width:,}{cls}; patches of {spec.patch_size} px{pooled}"


def recipe(found: Findings) -> str:
    """Every field of the spec."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape(str(value))}</td></tr>'
        for name, value in found.reader.spec.to_json().items()
    )
    return (
        "<section><details><summary>The whole recipe: what the fingerprint covers</summary>"
        f'<div class="scroll"><table class="recipe"><tbody>{rows}</tbody></table></div></details></section>'
    )


def foot(found: Findings) -> str:
    """How to have this page again."""
    command = (
        f"python -m cache.view --space {found.reader.paths.name} "
        f"--images {found.images} --seed {found.seed}"
    )
    return (
        f"<footer><code>{escape(command)}</code><br>"
        "Every row on this page was read under its checksum.</footer>"
    )
