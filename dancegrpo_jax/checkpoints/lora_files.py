"""LoRA files in the layouts of diffusers and peft: a table that reads them, the strength of their
adapters, and whether they fit a run.

A file holds `<network>.<module>.lora_A.weight [rank, in]` and `.lora_B.weight [out, rank]`, as
diffusers' `save_lora_weights` writes them; the network is "unet" or "transformer". peft's own names
(`base_model.model.<module>...`), names without a prefix, and the older `lora.down` and `lora.up`
are read too. How strongly the product counts is written in one of four places; see `scale_of`.
"""

import json
import re
from pathlib import Path

from dancegrpo_jax import installation
from dancegrpo_jax.checkpoints.safetensors_io import Reader, metadata
from dancegrpo_jax.conversion.table import Row, Spec, Table
from dancegrpo_jax.errors import ConversionError

FILE = "pytorch_lora_weights"
_FILES = (f"{FILE}.safetensors", "adapter_model.safetensors")
_FACTORS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora.down": "lora_A", "lora.up": "lora_B"}
_RANK_AXIS = {"lora_A": 0, "lora_B": 1}
_METADATA = "lora_adapter_metadata"  # diffusers' key
_NOT_IMPLEMENTED = ("use_dora", "alpha_pattern", "rank_pattern", "lora_bias")  # peft's settings


def table_for(network: Table) -> Table:
  """The table of adapters of every dense layer that a network's table has."""
  rows, prefix = [], network.lora_prefix
  for row in network.rows:
    left, right = (side.split() for side in row.axes.split("->"))
    if row.target.endswith("/kernel") and left == ["o", "i"]:
      module = row.source.removesuffix(".weight")
      path = row.target.removesuffix("/kernel")
      stack = " ".join(right[:-2])
      rows += [
        Row(f"{prefix}.{module}.lora_A.weight", f"{path}/a", f"r i -> {stack} i r"),
        Row(f"{prefix}.{module}.lora_B.weight", f"{path}/b", f"o r -> {stack} r o"),
      ]
  return Table(f"adapters of {network.name}", tuple(rows), others=("{*}.alpha",), file=FILE)


def find(path: str | Path) -> Path:
  """The weight file of a LoRA: the file itself, or the one in a folder.

  Raises:
    ConversionError: there is none; the message says what is there.
  """
  path = installation.find(path)
  if path.is_file() and path.suffix == ".safetensors":
    return path
  if not path.is_dir():
    content, names = f"no such folder or .safetensors file (from {Path.cwd()})", []
  else:
    entries = sorted(entry.name for entry in path.iterdir())
    content = f"the folder holds {', '.join(entries) or 'nothing'}"
    weight_files = [name for name in entries if name.endswith(".safetensors")]
    names = [name for name in _FILES if name in entries]
    if not names and len(weight_files) == 1:
      names = weight_files
  if not names:
    raise ConversionError(
      f"{content}; expected a folder with {' or '.join(_FILES)}, or such a file"
    )
  return path / names[0]


def canonical_name(network: Table, name: str) -> str | None:
  """A tensor's name as the rows spell it; None where it is no factor of an adapter."""
  prefix = network.lora_prefix
  factors = "|".join(map(re.escape, _FACTORS))
  parts = re.fullmatch(
    rf"(?:base_model\.model\.)?(?:{prefix}\.)?(.+?)\.({factors})(?:\.\w+)?\.weight", name
  )
  return f"{prefix}.{parts[1]}.{_FACTORS[parts[2]]}.weight" if parts else None


