"""Low-rank adapters of a network's dense layers (LoRA, arXiv 2106.09685): a second variable
collection beside its parameters.

y = x W + (alpha / rank) (x A) B. W is frozen and has no gradient, W + A B is never made, and B
starts at 0: the network starts as its base, and without the collection it is its base. A tree of
adapters mirrors the tree of parameters where layers are adapted: beside `attn/to_q/kernel [in,
out]` stand `attn/to_q/a [in, rank]` and `attn/to_q/b [rank, out]`, float32. Kernels of stacked
blocks have stacked adapters.
"""

import difflib
import re
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from dancegrpo_jax.types import PyTree

COLLECTION = (
  "lora"  # of the network's variables, and the adapters' name among a pipeline's parameters
)


class Lora(NamedTuple):
  """The config's lora section.

  Attributes:
    rank: inner width.
    alpha: the product of the factors is multiplied by alpha / rank.
    targets: regular expression that matches the whole path of a dense layer's kernel, as
      "attn/to_q/kernel".
  """

  rank: int
  alpha: float
  targets: str

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def chosen(params: PyTree, targets: str) -> list[str]:
  """Paths of the adapted layers: dense ones (kernels of two axes, three where blocks are stacked)
  that `targets` matches.

  Raises:
    ValueError: none is.
  """
  flat = flatten_dict(params, sep="/")
  kernels = [
    path for path, leaf in flat.items() if path.endswith("/kernel") and len(leaf.shape) in (2, 3)
  ]
  found = [path.removesuffix("/kernel") for path in kernels if re.fullmatch(targets, path)]
  if not found:
    near = [path for path in kernels if re.search(targets, path)] or difflib.get_close_matches(
      targets, kernels, 1, cutoff=0.0
    )
    hint = f", as {near[0]!r}" if near else ""
    raise ValueError(
      f"config.lora.targets = {targets!r}: matches no dense kernel; it must match the whole path"
      f" of one{hint}"
    )
  return found


def abstract(params: PyTree, lora: Lora) -> PyTree:
  """Shapes and dtypes of the adapters of a network with these (abstract) parameters. ValueError as
  `chosen`.
  """
  flat, adapters = flatten_dict(params, sep="/"), {}
  for path in chosen(params, lora.targets):
    *stack, width, features = flat[f"{path}/kernel"].shape
    adapters[f"{path}/a"] = jax.ShapeDtypeStruct((*stack, width, lora.rank), jnp.float32)
    adapters[f"{path}/b"] = jax.ShapeDtypeStruct((*stack, lora.rank, features), jnp.float32)
  return unflatten_dict(adapters, sep="/")


def init(key: Key[Array, ""], adapters: PyTree) -> PyTree:
  """Adapters that change nothing: A uniform in +- 1 / sqrt(in), as peft's, and B = 0. An A depends
  on the key and its path.
  """

  def one(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
    if path.endswith("/b"):
      return jnp.zeros(leaf.shape, leaf.dtype)
    own = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
    return jax.random.uniform(own, leaf.shape, leaf.dtype, -1.0, 1.0) * leaf.shape[-2] ** -0.5

  return unflatten_dict(
    {path: one(path, leaf) for path, leaf in flatten_dict(adapters, sep="/").items()}, sep="/"
  )


def scaled(adapters: PyTree, scale: float) -> PyTree:
  """The adapters with a factor in every B."""
  flat = flatten_dict(adapters, sep="/")
  return unflatten_dict(
    {path: x * scale if path.endswith("/b") else x for path, x in flat.items()}, sep="/"
  )


def variables(params: PyTree, lora: Lora | None) -> dict[str, PyTree]:
  """What the denoiser's `apply` takes, from a pipeline's parameters by component: the adapters too,
  where there are any.

  alpha / rank goes into B here: the layers know no config, and B is far smaller than what a layer
  computes.
  """
  found = {"params": params["denoiser"]}
  if lora is not None and COLLECTION in params:
    found[COLLECTION] = scaled(params[COLLECTION], lora.scale)
  return found


def merged(params: PyTree, adapters: PyTree, scale: float) -> PyTree:
  """A network's parameters with W + scale A B, float32, in place of each adapted W. For export;
  training never makes them.
  """
  flat, factors = flatten_dict(params, sep="/"), flatten_dict(adapters, sep="/")
  for path in [path.removesuffix("/a") for path in factors if path.endswith("/a")]:
    a, b, kernel = factors[f"{path}/a"], factors[f"{path}/b"], flat[f"{path}/kernel"]
    flat[f"{path}/kernel"] = kernel.astype(jnp.float32) + scale * jnp.matmul(
      a, b, precision=jax.lax.Precision.HIGHEST
    )
  return unflatten_dict(flat, sep="/")
