"""Devices that programs can be compiled for on a machine without them: TPUs and NVIDIA GPUs."""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from dancegrpo_jax.devices import gpu_topologies
from dancegrpo_jax.errors import ConfigError

# An example for each chip. A shape gives the chips along the two (v5e, v6e) or three axes of the
# network, in multiples of a host's 2 x 2.
KNOWN = {"v4": "v4:4x4x4", "v5e": "v5e:2x4", "v5p": "v5p:4x4x4", "v6e": "v6e:8x8"}


def devices(topology: str) -> list:
  """The devices of a topology. Programs can be compiled for them, but they hold no data.

  Args:
    topology: as "v5p:4x4x4" or "h100:8".

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
  is_shape = re.fullmatch(r"\w+:\d+x\d+(x\d+)?", topology)
  known = ", ".join(KNOWN.values())
  if not is_shape or card not in KNOWN:
    cards = " or ".join(f"{name}:8" for name in gpu_topologies.CARDS)
    raise ConfigError(
      f"--topology={topology}: unknown; CHIP:SHAPE with chips {', '.join(KNOWN)}, as {known}, or"
      f" {cards}"
    )
  # Otherwise libtpu tries for minutes to reach Google Cloud's metadata server.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # Without these two libtpu logs errors about an unknown machine. Their values do not matter.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  # No TPU is touched, so other processes may use it, or plan at the same time.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  options = {}
  if card == "v4":  # both cores of a chip as one device, as JAX runs them
    options["chip_config_name"] = "megacore"
  try:
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return list(description.devices)
  except (RuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ConfigError(
      f"--topology={topology}: libtpu refuses it ({reason}); it knows shapes such as {known}"
    ) from error
