"""The data card as one HTML file that needs nothing beside it: the Markdown of README.md with its pictures inside."""

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_STYLE = """
body { margin: 0 auto; max-width: 1080px; padding: 40px 32px 80px; color: #1d2125; background: #fff;
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; } h2 { font-size: 19px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid #e2e5e9; }
p { max-width: 76ch; } img { max-width: 100%; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #646b73; } th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid #e2e5e9; }
code { font-size: 12.5px; overflow-wrap: anywhere; white-space: pre-wrap; }
"""


def render(title: str, markdown: str, directory: Path) -> str:
  """The page; pictures named in the Markdown are read from `directory`. HTML in the text is shown, never obeyed."""
  parser = MarkdownIt("commonmark", {"html": False}).enable("table")

  def inside(match: re.Match) -> str:
    path = directory / match[1]
    if path.suffix not in _TYPES or not path.is_file():  # named by a text, not by the card
      return match[0]
    return f'src="data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"'

  body = re.sub(r'src="([\w.-]+)"', inside, parser.render(markdown))
  return (
    f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
    f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
  )
