"""The parts of the benchmark: what they measure, their time limits, and their rows.

Imports no JAX.
"""

from typing import NamedTuple

PROGRAMS = ("rollout", "decode", "score", "update")
KINDS = ("attention", "convolution", "product", "element-wise", "reduction", "copy", "other")
NAMES = {"sd": "Stable Diffusion v1.4", "flux": "FLUX.1-dev, LoRA"}
# Queries, keys, heads, width of a head, batch, whether causal: every attention for which
# docs/gpus.md names cudnn.
ATTENTIONS = {
  "SD self, 4096 tokens, 8 x 40": (4096, 4096, 8, 40, 2, False),
  "SD self, 1024 tokens, 8 x 80": (1024, 1024, 8, 80, 4, False),
  "SD self, 256 tokens, 8 x 160": (256, 256, 8, 160, 8, False),
  "SD self, 64 tokens, 8 x 160": (64, 64, 8, 160, 8, False),
  "SD cross, 4096 to 77, 8 x 40": (4096, 77, 8, 40, 4, False),
  "SD cross, 1024 to 77, 8 x 80": (1024, 77, 8, 80, 8, False),
  "SD cross, 256 to 77, 8 x 160": (256, 77, 8, 160, 8, False),
  "SD cross, 64 to 77, 8 x 160": (64, 77, 8, 160, 8, False),
  "FLUX, 2537 tokens, 24 x 128": (2537, 2537, 24, 128, 1, False),
  "HunyuanVideo's text, 256 tokens, 24 x 128": (256, 256, 24, 128, 4, False),
  "HunyuanVideo, one frame, 2281 tokens, 24 x 128": (2281, 2281, 24, 128, 1, False),
  "Llama, 292 tokens, 32 x 128": (292, 292, 32, 128, 2, True),
  "Llama, 351 tokens, 32 x 128": (351, 351, 32, 128, 2, True),
  "ViT-L, 257 tokens, 16 x 64": (257, 257, 16, 64, 8, False),
  "ViT-H, 257 tokens, 16 x 80": (257, 257, 16, 80, 8, False),
  "CLIP-L text, 77 tokens, 12 x 64": (77, 77, 12, 64, 8, True),
  "CLIP-H text, 77 tokens, 16 x 64": (77, 77, 16, 64, 8, True),
  # The last one, because xla's logits and their gradients take some 64 GB.
  "HunyuanVideo, 53 frames, 12856 tokens, 24 x 128": (12856, 12856, 24, 128, 1, False),
}
_RUNS = (
  "emoji_clip:tiny, ratio/drift_max",
  "emoji_clip:tiny, the same command twice",
  "emoji_clip:tiny, against the CPU",
)
_STARTS = {
  name: (f"{name}: cold", f"{name}: programs cached") for name in ("emoji_clip", "emoji_flow_clip")
}
_PEER = {
  "sd": ("eager", "eager, channels last", "compiled"),
  "flux": ("eager", "compiled blocks"),
}
_TRAINING = {
  "sd": ("eager", "eager, checkpointing", "compiled, checkpointing"),
  "flux": ("eager", "eager, checkpointing"),
}


class Part(NamedTuple):
  """A part of the benchmark, which runs in a process of its own.

  Attributes:
    name: name on the command line. The text before a "-" selects all parts that start with it.
    module: the module whose `run(context)` measures.
    argument: the argument for the module.
    seconds: time limit, after which the process is killed.
    title: title of its table.
    columns: columns of its table, beside the row's name and the note.
    rows: names of the rows that it fills.
    environment: environment variables of the process.
  """

  name: str
  module: str
  argument: str
  seconds: float
  title: str
  columns: tuple[str, ...]
  rows: tuple[str, ...]
  environment: tuple[tuple[str, str], ...] = ()


def _programs(model: str, seconds: float) -> Part:
  columns = ("first call", "time", "MFU", "memory by plan", "peak so far")
  title = f"Programs of {NAMES[model]}"
  return Part(
    f"programs-{model}", "gpu_parts.program_times", model, seconds, title, columns, PROGRAMS
  )


