"""The building blocks of conversion tables: one function for each kind of torch layer.

Parameter paths follow the torch names: "." becomes "/", or "_" in front of an index. Most rows can
therefore be made from the torch name alone.
"""

import re

from dancegrpo_jax.conversion.table import Part, Row

Rows = tuple[Row, ...]


def tree_path(name: str) -> str:
  """down_blocks.{i}.resnets.{j}.conv1 -> down_blocks_{i}/resnets_{j}/conv1."""
  return re.sub(r"\.(?=\d|\{)", "_", name).replace(".", "/")


def _kernel(name: str, axes: str, bias: bool) -> Rows:
  path = tree_path(name)
  weight = Row(f"{name}.weight", f"{path}/kernel", axes)
  return (weight, Row(f"{name}.bias", f"{path}/bias", "o -> o")) if bias else (weight,)


def dense(name: str, bias: bool = True) -> Rows:
  """torch.nn.Linear."""
  return _kernel(name, "o i -> i o", bias)


def conv(name: str, bias: bool = True) -> Rows:
  """torch.nn.Conv2d."""
  return _kernel(name, "o i h w -> h w i o", bias)


def conv3d(name: str) -> Rows:
  """torch.nn.Conv3d."""
  return _kernel(name, "o i t h w -> t h w i o", bias=True)


def norm(name: str) -> Rows:
  """torch.nn.LayerNorm and GroupNorm."""
  path = tree_path(name)
  return (
    Row(f"{name}.weight", f"{path}/scale", "c -> c"),
    Row(f"{name}.bias", f"{path}/bias", "c -> c"),
  )


def scale(name: str) -> Rows:
  """torch.nn.RMSNorm, which has no bias."""
  return norm(name)[:1]


def embedding(name: str) -> Rows:
  """torch.nn.Embedding."""
  return (Row(f"{name}.weight", f"{tree_path(name)}/embedding", "n d -> n d"),)


def both(name: str) -> Rows:
  """A projection that is a 1x1 convolution (SD 1.x) or a linear layer (SD 2.x), in the network as
  in the file.
  """
  return conv(name) + dense(name)[:1]


def under(prefix: str, rows: Rows) -> Rows:
  """The rows of a module, from the rows of what is inside it."""
  return tuple(
    r._replace(source=f"{prefix}.{r.source}", target=f"{tree_path(prefix)}/{r.target}")
    for r in rows
  )


def join(*groups: Rows) -> Rows:
  """The rows of several layers together."""
  return tuple(row for group in groups for row in group)


def layers(source: str, target: str, rows: Rows) -> Rows:
  """The rows of a list of layers, for networks that hold every layer apart and for networks that
  stack them along axis 0.

  Args:
    source: the list's name in the file.
    target: its path in the network.
    rows: of one layer.
  """
  rows = tuple(r._replace(source=f"{source}.{{i}}.{r.source}") for r in rows)
  apart = tuple(r._replace(target=f"{target}_{{i}}/{r.target}") for r in rows)
  return apart + tuple(
    r._replace(target=f"{target}/{r.target}", axes=r.axes.replace("->", "-> {i}")) for r in rows
  )


def prefixed(prefix: str, rows: Rows) -> Rows:
  """Rows whose tensors carry a prefix that the network's paths lack."""
  return tuple(r._replace(source=prefix + r.source) for r in rows)


def renamed(name: str, rows: Rows) -> Rows:
  """The rows of one module whose tensors have another name in this layout."""
  return tuple(r._replace(source=f"{name}.{r.source.rsplit('.', 1)[-1]}") for r in rows)


def respelt(source: str, name: str, part: Part | None = None, into: Part | None = None) -> Rows:
  """The rows of a dialect for a tensor that is a tensor of the network's own layout, whatever its
  number of axes.

  Args:
    source: its name in the dialect.
    name: its name in the network's own layout.
    part: of the first axis "a" of the dialect's tensor.
    into: the part of the first axis of the own tensor that it fills.
  """
  axes = ["a", "a b", "a b c d"]
  rows = [Row(source, name, f"{each} -> {each}", part, into) for each in axes]
  # A dense layer may be a convolution of one pixel in the dialect.
  return (*rows, Row(source, name, "a b 1 1 -> a b", part, into))
