"""The flag --checkpoint of `sample`, `evaluate` and `convert export`, which takes the place of
--config.
"""

import argparse

from ml_collections import ConfigDict

from dancegrpo_jax.devices import accelerator

METAVAR = "WORKDIR[@ITERATION]"


def add(parser: argparse.ArgumentParser, default: str | None, base: str = "") -> None:
  """Adds the flag.

  Args:
    parser: of the command.
    default: its value where it is not given; None where it must be.
    base: what the help says about the value "base".
  """
  parser.add_argument(
    "--checkpoint",
    metavar=METAVAR,
    default=default,
    required=default is None,
    help="a run's workdir, whose config is used where --config is not given; @ITERATION takes an"
    f" earlier checkpoint than the last one{base}",
  )


def config_of(flags: argparse.Namespace) -> ConfigDict | None:
  """The config that is stored with the checkpoint; None for the base model.

  Raises:
    ConfigError: there is no such checkpoint, or a module that its config names is not found.
  """
  accelerator.start()
  # Imported now: JAX takes a second, and a misspelt flag should be answered at once.
  from dancegrpo_jax.checkpoints import chosen

  return (
    None if flags.checkpoint == chosen.BASE else chosen.config_of(chosen.find(flags.checkpoint))
  )
