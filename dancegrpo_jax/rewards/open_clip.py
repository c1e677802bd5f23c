"""The open_clip_config.json of a checkpoint: its network as the config.json of a CLIPModel, and how
its images are prepared.

The keys and their defaults are those of open_clip's CLIPVisionCfg, CLIPTextCfg, CLIP and
image_transform_v2.
"""

from typing import Any

from dancegrpo_jax import published
from dancegrpo_jax.rewards.preprocess import MEAN, MODES, STD, Preprocessing

FILE = "open_clip_config.json"
_TOP = published.Keys(used={"model_cfg": None, "preprocess_cfg": {}})
_MODEL = published.Keys(
  used={"embed_dim": None, "quick_gelu": False, "vision_cfg": None, "text_cfg": None},
  neutral={
    "init_logit_bias": (None,),
    "nonscalar_logit_scale": (False,),
    "multimodal_cfg": (None,),
  },
  harmless={
    "custom_text": "the text tower's tensors have names of their own, which are read",
    "init_logit_scale": "where training starts",
    "output_dict": "the form of the network's result",
    "cast_dtype": "the dtype is the config's",
    "model_type": "a note",
  },
)
# What both towers may have and these towers do not.
_NO_PARTS: dict[str, tuple[Any, ...]] = {
  "ls_init_value": (None,),
  "act_kwargs": (None, {}),
  "norm_kwargs": (None, {}, {"eps": 1e-5}),
  "block_type": (None, "default"),
  "qk_norm": (False,),
  "scaled_cosine_attn": (False,),
  "scale_heads": (False,),
  "scale_attn_inner": (False,),
  "scale_attn": (False,),
  "scale_fc": (False,),
  "final_ln_after_pool": (False,),
}
_VISION = published.Keys(
  used={
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "layers": 12,
    "head_width": 64,
    "mlp_ratio": 4.0,
  },
  neutral=_NO_PARTS
  | {
    "attentional_pool": (False, None, ""),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "global_average_pool": (False,),
    "input_patchnorm": (False,),
    "timm_model_name": (None, ""),
  },
  harmless={
    "patch_dropout": "of training",
    "output_tokens": "the score takes the pooled state alone",
    "attn_pooler_queries": "of attentional_pool",
    "attn_pooler_heads": "of attentional_pool",
    "n_queries": "of attentional_pool",
  }
  | dict.fromkeys(
    (
      "timm_model_pretrained",
      "timm_pool",
      "timm_proj",
      "timm_proj_bias",
      "timm_drop",
      "timm_drop_path",
    ),
    "of timm_model_name",
  ),
  types={"image_size": (int, list), "layers": (int, list)},
)
_TEXT = published.Keys(
  used={
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
  },
  neutral=_NO_PARTS
  | {
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "pool_type": ("argmax",),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "hf_tokenizer_name": (None, ""),
    "tokenizer_mode": (None, "clip"),
    "tokenizer_kwargs": (None, {}),
    "hf_model_name": (None, ""),
  },
  harmless={
    "pad_id": "what is behind the end of a text doesn't count",
    "eos_id": "of pool_type 'eos'",
    "output_tokens": "the score takes the pooled state alone",
    "hf_model_pretrained": "of hf_model_name",
    "hf_proj_type": "of hf_model_name",
    "hf_pooler_type": "of hf_model_name",
  },
)
_PREPROCESS = published.Keys(
  used={
    "size": None,
    "mean": None,
    "std": None,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
  },
  neutral={"mode": ("RGB",), "fill_color": (0,)},
  types={"interpolation": (str, type(None)), "resize_mode": (str, type(None))},
)


def _section(name: str, given: Any, keys: published.Keys) -> dict[str, Any]:
  """The values of a section that are used.

  Raises:
    ValueError: the section is missing, or has a key or a value that is not implemented.
  """
  if not isinstance(given, dict):
    raise ValueError(f"{FILE}: {name} = {given!r}; expected an object")
  return published.read(f"{FILE}, {name}", given, keys)


def _whole(name: str, section: dict[str, Any], keys: tuple[str, ...]) -> None:
  """Raises ValueError where a value is no positive integer, as the layers of a ResNet are."""
  for key in keys:
    if not isinstance(section[key], int) or section[key] < 1:
      raise ValueError(f"{FILE}, {name}: {key} = {section[key]!r} is no positive integer")


def clip_config(model_cfg: Any) -> dict[str, Any]:
  """The config.json of a CLIPModel for the network that open_clip's `model_cfg` describes.

  Raises:
    ValueError: the network is not implemented, or the file names none; one line with keys and
      values.
  """
  model = _section("model_cfg", model_cfg, _MODEL)
  vision = _section("vision_cfg", model["vision_cfg"], _VISION)
  text = _section("text_cfg", model["text_cfg"], _TEXT)
  vision["image_size"] = _side(vision["image_size"])
  _whole("model_cfg", model, ("embed_dim",))
  _whole("vision_cfg", vision, ("image_size", "patch_size", "width", "layers", "head_width"))
  _whole("text_cfg", text, ("context_length", "vocab_size", "width", "layers", "heads"))

  def tower(cfg: dict[str, Any], heads: int) -> dict[str, Any]:
    return {
      "hidden_size": cfg["width"],
      "intermediate_size": int(cfg["width"] * cfg["mlp_ratio"]),
      "num_hidden_layers": cfg["layers"],
      "num_attention_heads": heads,
      "hidden_act": "quick_gelu" if model["quick_gelu"] else "gelu",
      "layer_norm_eps": 1e-5,
    }

  return {
    "projection_dim": model["embed_dim"],
    "vision_config": {
      **tower(vision, vision["width"] // vision["head_width"]),
      "image_size": vision["image_size"],
      "patch_size": vision["patch_size"],
      "num_channels": 3,
    },
    "text_config": {
      **tower(text, text["heads"]),
      "vocab_size": text["vocab_size"],
      "max_position_embeddings": text["context_length"],
      # With this value ClipText pools at the highest id of the row, as open_clip does.
      "eos_token_id": 2,
    },
  }


def _side(size: Any) -> Any:
  """The side of a square that is given as one number or as two equal ones."""
  if isinstance(size, (list, tuple)) and len(set(size)) == 1:
    return size[0]
  return size


def preprocessing(given: dict[str, Any]) -> Preprocessing:
  """How the images of a checkpoint are prepared, by its open_clip_config.json.

  Raises:
    ValueError: a value is not implemented, or does not fit the network.
  """
  top = published.read(FILE, given, _TOP)
  section = _section("preprocess_cfg", top["preprocess_cfg"] or {}, _PREPROCESS)
  size = _side(_section("vision_cfg", top["model_cfg"]["vision_cfg"], _VISION)["image_size"])
  mode = section["resize_mode"] or "shortest"
  interpolation = section["interpolation"] or "bicubic"
  if mode not in MODES or interpolation != "bicubic":
    raise ValueError(
      f"{FILE}: resize_mode = {mode!r}, interpolation = {interpolation!r} are not supported;"
      f" {', '.join(MODES)} with bicubic are"
    )
  given_size = _side(section["size"])
  if given_size not in (None, size):
    raise ValueError(f"{FILE}: size = {given_size!r} is not the tower's image_size, {size}")
  return Preprocessing(
    size=size,
    mode=mode,
    crop="round",
    mean=tuple(section["mean"] or MEAN),
    std=tuple(section["std"] or STD),
  )
