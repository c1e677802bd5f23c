"""README and docs/: fields that are explained, messages that the code can raise, and pages that
their scripts would write again.
"""

import ast
import re
import runpy
from pathlib import Path

import pytest

from dancegrpo_jax.settings import config_file, stored_config
from dancegrpo_jax.settings.checks import values

ROOT = Path(__file__).parent.parent
EXAMPLES = (ROOT / "examples").glob("*/README.md")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *EXAMPLES])
COMMON = str(ROOT / "configs" / "common.py")
CONFIGURATION = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
FIGURES = runpy.run_path(str(ROOT / "docs" / "make_figures.py"))


def text(name: str) -> str:
  return (ROOT / "docs" / name).read_text()


# Commands


def test_the_first_commands():
  """Whoever has read one page of the project knows these two."""
  for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
    first, second = re.search(r"```bash\n(.*)\n(.*)\n```", page.read_text()).groups()
    assert first == "pip install -r requirements.txt"
    assert second == "python -m dancegrpo_jax.main --config=configs/emoji_clip.py"


# Configuration


def test_every_field_and_section_has_an_explanation():
  listed = CONFIGURATION["entries"]((ROOT / "configs" / "common.py").read_text())
  fields = {entry.path for entry in listed if not entry.is_section}
  assert fields == set(stored_config.flatten(config_file.load(COMMON)))
  for entry in listed:
    assert len(entry.comment.split()) >= 2 and entry.comment.endswith("."), entry.path


def test_every_choice_is_explained():
  explained = {
    entry.path: entry.comment
    for entry in CONFIGURATION["entries"]((ROOT / "configs" / "common.py").read_text())
  }
  for field, choices in values.CHOICES.items():
    for choice in choices:
      pattern = rf"(?<!\w){re.escape(str(choice))}(?!\w)"
      assert re.search(pattern, explained[field]), f"{field}: {choice}"


def test_the_page_of_fields_is_up_to_date():
  """`python docs/make_configuration.py` writes it."""
  assert text("configuration.md") == CONFIGURATION["page"]()


def test_comments_above_and_behind_a_field_belong_to_it():
  source = (
    "# A title that belongs to nothing.\n\n"
    "config.a = 1  # Behind.\n"
    "# Of the section.\n"
    "config.b = ConfigDict(  # And this.\n"
    '  {\n    # Above, over\n    # two lines.\n    "c": (\n      1,  # Inside.\n    ),\n'
    '    "d": 2,\n  }\n)\n'
  )
  assert [tuple(entry) for entry in CONFIGURATION["entries"](source)] == [
    ("a", False, "Behind."),
    ("b", True, "Of the section. And this."),
    ("b.c", False, "Above, over two lines. Inside."),
    ("b.d", False, ""),
  ]


@pytest.mark.parametrize(
  "comment, expected",
  [
    ("As [C] does, `a|b`.", "As [C](https://github.com/XueZeyue/DanceGRPO) does, `a\\|b`."),
    ("arXiv 2505.07818.", "[arXiv 2505.07818](https://arxiv.org/abs/2505.07818)."),
    ("From https://example.org/x.", "From <https://example.org/x>."),
    ("`arXiv 2505.07818 [C]`", "`arXiv 2505.07818 [C]`"),
  ],
)
def test_a_comment_as_markdown(comment, expected):
  assert CONFIGURATION["marked_up"](comment) == expected


# Recipes, architecture, promises


def test_every_recipe_and_preset_is_on_its_page():
  rows = text("recipes.md").splitlines()
  for file in (ROOT / "configs").glob("*.py"):
    module = config_file._import(str(file))
    if hasattr(module, "PRESETS") and hasattr(module, "get_config"):
      (row,) = [row for row in rows if row.startswith(f"| `{file.name}` |")]
      named = set(re.findall(r"`:(\w+)`", row))
      if "the same" in row.split("|")[4]:
        named = set(
          re.findall(r"`:(\w+)`", next(r for r in rows if r.startswith("| `sd_clip.py`")))
        )
      assert named == set(module.PRESETS) - {""}, file.name


def test_every_room_is_described():
  page = text("architecture.md")
  for room in sum(FIGURES["layers"](), []):
    assert room in FIGURES["NOTES"] and re.search(rf"`{room}/?`", page), room


@pytest.mark.parametrize("name", FIGURES["FIGURES"])
def test_the_figures_are_up_to_date(name):
  """`python docs/make_figures.py` writes them."""
  assert text(f"images/{name}") == FIGURES["FIGURES"][name]()


def test_the_tests_behind_the_promises_are_there():
  names = set(re.findall(r"`((?:tests/)?(?:parity/)?test_\w+\.py)`", text("promises.md")))
  assert len(names) > 20
  for name in names:
    file = name.removeprefix("tests/")
    assert any((ROOT / "tests" / place / file).is_file() for place in ("", "parity")), name


# Troubleshooting


def literals() -> str:
  """Every piece of text in the package that stands in one string, a line each."""
  pieces = []
  for file in (ROOT / "dancegrpo_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        pieces.append(node.value)
  return "\n".join(pieces)


def messages() -> list[str]:
  return re.findall(r"^\| `(.+?)` \|", text("troubleshooting.md"), re.M)


LITERALS = literals()
FIELDS = stored_config.flatten(config_file.load(COMMON))


@pytest.mark.parametrize("message", messages())
def test_a_message_is_one_that_the_code_has(message):
  """Up to what differs from case to case. One function puts `config.<field> = ...: ` before."""
  found = re.match(r"config\.([\w.]+) = …: ", message)
  if found:
    assert found[1] in FIELDS
    message = message[found.end() :]
  for piece in message.split("…"):
    assert piece.strip(" ;,") in LITERALS, piece


def test_the_usual_mistakes_are_there():
  assert len(messages()) >= 25


# README


def test_readme_is_short_and_says_what_was_not_run():
  lines = (ROOT / "README.md").read_text().splitlines()
  assert len(lines) <= 150
  assert all(len(line) <= 100 for line in lines if not line.startswith("|"))
  top = " ".join(lines[:20])
  assert "no full-size model has been trained" in top.lower() and "no TPU has been touched" in top


def test_the_links_of_readme_lead_somewhere():
  """Those of docs/ are checked where the site is built."""
  links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())
  inside = [link for link in links if "://" not in link]
  assert len(inside) > 15 and all((ROOT / link).exists() for link in inside)
