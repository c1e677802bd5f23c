"""The texts around a prompt with which HunyuanVideo asks its language model to describe a sample.

The states of the tokens before the prompt are cut off afterwards.
"""

from typing import NamedTuple

PLACE = "{}"  # where the prompt goes


class Template(NamedTuple):
  """A text around a prompt.

  Attributes:
    text: with `PLACE` in it, once.
    tokens: the tokens before the prompt with Llama-3's tokenizer, BOS included. Pipelines count
      them with their own tokenizer; this number is for plans, which have none.
  """

  text: str
  tokens: int

  @property
  def before(self) -> str:
    """The text before the prompt."""
    return self.text.partition(PLACE)[0]

  def filled(self, prompt: str) -> str:
    """The text with a prompt.

    White space around the prompt is dropped: a line break at its beginning would become one token
    with the line breaks of the template, and so be cut off with it.
    """
    return self.text.replace(PLACE, prompt.strip())


# Tencent HunyuanVideo, hyvideo/constants.py; the one for videos is also diffusers' default.
NAMED = {
  "video": Template(
    text=(
      "<|start_header_id|>system<|end_header_id|>\n\n"
      "Describe the video by detailing the following aspects: "
      "1. The main content and theme of the video."
      "2. The color, shape, size, texture, quantity, text, and spatial relationships of the"
      " objects."
      "3. Actions, events, behaviors temporal relationships, physical movement changes of the"
      " objects."
      "4. background environment, light, style and atmosphere."
      "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
      "<|start_header_id|>user<|end_header_id|>\n\n"
      "{}<|eot_id|>"
    ),
    tokens=95,
  ),
  "image": Template(
    text=(
      "<|start_header_id|>system<|end_header_id|>\n\n"
      "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial"
      " relationships of the objects and background:<|eot_id|>"
      "<|start_header_id|>user<|end_header_id|>\n\n"
      "{}<|eot_id|>"
    ),
    tokens=36,
  ),
}


def template_of(value: str) -> Template:
  """The template of this name, or the text itself as a template.

  Raises:
    ValueError: it is no name, and has no place for the prompt or several.
  """
  if value in NAMED:
    return NAMED[value]
  if value.count(PLACE) != 1:
    raise ValueError(
      f"config.model.template = {value!r}: unknown; one of {', '.join(NAMED)}, or a text of your"
      f" own with one {PLACE} where the prompt goes"
    )
  return Template(text=value, tokens=len(value.partition(PLACE)[0].split()) + 1)
