"""Command: inspects, exports and imports checkpoints.

    python -m dancegrpo_jax.convert inspect FOLDER [--config=...]
    python -m dancegrpo_jax.convert export --checkpoint=runs/x[@ITERATION] --out=DIR
        [--part=denoiser|lora] [--weights=ema|raw] [--dtype=bfloat16]
    python -m dancegrpo_jax.convert merge --config=... --lora=FILE --out=DIR
        [--part=denoiser] [--strength=1.0] [--dtype=bfloat16]
    python -m dancegrpo_jax.convert import --config=... --out=DIR

`inspect` prints every tensor's name, shape, dtype and parameter, and whatever does not fit. FOLDER
is a diffusers pipeline (model_index.json) or one network's folder (config.json and safetensors).
With a config, it may also be a checkpoint or network of the family and the rewards that the config
names as module:object.

`export` writes a trained model in its base's layout, which for the families of this package is
diffusers', or its adapters as a LoRA file.

`merge` adds a LoRA file to the weights of the config's base model, and writes the result as a
folder in the base's layout.

`import` writes the config's base model as an Orbax tree, which is faster to start from. The new
folder can be used as `config.model.checkpoint`.
"""

from dancegrpo_jax.devices import interrupts

if __name__ == "__main__":
  interrupts.watch()  # before the imports below, which take seconds

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dancegrpo_jax import errors, installation
from dancegrpo_jax.checkpoints import flag, weights
from dancegrpo_jax.checkpoints.networks import NETWORKS, abstract_params, class_name
from dancegrpo_jax.conversion.mapping import describe, match
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.pipelines import families
from dancegrpo_jax.pipelines.layout import INDEX, Network
from dancegrpo_jax.report.progress import Progress
from dancegrpo_jax.rewards import kinds
from dancegrpo_jax.settings import command_line, config_file


class Known(NamedTuple):
  """What `inspect` knows.

  Attributes:
    networks: by class.
    folders: of the networks in a checkpoint that is no diffusers pipeline.
  """

  networks: dict[str, Network] = NETWORKS
  folders: tuple[str, ...] = ()


def known_with(path: str) -> Known:
  """The networks of this package and, where a config is given, of the config's family and rewards.

  Args:
    path: of the config file, with its preset; "" for none.

  Raises:
    ConfigError: the config can't be read, or names a family or reward that isn't there.
  """
  if not path:
    return Known()
  config = config_file.load(path)
  names = dict.fromkeys(kinds.reward_of(term) for term, _ in config.reward.terms)
  try:
    family = families.family_of(config.model.family)
    added = [family.networks, *(kinds.kind_of(name).networks for name in names)]
  except ValueError as error:
    raise errors.ConfigError(str(error)) from error
  networks = dict(NETWORKS)
  for each in added:
    networks |= each
  return Known(networks=networks, folders=() if family.index_file else family.layout.networks)


def components(folder: Path, known: Known) -> tuple[list[Path], list[str]]:
  """The folders of the networks in a checkpoint, and a line for each part that is left out.

  Raises:
    ConversionError: the folder is neither a pipeline nor a network.
  """
  if (folder / "config.json").is_file():
    return [folder], []
  places = [folder / place for place in known.folders]
  if places and all((place / "config.json").is_file() for place in places):
    return places, []
  if not (folder / INDEX).is_file():
    content = "no such folder"
    if folder.is_dir():
      content = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    expected = f"{INDEX} (a diffusers pipeline) or config.json (one network)"
    raise ConversionError(
      f"{folder}: not a checkpoint folder; expected {expected}; found: {content}"
    )
  index = weights.read_config(folder, INDEX)
  parts = {
    name: value[1]
    for name, value in index.items()
    if isinstance(value, list) and len(value) == 2 and value[1]
  }
  folders = [folder / name for name, kind in parts.items() if kind in known.networks]
  return folders, [
    f"{name} ({kind}): not a network that is converted"
    for name, kind in parts.items()
    if kind not in known.networks
  ]


def inspect(args: argparse.Namespace) -> int:
  """Prints the mapping of every network in the folder, then every problem.

  Returns:
    The exit code: 2 if there are problems, else 0.

  Raises:
    ConfigError, ConversionError: there is nothing to inspect.
  """
  known = known_with(args.config)
  folders, skipped = components(installation.find(args.folder), known)
  problems = []
  for folder in folders:
    try:
      config = weights.read_config(folder)
      name = class_name(config)
      targets = weights.specs(abstract_params(config, known.networks))
      table = known.networks[name].table
      with weights.open_reader(folder, args.variant, stem=table.file) as reader:
        mapping, misfits = match(table, reader.specs, targets)
    except ConversionError as error:
      message = str(error)
      problems.append(message if str(folder) in message else f"{folder}: {message}")
      continue
    print(f"# {folder} ({name}): {len(mapping.sources)} tensors, {len(mapping.targets)} parameters")
    for tensor, shape, dtype, target in describe(mapping):
      print(f"{tensor}\t{list(shape)}\t{dtype}\t{target}")
    for tensor in sorted(reader.specs.keys() - mapping.sources.keys()):
      print(f"# {tensor}: left out; it is a copy or belongs to another network")
    problems += [f"{folder}: {misfit}" for misfit in misfits]
  for line in skipped:
    print(f"# {line}")
  if problems:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"{count}:", *problems, sep="\n  ", file=sys.stderr)
  return 2 if problems else 0


