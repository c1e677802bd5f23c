"""Makes the data set `hpdv2_prompts`:

python -m dancegrpo_jax.data.hpdv2_prompts --data-dir=DIR [--json=PATH] [--out=FILE.json]
"""

import argparse
import json
import sys
from pathlib import Path

from dancegrpo_jax.data import hpdv2_prompts


def main(argv: list[str] | None = None) -> int:
  """The command. The exit code is 2 where the file is missing, can't be fetched or isn't HPDv2's
  list, with one line on stderr.
  """
  parser = argparse.ArgumentParser(
    prog="python -m dancegrpo_jax.data.hpdv2_prompts", description=__doc__
  )
  parser.add_argument(
    "--data-dir", help="of all TFDS data sets (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
  )
  parser.add_argument(
    "--json", help="HPDv2's train.json (default: fetched from the Hugging Face hub)"
  )
  parser.add_argument(
    "--out", help="a .json file for the prompts too, for machines that don't have the data set"
  )
  args = parser.parse_args(argv)
  try:
    out = Path(args.out) if args.out else None
    if out and (out.suffix != ".json" or not out.parent.is_dir()):
      raise ValueError(f"--out={out}: must end with .json, in a folder that exists")
    source = hpdv2_prompts.load(data_dir=args.data_dir, json_file=args.json)
    print(f"hpdv2_prompts train: {len(source)} prompts")
    if out:
      prompts = [row["prompt"].decode() for row in source]
      out.write_text(json.dumps(prompts, indent=0, ensure_ascii=False), encoding="utf-8")
  except (FileNotFoundError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
