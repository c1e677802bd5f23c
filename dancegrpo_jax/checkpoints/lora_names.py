"""The names of tensors in LoRA files: what each tensor is, and which layers of the network it is
for.

    unet.down_blocks.0.attentions.0....attn1.to_q.lora_A.weight              diffusers
    ....attn1.processor.to_q_lora.down.weight                                diffusers, older
    base_model.model.down_blocks.0....attn1.to_q.lora_A.default.weight       peft
    lora_unet_down_blocks_0_attentions_0_..._attn1_to_q.lora_down.weight     kohya
    diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight            ComfyUI
    double_blocks.0.processor.qkv_lora1.down.weight                          XLabs
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from dancegrpo_jax.conversion.table import Spec, Table, expected_sources, fill, match_name

Shape = tuple[int, ...]

# Prefixes that say of which network of a pipeline the layer is, or who wrapped it. Any may be
# followed by another.
_PREFIX = re.compile(
  r"(?:base_model\.model|model\.diffusion_model|diffusion_model|unet|transformer|module|_orig_mod)\."
  r"|(?:lora_unet|lora_transformer|lycoris)_"
)
_TEXT_ENCODER = re.compile(
  r"text_encoders?(?:_\d)?[._]|(?:lora_)?te\d?[._]|text_model[._]|cond_stage_model\.|conditioner\."
)
_FACTOR = re.compile(
  r"(?P<layer>.+?)[._]"
  r"(?:lora_(?P<letter>A|B|down|up)(?:\.(?!weight$)[\w-]+)?"
  r"|lora(?:_linear_layer)?(?P<stream>\d?)\.(?P<word>down|up))"
  r"\.weight"
)
# diffusers' older files have the alpha of `to_q` as `to_q.alpha`, `to_q.lora.alpha` or
# `to_q_lora.down.weight.alpha`.
_ALPHA = re.compile(
  r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?(?P<stream>\d?)(?:\.(?:down|up)\.weight)?"
  r"|\.lora_(?:A|B|down|up)(?:\.\w+)?)?\.alpha"
)
_ROLES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# What is in files of other kinds of adapters, by what the message calls them.
_OTHER_KINDS = {
  "DoRA (magnitude vectors)": r"lora_magnitude_vector|dora_scale",
  "LoRA biases": r"lora_(?:B|up)\b.*\.bias$|lora\.up\.bias$",
  "a core tensor between the factors (lora_mid)": r"lora_mid\b",
  "LoHa": r"\bhada_",
  "LoKr": r"\blokr_",
  "OFT": r"\boft_",
  "whole differences of weights (diff)": r"\.(?:diff|diff_b|w_norm|b_norm)$",
  "adapters of embeddings": r"lora_embedding_",
}


class Name(NamedTuple):
  """What a tensor's name says.

  Attributes:
    role: "down" (lora_A), "up" (lora_B), "alpha", "text" (of a text encoder), or "" (nothing that
      is known).
    layer: the layer's name without prefixes; of a known layer, as `pieces` takes it.
  """

  role: str
  layer: str


class Piece(NamedTuple):
  """The outputs `start` to `stop` of a layer of a file, which are a layer of the network.

  Attributes:
    module: the network's layer.
    start, stop: of the outputs.
    halves_swapped: whether the first half of them is the second half in the network.
  """

  module: str
  start: int
  stop: int
  halves_swapped: bool = False


class Layers(NamedTuple):
  """The layers of a network that can have adapters.

  Attributes:
    table: of the network.
    shapes: of the layers' weights in the file's order of axes, by the name of the layer.
    paths: of the layers' kernels among the network's parameters, likewise.
    by_key: the names of the layers, by the name with "_" for ".".
  """

  table: Table
  shapes: dict[str, Shape]
  paths: dict[str, str]
  by_key: dict[str, str]


def layers_of(table: Table, params: dict[str, Spec]) -> Layers:
  """The layers of a network that can have adapters: dense ones and convolutions.

  Args:
    table: of the network.
    params: its parameters, by path.
  """
  shapes, paths = {}, {}
  for path, spec in params.items():
    if path.endswith("/kernel"):
      for name, tensor in expected_sources(table, {path: spec}).items():
        module = name.removesuffix(".weight")
        shapes[module], paths[module] = tensor.shape, path
  by_key = {_key(module): module for module in shapes}
  return Layers(table=table, shapes=shapes, paths=paths, by_key=by_key)


def _key(name: str) -> str:
  return name.replace(".processor.", ".").replace(".", "_")


def pieces(layers: Layers, name: str) -> tuple[Piece, ...]:
  """Which layers of the network a file's layer is; () where it is none.

  Args:
    layers: of the network.
    name: of the layer, without prefixes.
  """
  key = _key(name)
  key = f"{key}_0" if key.endswith("to_out") else key  # older files leave out the 0
  if key in layers.by_key:
    module = layers.by_key[key]
    return (Piece(module, 0, layers.shapes[module][0]),)
  for known in layers.table.lora_names:
    indices = match_name(_key(known.source), key)
    if indices is not None:
      modules = [fill(module, indices) for module in known.modules]
      return _consecutive(layers.shapes, modules, known.halves_swapped)
  return ()


def _consecutive(
  shapes: dict[str, Shape], modules: list[str], halves_swapped: bool
) -> tuple[Piece, ...]:
  """Pieces whose outputs lie one after another; () where the network lacks one of the layers."""
  if any(module not in shapes for module in modules):
    return ()
  found, start = [], 0
  for module in modules:
    stop = start + shapes[module][0]
    found.append(Piece(module, start, stop, halves_swapped))
    start = stop
  return tuple(found)


def parse(layers: Layers, name: str) -> Name:
  """What the name of a tensor says."""
  factor, alpha = _FACTOR.fullmatch(name), _ALPHA.fullmatch(name)
  if factor:
    role = _ROLES[factor["letter"] or factor["word"]]
    layer = factor["layer"] + (factor["stream"] or "")
  elif alpha:
    role, layer = "alpha", alpha["layer"] + (alpha["stream"] or "")
  else:
    role, layer = "", name
  for bare in _without_prefixes(layer, f"{layers.table.lora_prefix}."):
    if pieces(layers, bare):
      return Name(role, bare)
    if _TEXT_ENCODER.match(bare):
      return Name("text", bare)
  return Name(role, bare)


def _without_prefixes(name: str, own: str) -> Iterator[str]:
  """The name, then the name without its first prefix, and so on.

  Args:
    name: of a layer.
    own: the prefix of the network.
  """
  yield name
  while name.startswith(own) or _PREFIX.match(name):
    prefix = _PREFIX.match(name)
    name = name.removeprefix(own) if prefix is None else name[prefix.end() :]
    yield name


def other_kind(name: str) -> str:
  """What kind of adapter a tensor belongs to that is not implemented; "" where it isn't known."""
  return next((kind for kind, form in _OTHER_KINDS.items() if re.search(form, name)), "")
