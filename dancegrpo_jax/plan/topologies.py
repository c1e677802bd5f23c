"""Devices that programs can be compiled for without having them: a TPU topology out of libtpu, or
NVIDIA GPUs.
"""

import importlib.util
import os
import re

import jax

from dancegrpo_jax.devices import gpu_topologies
from dancegrpo_jax.errors import ConfigError

# Examples of shapes: chips along the axes of the network, two of them (v5e, v6e) or three;
# multiples of a host's 2 x 2.
KNOWN = {"v4": "v4:4x4x4", "v5e": "v5e:2x4", "v5p": "v5p:4x4x4", "v6e": "v6e:8x8"}


def devices(topology: str) -> list:
  """The devices of a topology, as "v5p:4x4x4" or "h100:8". They can be compiled for and hold no
  data.

  Raises:
    ConfigError: the compiler is not installed, or does not know the topology.
  """
  card, _, count = topology.partition(":")
  if card in gpu_topologies.CARDS and re.fullmatch("[1-9][0-9]*", count):
    return gpu_topologies.devices(card, int(count))
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      f"--topology={topology}: needs the TPU compiler; pip install 'jax[tpu]=={jax.__version__}'"
    )
  found = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", topology)
  known = ", ".join(KNOWN.values())
  if found is None or found[1] not in KNOWN:
    cards = " or ".join(f"{name}:8" for name in gpu_topologies.CARDS)
    raise ConfigError(
      f"--topology={topology}: unknown; CHIP:SHAPE with chips {', '.join(KNOWN)}, as {known}, or"
      f" {cards}"
    )
  os.environ.setdefault(
    "TPU_SKIP_MDS_QUERY", "1"
  )  # else libtpu asks Google Cloud's metadata server who it is, for minutes
  # Without these two it complains, as of an error, that it doesn't know what machine it is on. Any
  # will do.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault(
    "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
  )  # no TPU is touched: others may use it, or plan at the same time
  from jax.experimental import topologies

  options = (
    {"chip_config_name": "megacore"} if found[1] == "v4" else {}
  )  # one device a chip, as it runs
  try:
    return list(
      topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    )
  except (RuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ConfigError(
      f"--topology={topology}: libtpu refuses it ({reason}); shapes it knows are such as {known}"
    ) from error
