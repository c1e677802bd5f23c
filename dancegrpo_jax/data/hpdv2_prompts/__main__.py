"""Makes the data set `hpdv2_prompts`:

python -m dancegrpo_jax.data.hpdv2_prompts --data-dir=DIR [--json=PATH]
"""

import argparse
import sys

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
  args = parser.parse_args(argv)
  try:
    source = hpdv2_prompts.load(data_dir=args.data_dir, json_file=args.json)
    print(f"hpdv2_prompts train: {len(source)} prompts")
  except (FileNotFoundError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