def scale_of(file: Path, network: Table, reader: Reader, rank: int) -> float:
  """The factor of the product B A: alpha / rank, or 1 where the file doesn't give alpha.

  alpha is looked for in `<module>.alpha` tensors, in diffusers' metadata of the file, and in peft's
  adapter_config.json beside it.

  Args:
    file: the weight file.
    network: the adapted network's table.
    reader: of the file.
    rank: of the adapters.

  Raises:
    ConversionError: alpha is not the same for all modules, or the adapters are of a kind that is
      not implemented.
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
  prefix, peft_config = network.lora_prefix, file.parent / "adapter_config.json"
  if _METADATA in metadata(file):
    settings = json.loads(metadata(file)[_METADATA])
    settings = {key.removeprefix(f"{prefix}."): value for key, value in settings.items()}
  else:
    settings = json.loads(peft_config.read_text()) if peft_config.is_file() else {}
  refused = [key for key in _NOT_IMPLEMENTED if settings.get(key)]
  if refused:
    raise ConversionError(f"it was made with {', '.join(refused)}, which is not implemented")
  return settings.get("lora_alpha", rank) / (rank**0.5 if settings.get("use_rslora") else rank)


def table_of_file(
  network: Table,
  tensors: dict[str, Spec],
  expected: dict[str, Spec],
  every_layer: dict[str, Spec],
  rank: int,
) -> Table:
  """The table that reads a file, once the file is known to fit the run.

  Args:
    network: the adapted network's table.
    tensors: of the file.
    expected: what the file would hold if the run had written it.
    every_layer: the same for adapters of rank 1 on every dense layer.
    rank: of the run.

  Raises:
    ConversionError: one line: the file holds no adapters, those of another model, another rank, or
      those of other layers.
  """
  names = _canonical_names(network, tensors, next(iter(expected)))
  specs = {canonical: tensors[name] for name, canonical in names.items()}
  _check_model(network, specs, every_layer)
  _check_rank(specs, rank)
  _check_layers(specs, expected)
  aliases = tuple((name, canonical) for name, canonical in names.items() if name != canonical)
  return table_for(network)._replace(aliases=aliases)


def _canonical_names(network: Table, tensors: dict[str, Spec], example: str) -> dict[str, str]:
  """The tensors' names as the rows spell them. ConversionError: not all are factors of adapters."""
  names, others = {}, []
  for name in tensors:
    canonical = canonical_name(network, name)
    if canonical is not None:
      names[name] = canonical
    elif not name.endswith(".alpha"):
      others.append(name)
  if others or not names:
    raise ConversionError(
      "not a LoRA in diffusers' or peft's layout: it holds"
      f" {others[0] if others else 'nothing'}; expected {example}"
    )
  return names


def _factor(name: str) -> str:
  """Which factor, "lora_A" or "lora_B", the tensor of a canonical name is."""
  return name.split(".")[-2]


def _fits(name: str, spec: Spec, layer: Spec) -> bool:
  """Whether a factor has the width of its layer; the rank is another matter."""
  width_axis = 1 - _RANK_AXIS[_factor(name)]
  return len(spec.shape) == 2 and spec.shape[width_axis] == layer.shape[width_axis]


def _check_model(network: Table, specs: dict[str, Spec], every_layer: dict[str, Spec]) -> None:
  """ConversionError where factors fit no layer of the network."""
  foreign = [
    name
    for name, spec in specs.items()
    if name not in every_layer or not _fits(name, spec, every_layer[name])
  ]
  if foreign:
    example = f"{foreign[0]} {list(specs[foreign[0]].shape)}"
    raise ConversionError(
      f"of another model: {len(foreign)} of its {len(specs)} tensors fit no dense layer of the"
      f" {network.name}, as {example}"
    )


def _check_rank(specs: dict[str, Spec], rank: int) -> None:
  """ConversionError where the adapters have another rank."""
  ranks = sorted({spec.shape[_RANK_AXIS[_factor(name)]] for name, spec in specs.items()})
  if ranks != [rank]:
    remedy = "one rank is needed"
    if len(ranks) == 1:
      remedy = f"set --config.lora.rank={ranks[0]} and an alpha of your choice"
    raise ConversionError(
      f"its rank is {', '.join(map(str, ranks))}, not config.lora.rank = {rank}; {remedy}"
    )


def _check_layers(specs: dict[str, Spec], expected: dict[str, Spec]) -> None:
  """ConversionError where the file adapts other layers than the run."""
  differences = []
  for names, what in (
    (sorted(specs.keys() - expected), "isn't matched"),
    (sorted(expected.keys() - specs), "isn't in the file"),
  ):
    if names:
      differences.append(f"{names[0]} {what} ({len(names)} in all)")
  if differences:
    raise ConversionError(
      f"it adapts other layers than config.lora.targets: {', '.join(differences)}; set those that"
      " it was made with"
    )
