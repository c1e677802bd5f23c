"""Makes a folder of a checkpoint in a single file, as Stable Diffusion's first release and Black
Forest Labs publish them, and as ComfyUI keeps them.

Such a file holds weights alone. What it lacks comes from a base: a folder, or a model on the hub,
with the same networks. Of the base are config files, tokenizers and scheduler, and the networks
that the file does not hold.
"""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from dancegrpo_jax.checkpoints import hub, recognition, weights
from dancegrpo_jax.checkpoints.networks import class_name
from dancegrpo_jax.conversion import names
from dancegrpo_jax.conversion.table import Table, matches
from dancegrpo_jax.convert import folders
from dancegrpo_jax.errors import ConfigError, ConversionError, listed
from dancegrpo_jax.pipelines.base import Family
from dancegrpo_jax.pipelines.families import FAMILIES
from dancegrpo_jax.pipelines.layout import Network

# The flags of the command, for messages.
BASE, FLAG = "--base", "--allow_pickle"
# Tensors of Stable Diffusion's first release that are no weights of the pipeline: the tables of its
# noise schedule, losses of its training, and what ComfyUI and trainers write beside the weights.
_NO_WEIGHTS = (
  "betas",
  "alphas_cumprod",
  "alphas_cumprod_prev",
  "sqrt_{*}",
  "log_one_minus_alphas_cumprod",
  "posterior_{*}",
  "logvar",
  "lvlb_weights",
  "scale_factor",
  "denoiser.sigmas",
  "global_step",
  "epoch",
  "text_encoders.{*}.logit_scale",
  "text_encoders.{*}.transformer.text_projection.weight",
)
_AVERAGE = "model_ema.{*}"


class Part(NamedTuple):
  """One network of the pipeline.

  Attributes:
    network: its table and its parameters, by its class.
    config: its config.json, of the base.
    in_file: whether the file holds it. Where it does not, the base does.
  """

  network: Network
  config: dict
  in_file: bool


def make_folder(
  file: Path, base: str, out: Path, dtype: str, allow_pickle: bool, variant: str = ""
) -> None:
  """Writes a pipeline's folder in diffusers' layout from a single file and a base.

  Args:
    file: the checkpoint, .safetensors or pickled.
    base: a folder or a hub id.
    out: where to write; must not exist, or be empty.
    dtype: of all networks.
    allow_pickle: whether pickled files may be read.
    variant: which weight files of the base to prefer, as "fp16".

  Raises:
    ConfigError, ConversionError: `out` exists already, or the file or the base can't be used.
  """
  folders.check_free(out)
  if not file.is_file():
    raise ConfigError(f"{file}: no such file (from {Path.cwd()}); give a checkpoint in one file")
  with weights.open_reader(file, allow_pickle=allow_pickle, flag=FLAG) as reader:
    tensors = list(reader.specs)
  family, held = _family(file, tensors)
  layout = family.layout
  # The config files first: they say which networks the base must have.
  folder = hub.folder(BASE, base, layout._replace(networks=()), variant)
  parts = {place: _part(folder / place, family, held) for place in layout.networks}
  others = tuple(place for place, part in parts.items() if not part.in_file)
  folder = hub.folder(BASE, base, layout._replace(networks=others), variant)
  _check_use(file, parts, tensors)
  with folders.written(out) as target:
    for place, part in parts.items():
      weights.copy(
        file if part.in_file else folder / place,
        target / place,
        part.network.table,
        part.network.abstract(part.config),
        jnp.dtype(dtype),
        variant,
        allow_pickle,
        FLAG,
        part.network.unread,
      )
      folders.copy_beside(folder / place, target / place, dtype)
    folders.copy_files(layout, folder, target)
    if layout.index_file and (folder / layout.index_file).is_file():
      folders.write_index(folder, target, layout.index_file)
  if any(matches(_AVERAGE, name) for name in tensors):
    print(f"note: {file}: its averaged weights (model_ema) are left out")
  from_file = [place for place, part in parts.items() if part.in_file]
  print(
    f"{out}: {listed(from_file, 4)} of {file}; {listed([*others, 'config files'], 4)}, tokenizers"
    f" and scheduler of {base}"
  )


def _family(file: Path, tensors: list[str]) -> tuple[Family, tuple[str, ...]]:
  """The family whose denoiser a file holds, and the classes of the networks in it.

  Raises:
    ConversionError: it holds none of this package; one line says what it is.
  """
  for family in FAMILIES.values():
    held = tuple(name for name, each in family.networks.items() if _holds(each.table, tensors))
    if next(iter(family.networks)) in held:  # the first one is the denoiser
      return family, held
  kind = recognition.kind_of(tensors)
  what = f"it looks like {kind.title}" if kind else f"it holds {listed(sorted(tensors), 3)}"
  remedy = f"; {kind.remedy}" if kind and kind.remedy else ""
  raise ConversionError(
    f"{file}: not a checkpoint of one of the families {', '.join(FAMILIES)}: {what}{remedy}"
  )


def _holds(table: Table, tensors: list[str]) -> bool:
  """Whether tensors of these names are those of a network, among others perhaps."""
  bare = names.bare(table, tensors)
  return names.dialect_of(table, bare) is not None or names.share(table, bare) > 0.9


def _part(place: Path, family: Family, held: tuple[str, ...]) -> Part:
  """One network, by its folder in the base. ConfigError: it is not one of the family's."""
  config = weights.read_config(place)
  name = class_name(config)
  if name not in family.networks:
    raise ConfigError(
      f"{BASE}: {place}/config.json names the class {name!r}; expected one of"
      f" {', '.join(family.networks)}, those of the file's model"
    )
  return Part(network=family.networks[name], config=config, in_file=name in held)


def _check_use(file: Path, parts: dict[str, Part], tensors: list[str]) -> None:
  """Raises ConversionError where a tensor of the file belongs to no network and is not known."""
  used: set[str] = set()
  for part in parts.values():
    if part.in_file:
      used |= set(names.bare(part.network.table, tensors).values())
  unknown = [
    name
    for name in tensors
    if name not in used and not any(matches(known, name) for known in (*_NO_WEIGHTS, _AVERAGE))
  ]
  if unknown:
    raise ConversionError(
      f"{file}: {len(unknown)} tensors belong to no network of the pipeline: {listed(unknown, 4)};"
      f" to see all: python -m dancegrpo_jax.convert inspect {file}"
    )
