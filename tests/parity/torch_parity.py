"""Shared by the parity tests: random torch weights, their import and export, and the error."""

from collections.abc import Callable

import jax
import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from dancegrpo_jax.checkpoints.weights import specs
from dancegrpo_jax.conversion.mapping import plan
from dancegrpo_jax.conversion.table import Spec, Table
from dancegrpo_jax.conversion.transfer import export_tree, import_tree


def randomise(module: torch.nn.Module, seed: int, scale: float = 1.0) -> torch.nn.Module:
  """Draws every tensor, also those that start at 0 or 1, so that a swapped or skipped one shows.

  Matrices and kernels keep the variance of what passes through. With `scale` 1e-3 all that enters a
  norm is about 1e-3, its variance comparable with the epsilons, so that a wrong epsilon shows.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      value = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1 and "embedding" not in name:
        value = value / parameter[0].numel() ** 0.5 * scale
      elif "norm" in name or "layrnorm" in name or "ln_" in name:  # ln_ is open_clip's name
        value = 0.3 * value + name.endswith("weight")
      else:
        value = 0.3 * value * scale
      parameter.copy_(value)
  return module.eval()


def convert(table: Table, module: torch.nn.Module, network, *arguments) -> dict:
  """Our parameters of `network` from a torch module's state_dict.

  Checks that the export gives it back bit for bit, except for the second name of a tied weight,
  which transformers does not write either.
  """
  state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
  abstract = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]
  mapping = plan(
    table, {name: Spec(a.shape, a.dtype) for name, a in state.items()}, specs(abstract)
  )
  params = import_tree(mapping, lambda name, index: state[name][index])
  back = export_tree(mapping, params)
  state = {name: tensor for name, tensor in state.items() if name not in dict(table.copies)}
  assert list(back) == list(state)
  for name, tensor in state.items():
    assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
    np.testing.assert_array_equal(back[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)
  return unflatten_dict(params, sep="/")


def run(function: Callable, *arguments) -> dict | tuple | np.ndarray:
  """Runs the compiled `function` with full float32 products."""
  with jax.default_matmul_precision("highest"):
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def error(ours: np.ndarray, theirs: torch.Tensor) -> float:
  """max |a - b| / max |b| over arrays of one layout."""
  theirs = theirs.detach().numpy()
  assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
  assert np.isfinite(theirs).all() and np.ptp(theirs) > 0
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nhwc(x: torch.Tensor) -> np.ndarray:
  return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())


def nchw(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
