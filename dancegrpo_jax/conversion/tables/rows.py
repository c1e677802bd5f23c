"""The building blocks of conversion tables: one function for each kind of torch layer.

Parameter paths follow the torch names: "." becomes "/", and "_" in front of an index. So most rows
need the torch name alone.
"""

import re

from dancegrpo_jax.conversion.mapping import Row

Rows = tuple[Row, ...]


def tree_path(name: str) -> str:
  """down_blocks.{i}.resnets.{j}.conv1 -> down_blocks_{i}/resnets_{j}/conv1."""
  return re.sub(r"\.(?=\d|\{)", "_", name).replace(".", "/")


def dense(name: str, bias: bool = True) -> Rows:
  """torch.nn.Linear."""
  weight = Row(f"{name}.weight", f"{tree_path(name)}/kernel", "o i -> i o")
  return (weight, Row(f"{name}.bias", f"{tree_path(name)}/bias", "o -> o")) if bias else (weight,)


def conv(name: str, bias: bool = True) -> Rows:
  """torch.nn.Conv2d."""
  weight = Row(f"{name}.weight", f"{tree_path(name)}/kernel", "o i h w -> h w i o")
  return (weight, Row(f"{name}.bias", f"{tree_path(name)}/bias", "o -> o")) if bias else (weight,)


def norm(name: str) -> Rows:
  """torch.nn.LayerNorm and GroupNorm."""
  return Row(f"{name}.weight", f"{tree_path(name)}/scale", "c -> c"), Row(
    f"{name}.bias", f"{tree_path(name)}/bias", "c -> c"
  )


def scale(name: str) -> Rows:
  """torch.nn.RMSNorm: a norm without a bias."""
  return norm(name)[:1]


def embedding(name: str) -> Rows:
  """torch.nn.Embedding."""
  return (Row(f"{name}.weight", f"{tree_path(name)}/embedding", "n d -> n d"),)


def both(name: str) -> Rows:
  """A projection that is a 1x1 convolution (SD 1.x) or a linear layer (SD 2.x) in the network as in
  the file.
  """
  return conv(name) + dense(name)[:1]


def under(prefix: str, rows: Rows) -> Rows:
  """The rows inside a module."""
  return tuple(
    r._replace(source=f"{prefix}.{r.source}", target=f"{tree_path(prefix)}/{r.target}")
    for r in rows
  )


def join(*groups: Rows) -> Rows:
  return tuple(row for group in groups for row in group)


def layers(source: str, target: str, rows: Rows) -> Rows:
  """The rows of a list of layers, for a network that holds every layer apart and for one that
  stacks them on axis 0.

  `source` is the list's name in the file, `target` its path in the network; `rows` are those of one
  layer.
  """
  rows = tuple(r._replace(source=f"{source}.{{i}}.{r.source}") for r in rows)
  apart = tuple(r._replace(target=f"{target}_{{i}}/{r.target}") for r in rows)
  return apart + tuple(
    r._replace(target=f"{target}/{r.target}", axes=r.axes.replace("->", "-> {i}")) for r in rows
  )


def prefixed(prefix: str, rows: Rows) -> Rows:
  """Rows whose tensors carry a prefix that the network's paths lack."""
  return tuple(r._replace(source=prefix + r.source) for r in rows)


# ---- CLIP, open_clip's names (LAION, DFN5B, HPS-v2)
# -----------------------------------------------------------------


def renamed(name: str, rows: Rows) -> Rows:
  """The rows of one module whose tensors have another name in this layout."""
  return tuple(r._replace(source=f"{name}.{r.source.rsplit('.', 1)[-1]}") for r in rows)
