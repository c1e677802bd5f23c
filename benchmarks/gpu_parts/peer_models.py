"""The PyTorch side: diffusers' networks from the published JSON files with random weights.

Inputs have the same batch sizes as this project's.
"""

import contextlib
import json

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from gpu_parts import cuts

CLASSES = {"sd": (UNet2DConditionModel, "unet"), "flux": (FluxTransformer2DModel, "transformer")}


def device() -> str:
  """The device on which PyTorch computes."""
  return "cuda" if torch.cuda.is_available() else "cpu"


def description(model: str, tiny: bool) -> dict:
  """The network's config.json."""
  kind = CLASSES[model][1]
  folder = (
    cuts.ROOT / "assets" / (cuts.RANDOM[model] if tiny else f"published/{cuts.PUBLISHED[model]}")
  )
  return json.loads((folder / kind / "config.json").read_text())


def network(model: str, tiny: bool, dtype: torch.dtype) -> torch.nn.Module:
  """A network with PyTorch's random weights, made on the device that computes."""
  before = torch.get_default_dtype()
  torch.set_default_dtype(dtype)  # so that no float32 copy of 12 B parameters is made on the way
  try:
    with torch.device(device()):
      made = CLASSES[model][0].from_config(description(model, tiny))
  finally:
    torch.set_default_dtype(before)
  return made.to(dtype)


def inputs(model: str, made: torch.nn.Module, tiny: bool, rows: int, dtype: torch.dtype) -> dict:
  """A batch of inputs: 512x512 and 77 tokens for Stable Diffusion, 720x720 and 512 for FLUX."""
  given, said = {"device": device(), "dtype": dtype}, made.config
  time = torch.full((rows,), 0.5 if model == "flux" else 500.0, **given)
  if model == "sd":
    side, tokens = (8, 16) if tiny else (64, 77)
    latents = torch.randn(rows, said.in_channels, side, side, **given)
    text = torch.randn(rows, tokens, said.cross_attention_dim, **given)
    return {
      "sample": latents,
      "timestep": time,
      "encoder_hidden_states": text,
      "return_dict": False,
    }
  side, tokens = (4, 16) if tiny else (45, 512)
  places = torch.zeros(side, side, 3, device=device())
  places[..., 1] += torch.arange(side, device=device())[:, None]
  places[..., 2] += torch.arange(side, device=device())[None]
  return {
    "hidden_states": torch.randn(rows, side * side, said.in_channels, **given),
    "encoder_hidden_states": torch.randn(rows, tokens, said.joint_attention_dim, **given),
    "pooled_projections": torch.randn(rows, said.pooled_projection_dim, **given),
    "timestep": time,
    "guidance": torch.full((rows,), 3.5, **given),
    "img_ids": places.reshape(-1, 3),
    "txt_ids": torch.zeros(tokens, 3, device=device()),
    "return_dict": False,
  }


def channels_last(given: dict) -> dict:
  """The inputs with latents in the memory order that cuDNN prefers."""
  return given | {"sample": given["sample"].to(memory_format=torch.channels_last)}


def compiled(made: torch.nn.Module) -> torch.nn.Module:
  """The network compiled as a whole."""
  return torch.compile(made)


def compiled_blocks(made: torch.nn.Module) -> torch.nn.Module:
  """Another network with the same weights and compiled blocks, as diffusers advises.

  Each kind of block is compiled once. Compilation changes a network in place, so the eager
  measurement keeps a network for itself.
  """
  with torch.device("meta"):
    other = type(made).from_config(made.config)
  other.load_state_dict(made.state_dict(), assign=True)
  other.eval().compile_repeated_blocks()
  return other


def forward(made: torch.nn.Module, given: dict):
  """Returns `() -> output`, without a gradient."""

  def call():
    with torch.no_grad():
      return made(**given)[0]

  return call


def trainable(model: str, tiny: bool) -> torch.nn.Module:
  """The trained network: all weights of Stable Diffusion in float32, or adapters for FLUX.

  The adapters have rank 128; FLUX's weights are in bfloat16.
  """
  if model == "sd":
    return network(model, tiny, torch.float32).train()
  return adapted(network(model, tiny, torch.bfloat16), 4 if tiny else 128)


def adapted(made: torch.nn.Module, rank: int) -> torch.nn.Module:
  """The network with adapters on the layers that the recipe adapts.

  Only the adapters have gradients.
  """
  from peft import LoraConfig

  made.requires_grad_(False)
  made.add_adapter(
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
  )
  for parameter in made.parameters():
    if parameter.requires_grad:
      parameter.data = parameter.data.float()
  return made.train()


def step(made: torch.nn.Module, given: dict):
  """Returns `() -> loss` of a microbatch, with a forward and a backward pass.

  Both run under bfloat16 autocast. Gradients are accumulated, and there is no optimizer step.
  """

  def call():
    with torch.autocast(device(), torch.bfloat16):
      loss = made(**given)[0].float().square().mean()
    loss.backward()
    return loss.detach()

  return call


def checkpoint(made: torch.nn.Module, wanted: bool) -> None:
  """Turns the recomputation of blocks in the backward pass on or off."""
  made.enable_gradient_checkpointing() if wanted else made.disable_gradient_checkpointing()


def wait(result) -> None:
  """Waits until the device has finished all work."""
  del result
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def peak() -> int | None:
  """The most bytes that PyTorch has used since `free`."""
  return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def free() -> None:
  """Returns the memory that PyTorch does not use to the GPU, and resets the peak."""
  import gc

  gc.collect()
  with contextlib.suppress(Exception):  # nothing to give back where no GPU is
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
