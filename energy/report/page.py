"""The page around the charts: one file with its style, no script, nothing fetched; light, dark and paper."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDE_PX, PHONE_PX = 860.0, 330.0

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--card:#f5f7f9;--line:#d8dee4;
--train:#0072b2;--compress:#d98200;--other:#b0578f;--radio:#00805f;--hatch:#fff;--accent:#0072b2;--shade:#0072b214;--window:#cfe3f1}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b1;--paper:#0f1419;--card:#1a2027;--line:#323b45;
--train:#56b4e9;--compress:#e69f00;--other:#d993bd;--radio:#2dc7a0;--hatch:#0f1419;--accent:#56b4e9;--shade:#56b4e91c;--window:#234257}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--paper:#fff;--card:#f5f7f9;--line:#ccc;
--train:#0072b2;--compress:#d98200;--other:#b0578f;--radio:#00805f;--hatch:#fff;--accent:#0072b2;--shade:#0072b214;--window:#cfe3f1}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
figure,.tile,tr{break-inside:avoid}h2{break-after:avoid}.scroll{overflow:visible!important}
table{font-size:8.5pt!important}td,th{padding:.2em .5em!important}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2rem) 3rem;max-width:58rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem}.soft{color:var(--soft)}ul{padding-left:1.2rem;margin:.4rem 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:.6rem;margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.55rem .75rem}
.tile b{display:block;font-size:1.2rem;line-height:1.35;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.875rem;line-height:1.3;display:block}
.say{border-left:4px solid var(--compress);background:var(--card);padding:.5rem .8rem;margin:.8rem 0}
figure{margin:.6rem 0 1rem}figcaption{color:var(--soft);font-size:.9rem;max-width:46rem}
svg{display:block;max-width:100%;height:auto}.narrow{display:none}.narrow svg{width:100%;max-width:30rem}
@media screen and (max-width:760px){.wide{display:none}.narrow{display:block}}
svg text{font-size:12.5px;fill:var(--ink);font-family:inherit}svg .tick{fill:var(--soft)}svg .title{fill:var(--soft)}
svg .value{font-variant-numeric:tabular-nums}svg .inwindow{font-size:12px}
.axis{stroke:var(--soft)}.grid{stroke:var(--line)}.interval{stroke:var(--ink);stroke-width:1.5}
.equal{stroke:var(--soft);stroke-dasharray:5 4;fill:none}
.idle{stroke:var(--compress);stroke-dasharray:6 4;stroke-width:1.5}
.curve{fill:none;stroke:var(--accent);stroke-width:1.8;stroke-linejoin:round}
.range{fill:var(--accent);opacity:.25;stroke:none}.shade{fill:var(--shade)}.window{fill:var(--window)}
.dot{fill:var(--accent);fill-opacity:.75}.anchor{fill:var(--paper);stroke:var(--accent);stroke-width:2}
.outside{fill:var(--compress)}
.train{fill:var(--train)}.compress{fill:var(--compress)}.other{fill:var(--other)}.radio{fill:var(--radio)}
.train-modelled{fill:url(#hatch-train)}.compress-modelled{fill:url(#hatch-compress)}.other-modelled{fill:url(#hatch-other)}
.radio-modelled{fill:url(#hatch-radio)}.hatch{stroke:var(--hatch);stroke-width:2.6}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.4rem 0;padding:0;list-style:none;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.4rem}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;min-width:100%}
th,td{padding:.35rem .7rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
th,td{overflow-wrap:normal}td:not(.number){min-width:5rem;max-width:24rem}
td.long{min-width:11rem!important}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper);padding-left:0}
@media screen and (max-width:760px){td.long{min-width:14rem!important}.cards thead{display:none}
.cards,.cards tbody,.cards tr{display:block}.cards tr{border:1px solid var(--line);border-radius:.5rem;
padding:.3rem .7rem;margin:.5rem 0}
.cards td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.15rem 0;
min-width:0!important;max-width:none!important;white-space:normal;text-align:right;position:static!important}
.cards td::before{content:attr(data-label);color:var(--soft);text-align:left;flex:none}
.cards td:first-child{font-weight:600}}
.number{text-align:right;font-variant-numeric:tabular-nums}
footer{margin-top:2.5rem;padding-top:.6rem;border-top:1px solid var(--line);color:var(--soft);font-size:.875rem}
"""


class Tile(NamedTuple):
    """A figure and what it is."""

    figure: str
    words: str


def page(title: str, lead: str, body: Sequence[str], foot: str) -> str:
    """The whole document; ``title``, ``lead`` and ``foot`` are plain text, ``body`` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n{_patterns()}\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p>\n'
        + "\n".join(part for part in body if part)
        + f"\n<footer>{escape(foot)}</footer>\n</body></html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and HTML below it."""
    return f"<h2>{escape(heading)}</h2>\n" + "\n".join(part for part in parts if part)


def text(words: str, css: str = "") -> str:
    """A paragraph of plain text."""
    marked = f' class="{css}"' if css else ""
    return f"<p{marked}>{escape(words)}</p>"


def tiles(entries: Sequence[Tile]) -> str:
    """Figures side by side."""
    inner = "".join(
        f'<div class="tile"><b>{escape(tile.figure)}</b><span>{escape(tile.words)}</span></div>' for tile in entries
    )
    return f'<div class="tiles">{inner}</div>'


def items(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def figure(draw: Callable[[float], str], caption: str, *, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A chart in two widths, of which the page shows the one that fits; ``legend`` are classes and words."""
    marks = "".join(
        f'<li><svg width="22" height="14" aria-hidden="true"><rect width="22" height="14" class="{css}"></rect></svg>'
        f"{escape(words)}</li>"
        for css, words in legend
    )
    key = f'<ul class="legend">{marks}</ul>' if marks else ""
    return (
        f'<figure>{key}<div class="wide">{draw(WIDE_PX)}</div><div class="narrow">{draw(PHONE_PX)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _patterns() -> str:
    """Hatchings of what is modelled; not hidden, since browsers draw nothing of a hidden pattern."""
    made = "".join(
        f'<pattern id="hatch-{name}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" class="{name}"></rect>'
        '<line x1="1.5" y1="0" x2="1.5" y2="6" class="hatch"/></pattern>'
        for name in ("train", "compress", "other", "radio")
    )
    return f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{made}</defs></svg>'
