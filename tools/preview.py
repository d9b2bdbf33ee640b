"""`dalikd preview`: a grid of a data set's images under each augmentation, as a PNG or an HTML file."""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalikd.pipelines.doctor import printable
from dalikd.pipelines.files import write_atomically
from dalikd.tools.cli import run_command
from dalikd.tools.summary import give_json
from dalikd.trainers.launch import start
from dalikd.trainers.preview import Preview, PreviewOptions, Tile, look
from dalikd.trainers.report.page import embedded
from dalikd.trainers.tracking import check_writable

_SMALLEST, _LARGEST = 112, 160  # sides in pixels that images are drawn at; small ones by a whole factor
_FRAME, _RIGHT, _WRONG, _INK, _PALE = "#d55e00", "#00614c", "#b3261e", "#1a1a1a", "#5f6368"


def preview(options: PreviewOptions, config: dict[str, Any]) -> Preview:  # noqa: ARG001
    """Look, write the files, and return what was drawn."""
    output = Path(options.output)
    paths = [output] if output.suffix else [output.with_suffix(".png"), output.with_suffix(".html")]
    for path in paths:
        check_writable("--output", path)
    accelerator = start(options.device, options.precision)
    found = look(options, accelerator)
    for path in paths:
        html, drawing = path.suffix == ".html", io.BytesIO()
        if not html:
            _draw(found).save(drawing, "PNG")
        write_atomically(path, _html(found).encode() if html else drawing.getvalue())
    print("\n".join([*map(printable, found.lines), *(f"written: {path}" for path in paths)]))
    rows = [{"title": row.title, "note": row.note, "tiles": [*map(_told, row.tiles)]} for row in found.rows]
    give_json(options.json, {"lines": found.lines, "rows": rows, "files": [*map(str, paths)]})
    return found


def _told(tile: Tile) -> dict[str, Any]:
    """What is known of an image, for JSON."""
    known = {name: value for name, value in tile._asdict().items() if name != "image"}
    return known | {"entropy": None if math.isnan(tile.entropy) else tile.entropy}


def _enlarged(image: np.ndarray) -> Image.Image:
    """Small images by a whole factor, each pixel a square; large ones made smaller."""
    drawn, side = Image.fromarray(image), len(image)
    if side > _LARGEST:
        return drawn.resize((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    side *= -(-_SMALLEST // side)
    return drawn.resize((side, side), Image.Resampling.NEAREST)


def _captions(tile: Tile) -> list[tuple[str, str]]:
    """The lines below an image, and their colours."""
    lines = [(f"+ {tile.partner}", _PALE)] if tile.partner else []
    if tile.answer:
        mark, colour = {True: ("✓ ", _RIGHT), False: ("✗ ", _WRONG), None: ("", _INK)}[tile.right]
        lines.append((f"{mark}{tile.answer}", colour))
        lines.append((f"entropy {tile.entropy:.2f}", _INK))
    return lines


# --------------------------------------------------------------------------------------------------------- the PNG


def _draw(found: Preview) -> Image.Image:
    import matplotlib  # its font has most alphabets

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font, bold = ImageFont.truetype(file, 13), ImageFont.truetype(file.with_name("DejaVuSans-Bold.ttf"), 13)
    line, gap, rows = 17, 16, found.rows
    images = [[_enlarged(tile.image) for tile in row.tiles] for row in rows]
    side, columns = images[0][0].width, len(rows[0].tiles)
    words = [word for row in rows for word in (*row.title.split(", "), *_wrapped(row.note, font, 190))]
    margin = gap + max(math.ceil(bold.getlength(word)) for word in words) + gap
    head = line + 3 if rows[0].tiles[0].label else 0
    heights = [side + line * max(len(_captions(tile)) for tile in row.tiles) + gap for row in rows]
    width = max(margin + columns * (side + gap), 640)
    texts = [part for text in found.lines for part in _wrapped(printable(text), font, width - 2 * gap)]
    top = gap + line * len(texts) + gap
    canvas = Image.new("RGB", (width, top + head + sum(heights) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for number, text in enumerate(texts):
        pen.text((gap, gap + number * line), text, _PALE, font)
    for column, tile in enumerate(rows[0].tiles):
        name = _cut(printable(tile.label), bold, side)
        pen.text((margin + column * (side + gap), top), name, _INK, bold)
    y = top + head
    for row, drawn, height in zip(rows, images, heights, strict=True):
        said = [(part, bold, _INK) for part in row.title.split(", ")]
        said += [(part, font, _PALE) for part in _wrapped(row.note, font, 190)]
        for number, (text, kind, colour) in enumerate(said):
            pen.text((gap, y + number * line), text, colour, kind)
        for column, (tile, image) in enumerate(zip(row.tiles, drawn, strict=True)):
            x = margin + column * (side + gap)
            if tile.picked:
                pen.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), _FRAME)
            canvas.paste(image, (x, y))
            for number, (text, colour) in enumerate(_captions(tile)):
                pen.text((x, y + side + 6 + number * line), _cut(printable(text), font, side + 6), colour, font)
        y += height
    return canvas


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text that is not wider, with an ellipsis where its end is left out."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that are not wider, cut between words; a word that is wider is cut short."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(_cut(word, font, width))
    return lines


# -------------------------------------------------------------------------------------------------------- the HTML

_STYLE = """
body { font: 14px/1.35 system-ui, sans-serif; color: #1a1a1a; margin: 16px; }
p { color: #5f6368; margin: 0 0 6px; overflow-wrap: anywhere; }
.grid { overflow-x: auto; }
table { border-spacing: 10px; border-collapse: separate; margin-left: -10px; }
th { text-align: left; vertical-align: top; font-weight: 600; font-size: 13px; }
th small { display: block; font-weight: 400; color: #5f6368; }
tbody th { position: sticky; left: 0; background: #fff; width: 140px; min-width: 110px; padding-right: 4px; }
td { vertical-align: top; }
td div, thead th div { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; font-size: 13px; }
img { display: block; image-rendering: pixelated; margin-bottom: 6px; }
.picked img { outline: 4px solid #d55e00; }
@media print { tr { break-inside: avoid; } .grid { overflow: visible; } }
"""


def _html(found: Preview) -> str:
    """One page that needs nothing else."""
    side = _enlarged(found.rows[0].tiles[0].image).width

    def cell(text: str, colour: str = _INK) -> str:
        shown = escape(printable(text))
        return f'<div style="width:{side}px;color:{colour}" title="{shown}">{shown}</div>'

    def image(tile: Tile) -> str:
        said = escape(
            printable(
                ", ".join([tile.label or "image", *(text for text, _ in _captions(tile)), *["picked"] * tile.picked])
            )
        )
        return f'<img src="{embedded(tile.image)}" width="{side}" height="{side}" alt="{said}">'

    heads = "".join(f"<th scope='col'>{cell(tile.label)}</th>" for tile in found.rows[0].tiles)
    body = []
    for row in found.rows:
        tiles = "".join(
            f"<td{' class=picked' if tile.picked else ''}>{image(tile)}"
            f"{''.join(cell(*caption) for caption in _captions(tile))}</td>"
            for tile in row.tiles
        )
        title = re.sub("([+_])", r"\1<wbr>", escape(row.title))
        body.append(f"<tr><th scope='row'>{title}<small>{escape(row.note)}</small></th>{tiles}</tr>")
    lines = "".join(f"<p>{escape(printable(line))}</p>" for line in found.lines)
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>dalikd preview</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body>{lines}<div class='grid'><table><thead><tr><th></th>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div></body></html>\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command("preview", preview, argv)


if __name__ == "__main__":
    main()
