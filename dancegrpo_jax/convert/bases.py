"""What is known of the base model of a run: its id on the hub, and its licence."""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import hub
from dancegrpo_jax.pipelines.layout import RANDOM, is_random, local_path, without_mark


class Base(NamedTuple):
  """A base model. What is not known is "".

  Attributes:
    name: how the card calls it: its hub id, or its folder without the folders of this machine.
    hub_id: on the Hugging Face hub.
    license: the identifier that the hub has for it, as "apache-2.0", or "other".
    license_name, license_link: of a licence that is "other".
    source: where the licence is from.
    architecture: the identifier in Stability AI's ModelSpec and in kohya's files.
  """

  name: str
  hub_id: str = ""
  license: str = ""
  license_name: str = ""
  license_link: str = ""
  source: str = ""
  architecture: str = ""


def _known(hub_id: str, license: str, architecture: str, name: str = "", link: str = "") -> Base:
  """A model of the hub, whose page there names its licence."""
  page = f"https://huggingface.co/{hub_id}"
  return Base(
    name=hub_id,
    hub_id=hub_id,
    license=license,
    license_name=name,
    license_link=f"{page}/{link}" if link else "",
    source=f"[its page]({page})",
    architecture=architecture,
  )


_V1, _V2 = "stable-diffusion-v1", "stable-diffusion-v2"
_HUNYUAN = "tencent-hunyuan-community"
_FLUX_DEV = "flux-1-dev-non-commercial-license"
KNOWN = {
  base.hub_id: base
  for base in (
    _known("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m", _V1),
    _known("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m", _V1),
    _known("stabilityai/stable-diffusion-2-base", "openrail++", f"{_V2}-512"),
    _known("stabilityai/stable-diffusion-2", "openrail++", f"{_V2}-768-v"),
    _known("stabilityai/stable-diffusion-2-1-base", "openrail++", f"{_V2}-512"),
    _known("stabilityai/stable-diffusion-2-1", "openrail++", f"{_V2}-768-v"),
    _known(
      "black-forest-labs/FLUX.1-dev", "other", "flux-1-dev", _FLUX_DEV, "blob/main/LICENSE.md"
    ),
    _known("black-forest-labs/FLUX.1-schnell", "apache-2.0", "flux-1-schnell"),
    # The same weights for diffusers; Tencent's page has the licence.
    _known(
      "tencent/HunyuanVideo", "other", "hunyuan-video", _HUNYUAN, "blob/main/LICENSE"
    )._replace(
      name="hunyuanvideo-community/HunyuanVideo", hub_id="hunyuanvideo-community/HunyuanVideo"
    ),
  )
}


def base_of(config: ConfigDict, trained_from: str) -> Base:
  """What is known of a run's base model.

  Args:
    config: of the export; its `model.checkpoint` is the base as it is found now.
    trained_from: the `model.checkpoint` that the run had.
  """
  if trained_from in KNOWN and not local_path(trained_from).is_dir():
    return KNOWN[trained_from]
  if is_random(trained_from):
    return Base(f"random weights in the networks of {published_name(without_mark(trained_from))}")
  cached = not local_path(trained_from).is_dir() and hub.is_cached(
    trained_from, loading.family_of(config).layout
  )
  base = Base(published_name(trained_from), hub_id=trained_from if cached else "")
  return _with_license(base, loading.checkpoint_folder(config) / "README.md")


def published_name(path: str) -> str:
  """A path without the folders of this machine: as it is where it is relative, else its end."""
  return Path(path).name if Path(path).is_absolute() or ".." in Path(path).parts else path


def _with_license(base: Base, readme: Path) -> Base:
  """The base with the licence that its own card names, where it has one."""
  from huggingface_hub import ModelCard

  if not readme.is_file():
    return base
  try:
    data = ModelCard.load(readme, ignore_metadata_errors=True).data
  except (ValueError, OSError):
    return base
  if not isinstance(data.license, str) or data.license == "unknown":
    return base
  return base._replace(
    license=data.license,
    license_name=data.license_name or "",
    license_link=data.license_link or "",
    source="its README.md",
  )


def loadable(config: ConfigDict, base: Base) -> str:
  """What `from_pretrained` takes for the base."""
  return base.hub_id or published_name(config.model.checkpoint.removeprefix(RANDOM))
