"""The intersectional grid: one picture of every cell, with the same text and the same noise."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.sampling.job import Generate

_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_WIDTH = 1600  # pixels; images are made smaller where all columns would take more


def grid_attributes(schema: Schema) -> dict[str, np.ndarray]:
  """One row per full cell, first attribute slowest: {name: [number of cells]}; bins by their middle.

  A multilabel attribute has no levels and stays unknown.
  """
  cells = schema.grouping.cells()
  known = {a.name: [a.representative(cell[a.name]) for cell in cells] for a in schema.grouping}
  return schema.unknown(len(cells)) | {name: np.asarray(v, schema[name].dtype) for name, v in known.items()}


def draw_grid(images: np.ndarray, schema: Schema, title: str) -> Image.Image:
  """Lays `images` (uint8 [cells, S, S, 3], in the order of `grid_attributes`) out with labels.

  Rows are the levels of the first attribute (age), columns the combinations of the others (sex x group). Where no
  attribute has levels there is one picture, without labels.
  """
  schema = schema.grouping
  labels = [f"{a.name} {name}" for a in schema.attributes[:1] for name in a.level_names] or [""]
  rows = len(labels)
  columns = len(images) // rows
  side = max(64, min(images.shape[1], _WIDTH // columns))
  headers = [[f"{a.level_names[cell[a.name]]}" for a in schema.attributes[1:]] for cell in schema.cells()[:columns]]
  font = ImageFont.load_default(12)
  left = 12 + max(int(font.getlength(label)) for label in labels)
  line = 15
  width = left + columns * (side + 2)
  title_lines = textwrap.wrap(title, max(20, int(width / font.getlength("n"))))
  headers_top = line * (len(title_lines) + 0.5)
  top = int(headers_top + line * (max(1, len(schema.attributes) - 1) + 0.5))
  canvas = Image.new("RGB", (width, top + rows * (side + 2)), _PAPER)
  draw = ImageDraw.Draw(canvas)
  for number, text in enumerate(title_lines):
    draw.text((4, 2 + line * number), text, fill=_INK, font=font)
  for column, header in enumerate(headers):
    for depth, text in enumerate(header):
      draw.text((left + column * (side + 2) + 2, headers_top + line * depth), text, fill=_INK, font=font)
  for row, label in enumerate(labels):
    draw.text((4, top + row * (side + 2) + side // 2 - 6), label, fill=_INK, font=font)
    for column in range(columns):
      tile = Image.fromarray(images[row * columns + column]).resize((side, side), Image.Resampling.BICUBIC)
      canvas.paste(tile, (left + column * (side + 2), top + row * (side + 2)))
  return canvas


def sample_grid(
  generate: Generate,
  schema: Schema,
  text: str,
  seed: int,
  title: str,
  negative: str = "",
) -> Image.Image:
  """Draws every cell of `schema` from one text and one seed, with the negative prompt `negative`."""
  attributes = grid_attributes(schema)
  count = len(schema.grouping.cells())
  images = generate([text] * count, attributes, np.full([count], seed, np.uint32), [negative] * count)
  return draw_grid(images, schema, title)
