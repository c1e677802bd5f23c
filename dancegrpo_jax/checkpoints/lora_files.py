"""LoRA files in diffusers' and peft's layouts: a table for the engine in mapping.py, a file's
strength, and whether it fits a run.

A file holds `<network>.<module>.lora_A.weight [rank, in]` and `.lora_B.weight [out, rank]`, as
diffusers' `save_lora_weights` writes them ("unet", "transformer"). Read are also peft's own names
(`base_model.model.<module>...`), names without a prefix, and the older `lora.down` and `lora.up`.
How strong the product counts stands in one of four places; see `scale_of`.
"""

import json
import re
from pathlib import Path

from dancegrpo_jax import installation
from dancegrpo_jax.checkpoints.safetensors_io import Reader, metadata
from dancegrpo_jax.conversion.mapping import Row, Spec, Table
from dancegrpo_jax.errors import ConversionError

FILE = "pytorch_lora_weights"
_FILES = (f"{FILE}.safetensors", "adapter_model.safetensors")
_FACTORS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
_METADATA = "lora_adapter_metadata"  # diffusers' key


def table_for(network: Table) -> Table:
  """The rows of adapters of every dense layer that a network's table has."""
  rows, prefix = [], network.lora_prefix
  for row in network.rows:
    left, right = (tuple(side.split()) for side in row.axes.split("->"))
    if row.target.endswith("/kernel") and left == ("o", "i"):
      module, path, stack = (
        row.source.removesuffix(".weight"),
        row.target.removesuffix("/kernel"),
        " ".join(right[:-2]),
      )
      rows += [
        Row(f"{prefix}.{module}.lora_A.weight", f"{path}/a", f"r i -> {stack} i r"),
        Row(f"{prefix}.{module}.lora_B.weight", f"{path}/b", f"o r -> {stack} r o"),
      ]
  return Table(f"adapters of {network.name}", tuple(rows), others=("{*}.alpha",), file=FILE)


def find(path: str | Path) -> Path:
  """The weight file of a LoRA: itself, or in its folder. ConversionError: there is none."""
  path = installation.find(path)
  if path.is_file() and path.suffix == ".safetensors":
    return path
  found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
  alone = [name for name in found if name.endswith(".safetensors")]
  names = [name for name in _FILES if name in found] or (alone if len(alone) == 1 else [])
  if not names:
    where = f"no such folder or .safetensors file (from {Path.cwd()})"
    what = f"the folder holds {', '.join(found) or 'nothing'}" if path.is_dir() else where
    raise ConversionError(f"{what}; expected a folder with {' or '.join(_FILES)}, or such a file")
  return path / names[0]


def spelled(network: Table, name: str) -> str | None:
  """A tensor's name as the rows have it; None where it is no factor of an adapter."""
  prefix = network.lora_prefix
  factors = "|".join(map(re.escape, _FACTORS))
  found = re.fullmatch(
    rf"(?:base_model\.model\.)?(?:{prefix}\.)?(.+?)\.({factors})(?:\.\w+)?\.weight", name
  )
  return f"{prefix}.{found[1]}.{_FACTORS[found[2]]}.weight" if found else None


def scale_of(file: Path, network: Table, reader: Reader, rank: int) -> float:
  """How often the product B A counts: alpha / rank, 1 where the file doesn't say.

  alpha is looked for in `<module>.alpha` tensors, in diffusers' metadata of the file, and in peft's
  adapter_config.json.

  Raises:
    ConversionError: it is not the same for all modules, or the adapters are of a kind that is not
      implemented.
  """
  scalars = {name: spec for name, spec in reader.specs.items() if name.endswith(".alpha")}
  alphas = {
    float(reader.read(name, (slice(None),) * len(spec.shape)).reshape(-1)[0])
    for name, spec in scalars.items()
  }
  if len(alphas) > 1:
    raise ConversionError(
      f"its modules have different alphas ({', '.join(map(str, sorted(alphas)))}), which is not"
      " implemented"
    )
  if alphas:
    return alphas.pop() / rank
  prefix, beside = network.lora_prefix, file.parent / "adapter_config.json"
  if _METADATA in metadata(file):
    values = json.loads(metadata(file)[_METADATA])
    values = {key.removeprefix(f"{prefix}."): value for key, value in values.items()}
  else:
    values = json.loads(beside.read_text()) if beside.is_file() else {}
  other = [
    key for key in ("use_dora", "alpha_pattern", "rank_pattern", "lora_bias") if values.get(key)
  ]
  if other:
    raise ConversionError(f"it was made with {', '.join(other)}, which is not implemented")
  return values.get("lora_alpha", rank) / (rank**0.5 if values.get("use_rslora") else rank)


def fitting(
  network: Table,
  tensors: dict[str, Spec],
  wanted: dict[str, Spec],
  known: dict[str, Spec],
  rank: int,
) -> Table:
  """The table that reads this file.

  Args:
    network: the adapted network's table.
    tensors: of the file.
    wanted: what the file would hold if the run had written it.
    known: the same for adapters of rank 1 on every dense layer.
    rank: of the run.

  Raises:
    ConversionError: one line: no adapters, those of another model, another rank, or other layers.
  """
  spellings = {name: spelled(network, name) for name in tensors if not name.endswith(".alpha")}
  names = {name: found for name, found in spellings.items() if found is not None}
  if not names or len(names) < len(spellings):
    first = next((name for name in spellings if name not in names), "nothing")
    raise ConversionError(
      f"not a LoRA in diffusers' or peft's layout: it holds {first}; expected {next(iter(wanted))}"
    )
  specs = {found: tensors[name] for name, found in names.items()}
  foreign = [
    name for name, spec in specs.items() if name not in known or not _fits(name, spec, known[name])
  ]
  if foreign:
    raise ConversionError(
      f"of another model: {len(foreign)} of its {len(specs)} tensors fit no dense layer of the"
      f" {network.name}, as"
      f" {foreign[0]} {list(specs[foreign[0]].shape)}"
    )
  ranks = sorted({spec.shape["lora_B" in name] for name, spec in specs.items()})
  if ranks != [rank]:
    remedy = (
      f"set --config.lora.rank={ranks[0]} and an alpha of your choice"
      if len(ranks) == 1
      else "one rank is needed"
    )
    raise ConversionError(
      f"its rank is {', '.join(map(str, ranks))}, not config.lora.rank = {rank}; {remedy}"
    )
  differ = {
    "isn't matched": sorted(specs.keys() - wanted),
    "isn't in the file": sorted(wanted.keys() - specs),
  }
  lines = [
    f"{modules[0]} {what} ({len(modules)} in all)" for what, modules in differ.items() if modules
  ]
  if lines:
    raise ConversionError(
      f"it adapts other layers than config.lora.targets: {', '.join(lines)}; set those that it"
      " was made with"
    )
  return table_for(network)._replace(
    aliases=tuple((name, found) for name, found in names.items() if name != found)
  )


def _fits(name: str, spec: Spec, known: Spec) -> bool:
  """Whether a factor has the width of the layer; the rank is another matter."""
  axis = "lora_A" in name
  return len(spec.shape) == 2 and spec.shape[axis] == known.shape[axis]
