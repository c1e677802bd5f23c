"""Command: checkpoints out, in, and looked into.

    python -m dancegrpo_jax.convert inspect FOLDER
    python -m dancegrpo_jax.convert export --config=... --checkpoint=runs/x --out=DIR
    [--part=denoiser|lora] [--weights=ema|raw]
    python -m dancegrpo_jax.convert import --config=... --out=DIR

inspect: every tensor's name, shape, dtype and parameter, and all that does not fit. FOLDER is a
diffusers pipeline (model_index.json) or one network's folder (config.json and safetensors). export:
a trained model as a diffusers folder, or its adapters as a LoRA file.
import: the config's base model as an Orbax tree, for repeated starts; `config.model.checkpoint`
takes it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dancegrpo_jax import errors, installation
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.checkpoints.networks import NETWORKS, TABLES, abstract_params, class_name
from dancegrpo_jax.conversion.mapping import describe, match
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.settings import command_line


def components(folder: Path) -> tuple[list[Path], list[str]]:
  """The folders of the networks in a checkpoint, and lines on what is left out.

  Raises:
    ConversionError: neither a pipeline nor a network.
  """
  if (folder / "config.json").is_file():
    return [folder], []
  if not (folder / "model_index.json").is_file():
    found = (
      ", ".join(sorted(path.name for path in folder.iterdir()))
      if folder.is_dir()
      else "no such folder"
    )
    expected = "model_index.json (a diffusers pipeline) or config.json (one network)"
    raise ConversionError(
      f"{folder}: not a checkpoint folder; expected {expected}; found: {found or 'nothing'}"
    )
  index = weights.read_config(folder, "model_index.json")
  parts = {
    name: value[1]
    for name, value in index.items()
    if isinstance(value, list) and len(value) == 2 and value[1]
  }
  known = [folder / name for name, kind in parts.items() if kind in NETWORKS]
  return known, [
    f"{name} ({kind}): not a network that is converted"
    for name, kind in parts.items()
    if kind not in NETWORKS
  ]


def inspect(args: argparse.Namespace) -> int:
  """Prints the mapping of every network in the folder, then every problem."""
  folders, skipped = components(installation.find(args.folder))
  problems = []
  for folder in folders:
    try:
      config = weights.read_config(folder)
      name = class_name(config)
      targets = weights.specs(abstract_params(config))
      with weights.open_reader(folder, args.variant) as reader:
        mapping, found = match(TABLES[name], reader.specs, targets)
    except ConversionError as error:
      message = str(error)
      problems.append(message if str(folder) in message else f"{folder}: {message}")
      continue
    print(f"# {folder} ({name}): {len(mapping.sources)} tensors, {len(mapping.targets)} parameters")
    for tensor, shape, dtype, target in describe(mapping):
      print(f"{tensor}\t{list(shape)}\t{dtype}\t{target}")
    for tensor in sorted(reader.specs.keys() - mapping.sources.keys()):
      print(f"# {tensor}: left out, a copy or another network's")
    problems += [f"{folder}: {problem}" for problem in found]
  for line in skipped:
    print(f"# {line}")
  if problems:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"{count}:", *problems, sep="\n  ", file=sys.stderr)
  return 2 if problems else 0


def export(argv: Sequence[str]) -> None:
  """Reads the flags of `export` and runs it. ConfigError as `folders.export`."""

  def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a workdir, or its checkpoints/ folder")
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

  line = command_line.parse_argv(argv, "Write a trained model as a diffusers folder.", add_flags)
  # Imported after the flags have been read, so that a misspelt flag is reported at once.
  from dancegrpo_jax.convert import folders

  _converted(
    lambda: folders.export(
      line.config, line.flags.checkpoint, Path(line.flags.out), line.flags.part, line.flags.weights
    )
  )


def import_checkpoint(argv: Sequence[str]) -> None:
  """Reads the flags of `import` and runs it. ConfigError as `folders.import_checkpoint`."""
  line = command_line.parse_argv(
    argv,
    "Write a base model as an Orbax tree.",
    lambda parser: parser.add_argument(
      "--out", required=True, help="folder to write; must not exist"
    ),
  )
  from dancegrpo_jax.convert import folders  # late, as in `export`

  _converted(lambda: folders.import_checkpoint(line.config, Path(line.flags.out)))


def _converted(run: Callable[[], None]) -> None:
  """Calls `run`, and turns its ConversionError into a ConfigError."""
  try:
    run()
  except ConversionError as error:
    raise errors.ConfigError(str(error)) from error


WITH_CONFIG = {"export": export, "import": import_checkpoint}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand; returns the exit code (2 after a mistake)."""
  argv = sys.argv[1:] if argv is None else argv
  if argv and argv[0] in WITH_CONFIG:
    return command_line.exit_on_mistake(lambda: WITH_CONFIG[argv[0]](argv[1:]))
  parser = argparse.ArgumentParser(
    prog=command_line.program(), description="Checkpoints out, in, and looked into."
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  commands.add_parser("export", help="a trained model as a diffusers folder; see export --help")
  commands.add_parser(
    "import", help="a base model as an Orbax tree, for repeated starts; see import --help"
  )
  command = commands.add_parser(
    "inspect", help="a checkpoint's tensors, where they go, and what does not fit"
  )
  command.add_argument("folder", help="a diffusers pipeline, or one network's folder")
  command.add_argument("--variant", default="", help="which files to prefer, for example fp16")
  command.set_defaults(run=inspect)
  args = parser.parse_args(argv)
  try:
    return args.run(args)
  except ConversionError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
