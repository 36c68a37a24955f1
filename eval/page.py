"""The pieces of a self-contained HTML page: style, table, picture, text."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from errors import UserError

Picture = Path | tuple[str, Image.Image]


def page(title: str, introduction: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page: heading, introduction (see `to_html`), then (heading, HTML) sections."""
    body = "\n".join(
        f"<section><h2>{escape(name)}</h2>\n{html}</section>" for name, html in sections if html
    )
    return PAGE.format(
        title=escape(title), style=STYLE, introduction=to_html(introduction), body=body
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{grid}</div>'


def figure(picture: Picture) -> str:
    """A picture inside the page, as base64 PNG, with its caption."""
    image: Image.Image
    if isinstance(picture, Path):
        if not picture.is_file():
            raise UserError(f"{picture} is missing; name a PNG file")
        caption, image = picture.stem, Image.open(picture)
    else:
        caption, image = picture
    return f"<figure>{inline(image, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def panels(caption: str, pictures: Sequence[tuple[str, Image.Image]]) -> str:
    """Pictures that belong together, each under its own title, with one caption."""
    cells = "".join(
        f"<div><small>{escape(title)}</small>{inline(image, title)}</div>"
        for title, image in pictures
    )
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="panels">{cells}</div></figure>'


def inline(image: Image.Image, text: str) -> str:
    """An <img> that brings its PNG along."""
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return (
        f'<img src="{source}" alt="{escape(text)}" width="{image.width}" height="{image.height}">'
    )


def legend(colors: Mapping[str, str]) -> str:
    """Names with their colours, which are anything that CSS takes."""
    keys = (
        f'<span class="key"><i style="background:{c}"></i>{escape(name)}</span>'
        for name, c in colors.items()
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def to_html(text: str) -> str:
    """The few marks an introduction needs; everything else is escaped."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        block = block.strip()
        if block.startswith("<"):
            blocks.append(block)
            continue
        block = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(block, quote=False))
        block = re.sub(r"`(.+?)`", r"<code>\1</code>", block)
        if block.startswith("- "):
            items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
            blocks.append("<ul>" + "".join(f"<li>{item.strip()}</li>" for item in items) + "</ul>")
        elif block:
            blocks.append(f"<p>{block}</p>")
    return "\n".join(blocks)


LIGHT = {
    "ink": "#1c2128",
    "soft": "#5c6670",
    "paper": "#fbfaf8",
    "card": "#ffffff",
    "rule": "#e2e0db",
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#b3589a",
    "c4": "#a67c00",
    "c5": "#4b9cd3",
    "c6": "#7a6ff0",
    "c7": "#6b7280",
}
"""The page's colours as CSS variables, --c0 … --c7 those of the runs; no two are equal, so that a chart's SVG can
name them."""

DARK = {
    "ink": "#e6e6e3",
    "soft": "#9aa3ad",
    "paper": "#15181c",
    "card": "#1d2126",
    "rule": "#343a41",
    "c0": "#4aa8e8",
    "c1": "#ff8a4c",
    "c2": "#3ccfa0",
    "c3": "#e59ac6",
    "c4": "#e0b84a",
    "c5": "#8fd0f5",
    "c6": "#a79ff8",
    "c7": "#a3acb8",
}


def _variables(colors: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
header p, header ul { max-width: 44rem; }
code { font: .9em ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
small, .note { color: var(--soft); font-size: .85rem; }
.swatch, .key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px;
  margin-right: .5rem; outline: 1px solid var(--rule); }
.legend { margin: 0 0 .75rem; } .key { margin-right: 1.25rem; white-space: nowrap; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
@media (min-width: 66rem) { .charts figure:first-child { grid-area: span 2 / span 2; } }
.matrices { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.panels { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.panels img { width: 100%; image-rendering: auto; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
figure { margin: 0 0 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
figcaption { overflow-wrap: anywhere; font-size: .9rem; color: var(--soft); margin-bottom: .4rem; }
.charts figure, .matrices figure { margin: 0; overflow-x: auto; }
.charts figure:first-child svg { min-width: 32rem; max-width: none; }
img { display: block; max-width: 100%; height: auto; } img + figcaption { margin: .5rem 0 0; }
svg { display: block; width: 100%; height: auto; max-width: calc(1.3 * var(--natural)); }
.wide > svg { min-width: calc(.9 * var(--natural)); }
svg text { font-family: inherit !important; }
summary { cursor: pointer; color: var(--soft); margin: .5rem 0; }
"""
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
{introduction}</header>
{body}
</body>
</html>
"""
