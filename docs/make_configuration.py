"""Writes docs/configuration.md from configs/common.py: each field, its default, and the comment
above or behind it.

    python docs/make_configuration.py

dancegrpo_jax/settings/field_comments.py reads the comments. tests/test_docs.py checks that the page
is up to date and that nothing lacks a comment.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python docs/make_configuration.py`

from dancegrpo_jax.settings.field_comments import Entry, entries  # noqa: E402

SOURCE = ROOT / "configs" / "common.py"
PAGE = ROOT / "docs" / "configuration.md"
SOURCES = {  # abbreviations in the comments -> what they stand for
  "P": "https://arxiv.org/abs/2505.07818",
  "C": "https://github.com/XueZeyue/DanceGRPO",
  "F": "https://arxiv.org/abs/2505.05470",
}
HEAD = """\
# Configuration

Every value of a run stands in one config. [`configs/common.py`](../configs/common.py) holds all
fields with their defaults, which are those of the paper's algorithm on the embedded emoji model. A
run's own file in `configs/` starts from it and changes what differs. The code itself holds no
defaults.

This page is made from the comments in that file by `python docs/make_configuration.py`.

## Setting a field

A field is set on the command line by its full name. The text takes the type of the present value.

```bash
python -m dancegrpo_jax.main --config=configs/emoji_clip.py --config.iterations=10
python -m dancegrpo_jax.main --config=configs/emoji_clip.py:tiny --config.model.size="(32, 32)"
python -m dancegrpo_jax.main --config=configs/emoji_clip.py --help
```

The name after the colon is a preset of the file, see [Recipes](recipes.md). With `--help` a command
prints every field of the config with its value, after presets and overrides, and its meaning.

`reward.terms` and `reward.thresholds` have a short form too,
`--config.reward.terms=hps:0.7,clip:1.4`,
see [Rewards](rewards.md#naming-rewards).

A misspelt field, a value of the wrong type, and values that do not fit each other are answered
before anything is loaded, all in one message. [Troubleshooting](troubleshooting.md) lists the usual
ones.

## What may change on resume

The same command on the same workdir resumes a run. `iterations`, `mesh`, `rollout.chunk`,
`optimizer.microbatch`, `reward.watch`, `logging`, `checkpoint`, `evaluation`,
`data.cache_embeddings` and `data.cache_folder` may differ then. They say where and how fast the run
computes and what it writes. `init_from` may be left out, since only a new run reads it. Any other
difference is refused, field by field, and so are other prompts in the same file.

## Sources of the defaults

A mark behind a sentence says where the default comes from:
[P](https://arxiv.org/abs/2505.07818) is the DanceGRPO paper,
[C](https://github.com/XueZeyue/DanceGRPO) is its PyTorch code as of October 2025, and
[F](https://arxiv.org/abs/2505.05470) is Flow-GRPO.
"""


def defaults() -> dict[str, Any]:
  """Dotted path -> value, of the config that the file returns."""
  spec = importlib.util.spec_from_file_location("common", SOURCE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def flat(values: dict, prefix: str) -> dict[str, Any]:
    result = {}
    for key, value in values.items():
      is_section = isinstance(value, dict)
      result |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return result

  return flat(module.get_config().to_dict(), "")


def marked_up(comment: str) -> str:
  """A comment as markdown: source marks, papers and addresses become links outside of backticks."""
  parts = comment.replace("|", "\\|").split("`")
  for i in range(0, len(parts), 2):
    text = re.sub(r"\[([PCF])\]", lambda m: f"[{m[1]}]({SOURCES[m[1]]})", parts[i])
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    parts[i] = re.sub(r"(?<!\()https://\S+[^\s.,]", r"<\g<0>>", text)
  return "`".join(parts)


def page() -> str:
  """The whole page."""
  listed, values = entries(SOURCE.read_text()), defaults()
  sections = {entry.path: [] for entry in listed if entry.is_section}
  top = [entry for entry in listed if not entry.is_section and "." not in entry.path]
  for entry in listed:
    if not entry.is_section and "." in entry.path:
      sections[entry.path.rpartition(".")[0]].append(entry)
  parts = [HEAD, "## The run\n", _table(top, values)]
  for entry in listed:
    if entry.is_section:
      level = "#" * (2 + entry.path.count("."))
      parts += [f"{level} {entry.path}\n", marked_up(entry.comment) + "\n"]
      if sections[entry.path]:
        parts.append(_table(sections[entry.path], values))
  return "\n".join(parts)


def _table(fields: list[Entry], values: dict[str, Any]) -> str:
  rows = ["| field | default | meaning |", "| --- | --- | --- |"]
  for entry in fields:
    default = repr(values[entry.path]).replace("'", '"').replace("|", "\\|")
    rows.append(f"| `{entry.path}` | `{default}` | {marked_up(entry.comment)} |")
  return "\n".join(rows) + "\n"


if __name__ == "__main__":
  PAGE.write_text(page())
  print(f"{PAGE.relative_to(ROOT)}: {len(defaults())} fields")