def export(argv: Sequence[str]) -> None:
  """Reads the flags of `export` and runs it. ConfigError as `folders.export`."""

  def add_flags(parser: argparse.ArgumentParser) -> None:
    flag.add(parser, default=None)
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument(
      "--part",
      default="",
      choices=("", "pipeline", "denoiser", "lora"),
      help="the whole pipeline, the trained network (with adapters merged in), or only the"
      " adapters, which is the default where adapters were trained",
    )
    parser.add_argument(
      "--weights",
      default="",
      choices=("", "ema", "raw"),
      help="default: the averaged weights where the checkpoint has them",
    )
    _add_dtype(parser)

  line = command_line.parse_argv(
    argv, "Write a trained model as a folder in its base's layout.", add_flags, flag.config_of
  )
  # Imported after the flags have been read, so that a misspelt flag is reported at once.
  from dancegrpo_jax.convert import folders

  flags = line.flags
  _converted(
    lambda: folders.export(
      line.config,
      flags.checkpoint,
      Path(flags.out),
      part=flags.part,
      kind=flags.weights,
      dtype=flags.dtype,
    )
  )


def merge(argv: Sequence[str]) -> None:
  """Reads the flags of `merge` and runs it. ConfigError as `folders.merge`."""

  def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
      "--lora", required=True, help="a LoRA file of diffusers, peft or kohya, or its folder"
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument(
      "--part",
      default="pipeline",
      choices=("pipeline", "denoiser"),
      help="the whole pipeline (the default), or the adapted network alone",
    )
    parser.add_argument(
      "--strength",
      default=1.0,
      type=float,
      help="default: 1, the strength at which the adapters were trained",
    )
    _add_dtype(parser)

  line = command_line.parse_argv(argv, "Add a LoRA file to a base model's weights.", add_flags)
  from dancegrpo_jax.convert import folders  # late, as in `export`

  flags = line.flags
  _converted(
    lambda: folders.merge(
      line.config,
      flags.lora,
      Path(flags.out),
      part=flags.part,
      strength=flags.strength,
      dtype=flags.dtype,
    )
  )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--dtype",
    default="float32",
    choices=("float32", "bfloat16", "float16"),
    help="of all networks of the folder (default float32); diffusers loads a folder in another one"
    " with torch_dtype=",
  )


def import_checkpoint(argv: Sequence[str]) -> None:
  """Reads the flags of `import` and runs it. ConfigError as `folders.import_checkpoint`."""

  def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder to write; must not exist")

  line = command_line.parse_argv(argv, "Write a base model as an Orbax tree.", add_flags)
  from dancegrpo_jax.convert import folders  # late, as in `export`

  _converted(lambda: folders.import_checkpoint(line.config, Path(line.flags.out)))


def _converted(run: Callable[[], None]) -> None:
  """Calls `run`, shows what it does, and turns its ConversionError into a ConfigError."""
  try:
    with Progress():
      run()
  except ConversionError as error:
    raise errors.ConfigError(str(error)) from error


WITH_CONFIG = {"export": export, "merge": merge, "import": import_checkpoint}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand and returns the exit code, which is 2 after a mistake."""
  argv = sys.argv[1:] if argv is None else argv
  if argv and argv[0] in WITH_CONFIG:
    return command_line.exit_on_mistake(lambda: WITH_CONFIG[argv[0]](argv[1:]))
  parser = argparse.ArgumentParser(
    prog=command_line.program(), description="Inspect, export or import checkpoints."
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  commands.add_parser("export", help="a trained model as a folder; see export --help")
  commands.add_parser(
    "merge", help="a base model with a LoRA file added to its weights; see merge --help"
  )
  commands.add_parser(
    "import", help="a base model as an Orbax tree, for repeated starts; see import --help"
  )
  command = commands.add_parser(
    "inspect", help="a checkpoint's tensors, where they go, and what does not fit"
  )
  command.add_argument("folder", help="a checkpoint, or one network's folder")
  command.add_argument(
    "--config",
    default="",
    metavar="FILE[:preset]",
    help="needed for networks of a family or a reward that this config names as module:object",
  )
  command.add_argument("--variant", default="", help="which files to prefer, for example fp16")
  command.set_defaults(run=inspect)
  args = parser.parse_args(argv)
  try:
    return args.run(args)
  except (errors.ConfigError, ConversionError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