def _main(model: str, seconds: float) -> Part:
  columns = ("time", "rollout", "decode", "reward", "update", "images/s")
  title, rows = f"`main` on {NAMES[model]}", ("first iteration", "second iteration")
  return Part(f"main-{model}", "gpu_parts.main_times", model, seconds, title, columns, rows)


def _kernels(model: str, seconds: float) -> Part:
  columns, title = ("kernels", "launches", *KINDS), f"Kernel times of {NAMES[model]}"
  rows = ("rollout", "update")
  return Part(f"kernels-{model}", "gpu_parts.kernel_times", model, seconds, title, columns, rows)


def _start(name: str, seconds: float) -> Part:
  title = f"From the command to an iteration, `{name}.py`"
  columns = ("first iteration", "afterwards")
  return Part(
    f"start-{name}", "gpu_parts.start_times", name, seconds, title, columns, _STARTS[name]
  )


def _peer(model: str, seconds: float) -> Part:
  rows = ("forward: ours", *(f"forward: diffusers, {kind}" for kind in _PEER[model]))
  rows += ("training: ours", *(f"training: diffusers, {kind}" for kind in _TRAINING[model]))
  title = f"{NAMES[model]} beside PyTorch"
  columns = ("time", "MFU", "PyTorch's peak", "ours is faster by")
  # JAX gives memory back between its calls, so that both frameworks find room on one card.
  environment = (
    ("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
    ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform"),
  )
  return Part(
    f"peer-{model}", "gpu_parts.peer_times", model, seconds, title, columns, rows, environment
  )


CHIP = Part(
  "chip",
  "gpu_parts.chip",
  "",
  30,
  "The chip",
  ("rate",),
  ("bf16 product", "copy, bytes read and written"),
)
ATTENTION = Part(
  "correctness-attention",
  "gpu_parts.attention_errors",
  "",
  140,  # 8 rows took 75 s
  "Attention in bfloat16 against float32: the largest error over the largest number",
  ("kernel", "value", "gradient", "value by xla", "gradient by xla"),
  tuple(ATTENTIONS),
)
RUNS = Part(
  "correctness-runs", "gpu_parts.run_errors", "", 150, "Runs that must agree", ("result",), _RUNS
)
PRECISION = Part(
  "precision-emoji_clip",
  "gpu_parts.precision_times",
  "emoji_clip",
  120,
  "Precision of float32 products, `emoji_clip.py`",
  ("afterwards", "rollout drift"),
  ("emoji_clip: highest", "emoji_clip: default"),
)
# In the order in which they run. With little time left the last ones are lost.
ALL = (
  CHIP,
  ATTENTION,
  _programs("flux", 190),
  _programs("sd", 280),
  _start("emoji_clip", 240),
  _peer("sd", 150),
  _peer("flux", 170),
  _kernels("flux", 70),
  _kernels("sd", 80),
  _main("flux", 100),
  _main("sd", 110),
  PRECISION,
  RUNS,
  _start("emoji_flow_clip", 90),
)
DEFAULT = ("chip", "programs-flux", "programs-sd", "start-emoji_clip", "peer-sd")
DEFAULT_SECONDS, ALL_SECONDS = 6 * 60, 9 * 60  # of all parts together
LEAST = 12  # seconds: no part is started with less time


def choose(words: str) -> tuple[Part, ...]:
  """The parts that --parts selects, in the order in which they run.

  Args:
    words: names of parts or the text before their "-", separated by commas; "all"; or "" for the
      default.

  Raises:
    ValueError: a name is unknown.
  """
  wanted = DEFAULT if not words else words.split(",")
  known = {part.name for part in ALL} | {part.name.partition("-")[0] for part in ALL} | {"all"}
  if unknown := [word for word in wanted if word not in known]:
    raise ValueError(
      f"--parts={words}: no part {', '.join(unknown)}; there are {', '.join(sorted(known))}"
    )
  return tuple(
    part
    for part in ALL
    if "all" in wanted or {part.name, part.name.partition("-")[0]} & set(wanted)
  )


def total_of(words: str, parts: tuple[Part, ...]) -> float:
  """Time limit of the chosen parts together, in seconds."""
  own = sum(part.seconds for part in parts)
  return min(own, {"": DEFAULT_SECONDS, "all": ALL_SECONDS}.get(words, own))
