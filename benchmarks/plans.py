"""Plans the published recipes on TPUs and GPUs, and writes the section of RESULTS.md.

    # All plans, then the section. Takes hours on one core, and 20 GB of memory for the updates of
    # Stable Diffusion on TPUs. Needs libtpu and JAX's CUDA plugin, but no TPU and no GPU.
    python benchmarks/plans.py
    # The named plans, then the section. NAME:update,rollout compiles only these programs and keeps
    # the other programs' rows of earlier calls.
    python benchmarks/plans.py NAME ...
    # The section alone, from the JSON files in benchmarks/plans.
    python benchmarks/plans.py --write

The numbers are the compiler's, or computed from them; nothing was run on a TPU or a GPU.
"""

import json
import subprocess
import sys
from pathlib import Path

import results

HERE = Path(__file__).parent
# Name: (config, topology). A config may be followed by overrides and flags.
PLANS = {
  "flux_hps_v5p_64": ("configs/flux_hps.py", "v5p:4x4x4"),
  "flux_hps_v6e_64": ("configs/flux_hps.py", "v6e:8x8"),
  "flux_hps_lora_v5e_16": ("configs/flux_hps_lora.py:v5e", "v5e:4x4"),
  "hunyuan_videoalign_v5p_64": (
    "configs/hunyuan_videoalign.py --config.mesh.tensor=2",
    "v5p:4x4x4",
  ),
  "hunyuan_videoalign_v6e_64": (
    "configs/hunyuan_videoalign.py --config.mesh.tensor=2",
    "v6e:8x8",
  ),
  "hunyuan_hps_v5p_64": ("configs/hunyuan_hps.py", "v5p:4x4x4"),
  "hunyuan_hps_v6e_64": ("configs/hunyuan_hps.py", "v6e:8x8"),
  "sd_hps_v5e_8": ("configs/sd_hps.py:v5e", "v5e:2x4"),
  "sd_hps_v6e_8": ("configs/sd_hps.py:v5e", "v6e:2x4"),
}
GPU_PLANS = {
  "sd_hps_h100_1": ("configs/sd_hps.py:1gpu", "h100:1"),
  "flux_hps_lora_h100_1": ("configs/flux_hps_lora.py:1gpu", "h100:1"),
  "hunyuan_hps_h100_8": ("configs/hunyuan_hps.py:8gpu", "h100:8"),
  "hunyuan_hps_lora_h100_1": ("configs/hunyuan_hps.py:lora", "h100:1"),
  "flux_hps_h100_8": ("configs/flux_hps.py:8gpu", "h100:8"),
}
ALL = PLANS | GPU_PLANS
HEAD = """## Plans

`python benchmarks/plans.py`: every program of an iteration compiled ahead of time at full size with
the TPU compiler (libtpu {libtpu}, JAX {jax}), on a machine without a TPU and without weights.
**Nothing here was run on a TPU.** Memory is what the compiler allots, with all that stays resident.
"TFLOP" is what the networks' matrix products and convolutions have to compute on all devices
together, without rematerialisation. The times are estimates: the cycles that the compiler expects
of each operation, attention kernels (of which it expects nothing) at half of the chip's peak, and
the collectives' bytes over all links of a chip as if nothing were computed meanwhile. MFU is what
they imply. Compile times are of one core that other work shared.
"""
# Above a plan whose update is a single program, as it was before 0.2.0.
EARLIER = """
**This plan has not been compiled again.** Since then an update is several programs that are called
for a few microbatches at a time, so that a call is short. For TPUs convolutions are written as
matrix products now, and CLIP's layers are stacked.
"""
GPU_HEAD = """## Plans for GPUs

`python benchmarks/plans.py`, with JAX's CUDA plugin (JAX {jax}) on a machine without a GPU and
without weights. **Nothing here was run on a GPU.** Memory is what the compiler allots, with all
that stays resident, beside 92 % of a card's. On a card the compiler tries kernels out and may take
others, and a convolution may be given memory to work in that is missing here. There are no times:
the compiler states none for GPUs.
"""


def run(name: str, only: str) -> int:
  """Makes one plan, or plans some of its programs. Returns the exit code."""
  config, topology = ALL[name]
  flags = [
    *f"--config={config}".split(),
    f"--topology={topology}",
    f"--out={HERE / 'plans' / name}.json",
    f"--only={only}",
  ]
  return subprocess.run(
    [sys.executable, "-m", "dancegrpo_jax.plan", *flags], cwd=HERE.parent
  ).returncode


def page(named: dict[str, tuple[str, str]], head: str) -> str:
  """The heading, then the plans of `named` that have JSON files."""
  sys.path.insert(0, str(HERE.parent))
  from dancegrpo_jax.plan import table

  parts, versions = [], {"libtpu": "?", "jax": "?"}
  for name, (config, topology) in named.items():
    file = HERE / "plans" / f"{name}.json"
    if file.exists():
      result = json.loads(file.read_text())
      versions = result["versions"]
      is_earlier = any(program["name"] == "update" for program in result["rows"])
      title = f"\n### `--config={config} --topology={topology}`\n"
      parts.append(f"{title}{EARLIER if is_earlier else ''}\n{table.report(result)}\n")
  return head.format(**versions) + "".join(parts)


def main(arguments: list[str]) -> int:
  """Makes the requested plans and writes the section.

  Returns 1 where a plan failed or did not fit.
  """
  asked = [] if arguments == ["--write"] else arguments or list(ALL)
  names = {name: only for name, _, only in (word.partition(":") for word in asked)}
  unknown = set(names) - set(ALL)
  if unknown:
    print(
      f"error: no plan {', '.join(sorted(unknown))}; there are {', '.join(ALL)}", file=sys.stderr
    )
    return 2
  codes = [run(name, only) for name, only in names.items()]
  results.write_section("plans", f"{page(PLANS, HEAD)}\n{page(GPU_PLANS, GPU_HEAD)}")
  return int(any(codes))


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except results.ResultsError as error:
    sys.exit(f"error: {error}")
