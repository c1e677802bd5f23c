"""Low-rank adapters of a network's dense layers (LoRA, arXiv 2106.09685): a second collection of
variables beside its parameters.

y = x W + (alpha / rank) (x A) B. W is frozen and has no gradient, and W + A B is never computed in
training. B starts at 0, so the network with new adapters is its base model, as it is without the
collection. A tree of adapters mirrors the part of the tree of parameters that is adapted:
`attn/to_q/a [in, rank]` and `attn/to_q/b [rank, out]`, both float32, belong to `attn/to_q/kernel
[in, out]`. Kernels of stacked blocks have stacked adapters.
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

# The name of the collection, and of the adapters among a pipeline's parameters.
COLLECTION = "lora"


class Lora(NamedTuple):
  """The settings of adapters, from the section `lora` of the config.

  Attributes:
    rank: the width between the two factors.
    alpha: the product of the factors is multiplied by alpha / rank.
    targets: a regular expression that matches the whole path of each dense kernel to adapt, for
      example "attn/to_q/kernel".
  """

  rank: int
  alpha: float
  targets: str

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def chosen(params: PyTree, targets: str) -> list[str]:
  """The paths of the dense layers that `targets` matches.

  A dense layer is one whose kernel has two axes, or three where blocks are stacked.

  Raises:
    ValueError: `targets` matches no dense layer.
  """
  flat = flatten_dict(params, sep="/")
  kernels = [
    path for path, leaf in flat.items() if path.endswith("/kernel") and len(leaf.shape) in (2, 3)
  ]
  matching = [path.removesuffix("/kernel") for path in kernels if re.fullmatch(targets, path)]
  if not matching:
    near = [path for path in kernels if re.search(targets, path)]
    near = near or difflib.get_close_matches(targets, kernels, n=1, cutoff=0.0)
    hint = f", for example {near[0]!r}" if near else ""
    raise ValueError(
      f"config.lora.targets = {targets!r}: matches no dense kernel; it must match the whole path"
      f" of one{hint}"
    )
  return matching


def abstract(params: PyTree, lora: Lora) -> PyTree:
  """The shapes and dtypes of the adapters of a network with these (abstract) parameters.

  Raises:
    ValueError: no dense layer is matched, see `chosen`.
  """
  flat, adapters = flatten_dict(params, sep="/"), {}
  for path in chosen(params, lora.targets):
    *stack, width, features = flat[f"{path}/kernel"].shape
    adapters[f"{path}/a"] = jax.ShapeDtypeStruct((*stack, width, lora.rank), jnp.float32)
    adapters[f"{path}/b"] = jax.ShapeDtypeStruct((*stack, lora.rank, features), jnp.float32)
  return unflatten_dict(adapters, sep="/")


def init(key: Key[Array, ""], adapters: PyTree) -> PyTree:
  """New adapters, which don't change the network yet.

  A is uniform between -1 / sqrt(in) and 1 / sqrt(in), as in peft, and B is 0. The values of an A
  depend on the key and on its path only.
  """

  def factor(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
    if path.endswith("/b"):
      return jnp.zeros(leaf.shape, leaf.dtype)
    leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
    return jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -1.0, 1.0) * leaf.shape[-2] ** -0.5

  flat = flatten_dict(adapters, sep="/")
  return unflatten_dict({path: factor(path, leaf) for path, leaf in flat.items()}, sep="/")


def scaled(adapters: PyTree, scale: float) -> PyTree:
  """The adapters with every B multiplied by `scale`."""
  flat = flatten_dict(adapters, sep="/")
  return unflatten_dict(
    {path: x * scale if path.endswith("/b") else x for path, x in flat.items()}, sep="/"
  )


def variables(params: PyTree, lora: Lora | None) -> dict[str, PyTree]:
  """The variables of the denoiser, from a pipeline's parameters by component.

  Where `params` holds adapters, they are included, and alpha / rank is multiplied into B: the
  layers don't know the config, and B is far smaller than the results of a layer.
  """
  collections = {"params": params["denoiser"]}
  if lora is not None and COLLECTION in params:
    collections[COLLECTION] = scaled(params[COLLECTION], lora.scale)
  return collections


def merged(params: PyTree, adapters: PyTree, scale: float) -> PyTree:
  """A network's parameters with W + scale A B, float32, in place of each adapted W.

  This is for exports; training never computes it.
  """
  flat, factors = flatten_dict(params, sep="/"), flatten_dict(adapters, sep="/")
  for path in [path.removesuffix("/a") for path in factors if path.endswith("/a")]:
    a, b, kernel = factors[f"{path}/a"], factors[f"{path}/b"], flat[f"{path}/kernel"]
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    flat[f"{path}/kernel"] = kernel.astype(jnp.float32) + scale * product
  return unflatten_dict(flat, sep="/")
