"""`main --dry-run`: what is ready, what is not and why, all at once; and nothing is written."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import jax
import pytest
from tiny_checkpoint import ROOT, overrides, tiny_config

from dancegrpo_jax import buckets, main
from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.dry_run import access, disk
from dancegrpo_jax.dry_run import run as dry_run
from dancegrpo_jax.dry_run.findings import NOTE, OK, PROBLEM
from dancegrpo_jax.settings import config_file

CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"


def rows_of(text: str) -> dict[str, list[tuple[str, str]]]:
  """The printed table: check -> (mark, text) of its rows."""
  found, name = {}, ""
  for line in text.splitlines():
    if row := re.fullmatch(r"([a-z ]{3,12}?|) +(ok|note|NO) +(.*)", line):
      name = row[1].strip() or name
      found.setdefault(name, []).append((row[2], row[3]))
  return found


def test_a_run_that_can_begin(tiny_models, tmp_path, capsys):
  workdir = tmp_path / "run"
  words = [f"--config.{word}" for word in overrides(tiny_models, logging__compilation_cache="")]
  assert main.main([CONFIG, *words, f"--workdir={workdir}", "--dry-run"]) == 0
  said = capsys.readouterr().out
  rows = rows_of(said)
  assert said.splitlines()[-1] == "ready" and not workdir.exists()
  assert all(mark != PROBLEM for found in rows.values() for mark, _ in found)
  assert "8 devices (cpu)" in rows["devices"][0][1]
  assert "a new run" in rows["config"][0][1] and rows["attention"][0][1].startswith("xla")
  assert any(str(tiny_models.model) in text for _, text in rows["files"])
  assert "clip: a network" in rows["rewards"][0][1]
  # The memory of each program of the run, as `calls.of_run` lists them, of the compiler's.
  config = inventory.without_weights(tiny_config(tiny_models))
  mesh = sharding.make_mesh(config.mesh, jax.devices())
  names = [call.name for call in inventory.take(config, mesh, 8, 160).calls]
  shown = [text for _, text in rows["memory"]]
  assert "as compiled" in shown[0] and [text.split(":")[0] for text in shown[1:]] == names
  assert all(float(text.split(": ")[1]) > 0 for text in shown[1:] if "encode" in text)


def test_all_problems_are_found_at_once(tmp_path, capsys, monkeypatch):
  """Weights that are not here, two rewards, and a full disk; at the size of the published model."""
  (tmp_path / "broken_rewards.py").write_text(
    "def raises(images, prompts, metadata):\n  raise KeyError('colour')\n"
    "def pair(images, prompts, metadata):\n  return [0.0]\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  terms = "broken_rewards:raises,broken_rewards:pair,compressibility,hps"
  config = config_file.load(str(ROOT / "configs" / "sd_hps.py"), [f"reward.terms={terms}"])
  with config.unlocked():
    config.logging.compilation_cache = ""
  asked = []

  def free(folder):
    asked.append(folder)
    return 1e9

  workdir = tmp_path / "run"
  assert dry_run.run(config, workdir, free=free) == 2
  said = capsys.readouterr().out
  rows = rows_of(said)
  verdict = said.splitlines()[-1]
  assert verdict.startswith("not ready: files, disk, rewards; do what the 6 lines with NO")
  bad = {name: [text for mark, text in found if mark == PROBLEM] for name, found in rows.items()}
  model, weights, tokenizer = bad["files"]
  assert "hf download CompVis/stable-diffusion-v1-4" in model and "HF_HUB_OFFLINE=1" in model
  assert "config.reward.hps.checkpoint" in weights and "no such file" in weights
  assert "config.reward.hps.tokenizer" in tokenizer
  assert "KeyError: 'colour'" in bad["rewards"][0] and "returned" in bad["rewards"][1]
  assert (OK, "compressibility: scored two blank pictures") in rows["rewards"]
  # 860 million parameters in float32, and as many of each of Adam's moments, 3 times.
  assert "3 checkpoints of 10.31 GB" in bad["disk"][0] and "1.00 GB free" in bad["disk"][0]
  assert asked == [workdir] and not workdir.exists()
  assert "an estimate" in rows["memory"][0][1] and len(rows["memory"]) > 15


def test_a_wrong_config_and_wrong_prompts(tiny_models, tmp_path, capsys):
  changes = {"data.prompts": tmp_path / "none.txt", "sampler.noise_level": 0}
  config = tiny_config(tiny_models, **changes)
  assert dry_run.run(config, tmp_path / "run") == 2
  said = capsys.readouterr().out
  rows = rows_of(said)
  assert "none.txt" in rows["prompts"][0][1] and rows["prompts"][0][0] == PROBLEM
  assert any("sampler.noise_level = 0" in text for _, text in rows["config"])
  assert rows["files"][0][0] == OK and rows["not checked"][0][0] == NOTE
  assert said.splitlines()[-1].startswith("not ready: prompts, config;")


def test_a_workdir_that_is_a_file(tiny_models, tmp_path, capsys):
  """It is a row like the others, beside that of the missing checkpoint."""
  (tmp_path / "run").write_text("")
  words = [f"--config.{word}" for word in overrides(tiny_models, model__checkpoint="no/where")]
  assert main.main([CONFIG, *words, f"--workdir={tmp_path / 'run'}", "--dry-run"]) == 2
  rows = rows_of(capsys.readouterr().out)
  assert "is not a folder" in rows["config"][0][1] and "no/where" in rows["files"][0][1]


def test_a_bucket_has_no_limit(tmp_path):
  buckets.mark(tmp_path, "gs://somewhere/run")
  config = config_file.load(str(ROOT / "configs" / "emoji_clip.py:tiny"))
  (row,) = disk.rows(config, tmp_path, 10**6, 3000, 0, lambda _: 0.0)
  assert row.mark == NOTE and "gs://somewhere/run" in row.text


def test_disk(tmp_path):
  """(2 + 1) checkpoints of 1 MB, and evaluations at 0, 3 and 6 of 4 pictures of 3000 bytes."""
  config = config_file.load(str(ROOT / "configs" / "emoji_clip.py:tiny"))
  need = 3 * 10**6 + 3 * 4 * 3000
  for free, mark in ((need, OK), (need - 1, PROBLEM)):
    found = list(disk.rows(config, tmp_path / "x" / "y", 10**6, 3000, 0, lambda _, free=free: free))
    assert [row.mark for row in found] == [mark]
  assert disk.free_bytes(tmp_path / "x" / "y") > 0


def test_licence_is_what_the_card_says(tmp_path):
  (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\nA model.\n")
  assert access.licence(tmp_path / "README.md") == "licence openrail++, as its card says"
  (tmp_path / "README.md").write_text("Nothing.\n")
  assert access.licence(tmp_path / "README.md").startswith("licence unknown")


class Hub(http.server.BaseHTTPRequestHandler):
  """Two repositories, of which one is gated."""

  def do_GET(self):
    names = ["model_index.json", "unet/big.bin", "unet/diffusion_pytorch_model.safetensors"]
    siblings = [{"rfilename": name, "size": 10 ** (9 - i)} for i, name in enumerate(names)]
    found = {"id": "a/open", "siblings": siblings, "cardData": {"license": "mit"}}
    self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

  def do_HEAD(self):
    if "gated" in self.path:
      self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
    else:
      self.send(200, b"", {"ETag": '"1"', "X-Repo-Commit": "0" * 40})

  def send(self, status, body, headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def asked():
  """What is found of repositories on a hub, with the hub's own client in a process of its own."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  code = (
    "import json; from dancegrpo_jax.dry_run import access\n"
    "files = ['model_index.json', 'unet/*.safetensors']\n"
    "print(json.dumps([access.on_hub('model.checkpoint', name, files)"
    " for name in ('a/open', 'a/gated')]))"
  )
  address = f"http://127.0.0.1:{server.server_address[1]}"
  environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
  result = subprocess.run(
    [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  server.shutdown()
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


def test_a_repository_of_the_hub(asked):
  """The index of 1e9 bytes and the weights of 1e7 are fetched; the other file is not."""
  field, text, download, problem = asked[0]
  assert (field, download, problem) == ("model.checkpoint", 10**9 + 10**7, "")
  assert text == "a/open: on the hub, 1.01 GB to fetch; licence mit, as its card says"


def test_a_gated_repository(asked):
  assert "accept its licence on huggingface.co/a/gated, and run `hf auth login`" in asked[1][3]
