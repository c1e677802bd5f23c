"""What mkdocs does beyond its own: pages and pictures from outside docs/, links to other files, and
equations as MathML.

The pages are written for two readers. On a code host their links are relative paths in the
repository, and equations stand between dollar signs. The built site fetches nothing from elsewhere,
so that it can be read offline.
"""

import html
import logging
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"benchmarks/RESULTS.md": "results.md"}  # outside docs/ -> its name in the site
PICTURES = "assets/images"
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
EQUATION = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.DOTALL)
PRIME = re.compile(
  r"<msup>(<m[io]>[^<]*</m[io]>)(?:<mrow>)?<m[io]>&#x02032;</m[io]>(<m[in]>[^<]*</m[in]>)?(?:</mrow>)?</msup>"
)
log = logging.getLogger("mkdocs.hooks.site")  # a warning ends a strict build


def on_files(files, config):
  """Adds the pages and the pictures that lie outside docs/."""
  for source, name in PAGES.items():
    files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
  for picture in sorted((ROOT / PICTURES).glob("*.png")):
    name = f"{PICTURES}/{picture.name}"
    files.append(File.generated(config, name, abs_src_path=str(picture)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Links out of docs/ become links inside the site or to the code host, or text without one."""
  name = page.file.src_uri
  source = next((path for path, other in PAGES.items() if other == name), f"docs/{name}")
  parts = FENCE.split(markdown)
  parts[::2] = [
    LINK.sub(lambda match: _link(match, source, config.repo_url), part) for part in parts[::2]
  ]
  return "".join(parts)


def _link(match: re.Match, source: str, repo_url: str | None) -> str:
  """A link of the file `source`, as it is in the site."""
  text, target = match[1], match[2]
  path, mark, anchor = target.partition("#")
  if "://" in target or not path:
    return match[0]
  inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
  if source.startswith("docs/") and inside.startswith("docs/"):
    return match[0]  # mkdocs itself checks it
  if not (ROOT / inside).exists():
    log.warning("%s: the link %s leads nowhere", source, target)
  if inside in PAGES or inside.startswith((f"{PICTURES}/", "docs/")):
    return f"[{text}]({PAGES.get(inside, inside.removeprefix('docs/'))}{mark}{anchor})"
  return f"[{text}]({repo_url.rstrip('/')}/blob/main/{inside}{mark}{anchor})" if repo_url else text


def on_page_content(content, page, config, files):
  """Equations, which arithmatex has marked, as MathML: browsers show it without any script."""
  return EQUATION.sub(_equation, content)


def _equation(match: re.Match) -> str:
  is_block = match[1] == "div"
  latex = html.unescape(match[2]).strip()[2:-2].strip()  # without \( \) or \[ \]
  mathml = PRIME.sub(_prime, convert(latex, display="block" if is_block else "inline"))
  return f'<div class="equation">{mathml}</div>' if is_block else mathml


def _prime(match: re.Match) -> str:
  """A prime on the line, where fonts have it raised already; a power stands behind it."""
  primed = f'<mrow>{match[1]}<mo lspace="0" rspace="0">&#x02032;</mo></mrow>'
  return f"<msup>{primed}{match[2]}</msup>" if match[2] else primed
