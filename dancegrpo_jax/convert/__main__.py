"""Command: inspects, exports and imports checkpoints.

    python -m dancegrpo_jax.convert inspect FOLDER|FILE [--config=...] [--allow_pickle]
    python -m dancegrpo_jax.convert export --checkpoint=runs/x[@ITERATION] --out=DIR
        [--part=denoiser|lora] [--weights=ema|raw] [--dtype=bfloat16]
    python -m dancegrpo_jax.convert merge --config=... --lora=FILE --out=DIR
        [--part=denoiser] [--strength=1.0] [--dtype=bfloat16]
    python -m dancegrpo_jax.convert import --config=... --out=DIR
    python -m dancegrpo_jax.convert import-single FILE --base=FOLDER --out=DIR
        [--dtype=float32] [--allow_pickle]

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

`import-single` makes a diffusers folder of a Stable Diffusion or FLUX checkpoint in a single file.
FOLDER is a folder or hub id of a model with the same networks, whose config files, tokenizers and
scheduler are taken, and the networks that the file does not hold.
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
from dancegrpo_jax.checkpoints import flag, hub, recognition, store, views, weights
from dancegrpo_jax.checkpoints.networks import NETWORKS, abstract_params, class_name
from dancegrpo_jax.conversion.mapping import describe, match
from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.conversion.tables.clip import OPEN_CLIP
from dancegrpo_jax.errors import ConversionError, listed
from dancegrpo_jax.pipelines import families
from dancegrpo_jax.pipelines.layout import INDEX, Network
from dancegrpo_jax.report.progress import Progress
from dancegrpo_jax.rewards import kinds, open_clip
from dancegrpo_jax.settings import command_line, config_file
from dancegrpo_jax.types import PyTree


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
  names = dict.fromkeys(map(kinds.reward_of, kinds.scored(config)))
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
  if (folder / open_clip.FILE).is_file():
    return [folder], []
  places = [folder / place for place in known.folders]
  if places and all((place / "config.json").is_file() for place in places):
    return places, []
  if not (folder / INDEX).is_file():
    content = "no such folder"
    if folder.is_dir():
      content = listed(sorted(path.name for path in folder.iterdir()), 12)
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
  if (folder / hub.ORBAX).is_dir():
    raise ConversionError(
      f"{folder}: a folder of `convert import`, whose weights are an Orbax tree; inspect"
      f" {store.read_meta(folder / hub.ORBAX)['checkpoint']}, from which it was made"
    )
  folders = [folder / name for name, kind in parts.items() if kind in known.networks]
  return folders, [
    f"{name} ({kind}): not a network that is converted"
    for name, kind in parts.items()
    if kind not in known.networks
  ]


class Target(NamedTuple):
  """A network whose files are inspected.

  Attributes:
    name: of its class.
    table: the parameters that the tensors become.
    abstract: the tree of the parameters' shapes and dtypes.
  """

  name: str
  table: Table
  abstract: PyTree


def target_of(folder: Path, known: Known) -> Target:
  """The network that a folder's JSON file describes.

  Raises:
    ConversionError: the class, or a value in the file, is not implemented.
  """
  if (folder / "config.json").is_file() or not (folder / open_clip.FILE).is_file():
    config = weights.read_config(folder)
    abstract, name = abstract_params(config, known.networks), class_name(config)
    return Target(name=name, table=known.networks[name].table, abstract=abstract)
  try:
    config = open_clip.clip_config(weights.read_config(folder, open_clip.FILE).get("model_cfg"))
  except ValueError as error:
    raise ConversionError(str(error)) from error
  return Target(name="open_clip", table=OPEN_CLIP, abstract=NETWORKS["CLIPModel"].abstract(config))


def inspect(args: argparse.Namespace) -> int:
  """Prints the mapping of every network in the folder, then every problem.

  Returns:
    The exit code: 2 if there are problems, else 0.

  Raises:
    ConfigError, ConversionError: there is nothing to inspect.
  """
  known, path = known_with(args.config), installation.find(args.folder)
  if path.is_file():
    return inspect_file(path, args)
  folders, skipped = components(path, known)
  problems = []
  for folder in folders:
    try:
      target = target_of(folder, known)
      with weights.open_reader(
        folder, args.variant, args.allow_pickle, target.table.file, flag="--allow_pickle"
      ) as reader:
        view = views.of_network(reader, target.table, weights.specs(target.abstract))
        specs = view.tensors.specs
        mapping, misfits = match(target.table, specs, weights.specs(target.abstract))
        kind = recognition.other_kind(reader.specs, target.table.name)
    except ConversionError as error:
      message = str(error)
      problems.append(message if str(folder) in message else f"{folder}: {message}")
      continue
    count = f"{len(mapping.sources)} tensors, {len(mapping.targets)} parameters"
    print(f"# {folder} ({target.name}): {count}")
    if view.title:
      print(f"# its file is {view.title}; the names below are those of {target.name}")
    for tensor, shape, dtype, destination in describe(mapping):
      print(f"{tensor}\t{list(shape)}\t{dtype}\t{destination}")
    for tensor in sorted(specs.keys() - mapping.sources.keys()):
      print(f"# {tensor}: left out; it is a copy or belongs to another network")
    if misfits and kind is not None:
      problems.append(f"{folder}: it looks like {kind.title}")
    problems += [f"{folder}: {misfit}" for misfit in view.problems or misfits]
  for line in skipped:
    print(f"# {line}")
  if problems:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"{count}:", *problems, sep="\n  ", file=sys.stderr)
  return 2 if problems else 0


def inspect_file(file: Path, args: argparse.Namespace) -> int:
  """Prints what a weight file looks like, and its tensors. It always returns 0.

  Raises:
    ConversionError: the file can't be read.
  """
  with weights.open_reader(file, allow_pickle=args.allow_pickle, flag="--allow_pickle") as reader:
    kind = recognition.kind_of(reader.specs)
    looks = f"it looks like {kind.title}" if kind else "nothing that is known"
    print(f"# {file}: {len(reader.specs)} tensors; {looks}")
    for name, spec in reader.specs.items():
      print(f"{name}\t{list(spec.shape)}\t{spec.dtype.name}")
  return 0


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
    " with dtype=",
  )


def _add_allow_pickle(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--allow_pickle",
    action="store_true",
    help="read .bin, .pt, .pth and .ckpt through torch's weights_only loader",
  )


def import_single(args: argparse.Namespace) -> int:
  """Runs `import-single` and returns 0. Its errors are those of `single_file.make_folder`."""
  from dancegrpo_jax.convert import single_file  # late, as in `export`

  single_file.make_folder(
    installation.find(args.file),
    args.base,
    Path(args.out),
    dtype=args.dtype,
    allow_pickle=args.allow_pickle,
    variant=args.variant,
  )
  return 0


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
  command.add_argument("folder", help="a checkpoint, one network's folder, or a weight file")
  command.add_argument(
    "--config",
    default="",
    metavar="FILE[:preset]",
    help="needed for networks of a family or a reward that this config names as module:object",
  )
  command.add_argument("--variant", default="", help="which files to prefer, for example fp16")
  _add_allow_pickle(command)
  command.set_defaults(run=inspect)
  command = commands.add_parser(
    "import-single", help="a folder of a Stable Diffusion or FLUX checkpoint in a single file"
  )
  command.add_argument("file", help="the checkpoint: .safetensors, or a pickle as .ckpt")
  command.add_argument(
    "--base",
    required=True,
    help="a folder or hub id of a model with the same networks, for config files, tokenizers,"
    " scheduler, and the networks that the file does not hold",
  )
  command.add_argument("--out", required=True, help="folder to write; must not exist")
  command.add_argument("--variant", default="", help="which files of the base to prefer, as fp16")
  _add_dtype(command)
  _add_allow_pickle(command)
  command.set_defaults(run=import_single)
  args = parser.parse_args(argv)
  try:
    return args.run(args)
  except (errors.ConfigError, ConversionError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
