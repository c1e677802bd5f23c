"""The adapters of a LoRA file as those of a run, which have one rank and one factor of the product,
and whether the run can train them.
"""

import re
import zlib

import numpy as np

from dancegrpo_jax.checkpoints.lora_files import Adapter, LoraFile, factors
from dancegrpo_jax.checkpoints.lora_names import Layers
from dancegrpo_jax.checkpoints.safetensors_io import Reader
from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.conversion.transfer import Slices
from dancegrpo_jax.errors import ConversionError, listed

MERGE = "`python -m dancegrpo_jax.convert merge`"


class Factors:
  """A reader of a file's adapters as those of a run: of one rank, with one factor of the product.

  Each B is multiplied by the quotient of the two factors. Ranks that a layer lacks begin as new
  adapters do: their part of A is random, as in peft, and their part of B is 0, so that they change
  nothing yet and can be trained.

  Attributes:
    specs: shape and dtype of every tensor, by the name that `lora_files.table_for` has.
  """

  def __init__(
    self, reader: Reader, adapters: dict[str, Adapter], layers: Layers, rank: int, scale: float
  ):
    self._reader, self._adapters, self._rank, self._scale = reader, adapters, rank, scale
    self._prefix = f"{layers.table.lora_prefix}."
    self.specs: dict[str, Spec] = {}
    for module in adapters:
      width_out, width_in = layers.shapes[module][:2]
      shapes = {"lora_A": (rank, width_in), "lora_B": (width_out, rank)}
      for letter, shape in shapes.items():
        name = f"{self._prefix}{module}.{letter}.weight"
        self.specs[name] = Spec(shape, np.dtype(np.float32))

  def read(self, name: str, index: Slices) -> np.ndarray:
    """One part of a tensor."""
    module, letter = name.removesuffix(".weight").removeprefix(self._prefix).rsplit(".", 1)
    adapter = self._adapters[module]
    down, up = factors(self._reader, adapter)
    whole = np.zeros(self.specs[name].shape, np.float32)
    if letter == "lora_B":
      whole[:, : adapter.rank] = up * np.float32(adapter.scale / self._scale)
    else:
      whole[: adapter.rank] = down
      rows, bound = self._rank - adapter.rank, down.shape[1] ** -0.5
      rng = np.random.default_rng(zlib.crc32(module.encode()))
      whole[adapter.rank :] = rng.uniform(-bound, bound, (rows, down.shape[1]))
    return whole[index]


def check_run(content: LoraFile, layers: Layers, expected: set[str], rank: int) -> None:
  """Whether a run can train the adapters of a file further.

  Args:
    content: of the file.
    layers: of the network.
    expected: the layers that the run adapts.
    rank: of the run.

  Raises:
    ConversionError: one line: the file adapts convolutions, has a higher rank, or adapts other
      layers than the run.
  """
  adapters = content.adapters
  windows = [module for module in adapters if len(layers.shapes[module]) != 2]
  if windows:
    raise ConversionError(
      f"it adapts {len(windows)} convolutions ({listed(windows)}), and a run trains adapters of"
      f" dense layers alone; merge it into the base with {MERGE}, and start new adapters from that"
    )
  ranks = sorted({adapter.rank for adapter in adapters.values()})
  if ranks[-1] > rank:
    raise ConversionError(
      f"its rank is {', '.join(map(str, ranks))}, not config.lora.rank = {rank}; set"
      f" --config.lora.rank={ranks[-1]} and an alpha of your choice"
    )
  differences = []
  for names, what in (
    (sorted(adapters.keys() - expected), "isn't matched"),
    (sorted(expected - adapters.keys()), "isn't in the file"),
  ):
    if names:
      differences.append(f"{names[0]} {what} ({len(names)} in all)")
  if differences:
    targets = matching_targets(layers, set(adapters))
    remedy = f"set --config.lora.targets='{targets}'" if targets else "set those of the file"
    raise ConversionError(
      f"it adapts other layers than config.lora.targets: {', '.join(differences)}; {remedy}, or"
      f" merge it into the base with {MERGE}"
    )


def matching_targets(layers: Layers, modules: set[str]) -> str:
  """A value of config.lora.targets that matches the kernels of these dense layers alone; "" where
  no short one does.
  """
  chosen = {layers.paths[module] for module in modules}
  dense = {path for module, path in layers.paths.items() if len(layers.shapes[module]) == 2}
  for depth in (1, 2, 3):
    ends = sorted({"/".join(path.split("/")[-1 - depth : -1]) for path in chosen})
    targets = rf"(.*/)?({'|'.join(ends)})/kernel"
    if chosen == {path for path in dense if re.fullmatch(targets, path)}:
      return targets
  return ""


def fitting_note(content: LoraFile, rank: int) -> tuple[str, ...]:
  """A line that says what was done to adapters that differ, or that have a lower rank than a run's;
  () where nothing was.
  """
  ranks = sorted({adapter.rank for adapter in content.adapters.values()})
  scales = sorted({adapter.scale for adapter in content.adapters.values()})
  if ranks == [rank] and len(scales) == 1:
    return ()
  padded = "" if ranks == [rank] else ", with zeros in B for the ranks that are new"
  return (
    f"its layers have rank {_either(ranks)} and alpha / rank {_either(scales)}; all now have those"
    f" of the run{padded}, and change the model as much as before",
  )


def _either(numbers: list) -> str:
  """The first numbers, as a choice."""
  return " or ".join(f"{number:.4g}" for number in numbers[:4]) + (" ..." if numbers[4:] else "")
