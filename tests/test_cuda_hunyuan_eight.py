"""All programs of all HunyuanVideo configs lower for NVIDIA GPUs, at full size on eight devices."""

import pytest
from cuda_programs import documented, groups, lower_group, rows

GROUPS = groups("hunyuan_video", devices=8, tiny=False)
NOTES = set()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0].name)
def test_lowers(group):
  notes = lower_group(group, devices=8)
  assert {"rollout", "update accumulate", "sample"} <= {note.program for note in notes}
  NOTES.update(notes)


def test_the_table_of_attentions_is_the_documented_one():
  """Needs all tests above. `python tests/cuda_programs.py` prints the table."""
  assert rows(NOTES) == documented("HunyuanVideo")
