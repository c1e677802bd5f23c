"""Google Cloud Storage, against an emulator on this machine: files that are read, and workdirs."""

import os
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from test_distributed import free_port
from test_workdir_lock import HOLD
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import buckets, installation, main, sample
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics
from dancegrpo_jax.training import bucket_workdir

# The emulator, with two things that Google's buckets do and it does not: the header with an
# object's generation, which TensorStore reads, and ifGenerationMatch=0, by which an object is made
# once only.
SERVER = """
import sys, time
from http import HTTPStatus
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

download, insert = objects.download, objects.insert

def with_generation(request, response, storage, *args, **kwargs):
  try:
    found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
    response["x-goog-generation"] = found["generation"]
  except NotFound:
    pass
  return download(request, response, storage, *args, **kwargs)

def once(request, response, storage, *args, **kwargs):
  if request.query.get("ifGenerationMatch") == ["0"]:
    name = (request.query.get("name") or [None])[0] or request.data["meta"]["name"]
    try:
      storage.get_file_obj(request.params["bucket_name"], name)
      response.status = HTTPStatus.PRECONDITION_FAILED
      return
    except NotFound:
      pass
  return insert(request, response, storage, *args, **kwargs)

objects.download, objects.insert = with_generation, once
from gcp_storage_emulator.server import create_server  # its table of routes has the functions

create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
time.sleep(3600)
"""
CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"


@pytest.fixture(scope="module")
def bucket():
  """The URL of an empty bucket. gcsfs and TensorStore read where it is from the environment."""
  port = free_port()
  server = subprocess.Popen(
    [sys.executable, "-c", SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  place = f"http://localhost:{port}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", place)
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", place)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    patch.setenv("NO_GCE_CHECK", "true")  # otherwise it is looked for at every object
    for _ in range(100):
      try:
        urllib.request.urlopen(f"{place}/storage/v1/b/bucket", timeout=1).close()
        break
      except OSError:
        time.sleep(0.1)
    yield "gs://bucket"
  server.kill()
  server.wait()


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """`(name)` goes on as on another machine: with empty folders of local copies."""

  def become(name: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    installation._copied.cache_clear()

  become("first")
  return become


def put(url: str, text: str) -> None:
  buckets.write(url, text.encode())


# Reading


def test_a_file_is_read_again_where_it_has_changed(bucket, machine):
  put(f"{bucket}/data/prompts.txt", "a cat\n")
  first = buckets.mirrored(f"{bucket}/data/prompts.txt")
  assert first.read_text() == "a cat\n"
  when = first.stat().st_mtime_ns
  assert buckets.mirrored(f"{bucket}/data/prompts.txt").stat().st_mtime_ns == when  # not copied
  put(f"{bucket}/data/prompts.txt", "a dog\n")
  assert buckets.mirrored(f"{bucket}/data/prompts.txt").read_text() == "a dog\n"
  buckets.remove(f"{bucket}/data/prompts.txt")
  assert not buckets.mirrored(f"{bucket}/data/prompts.txt").exists()


def test_a_copy_that_breaks_off_leaves_no_file(bucket, machine, monkeypatch):
  put(f"{bucket}/cut/weights.safetensors", "x" * 1000)

  def broken(url, file):
    with open(file, "w") as stream:
      stream.write("half")
    raise OSError("connection lost")

  with monkeypatch.context() as patch:
    patch.setattr(buckets.filesystem(), "get_file", broken)
    with pytest.raises(ConfigError, match="connection lost"):
      buckets.mirrored(f"{bucket}/cut")
  copy = buckets.copy_of(f"{bucket}/cut")
  assert not list(copy.glob("*weights*"))
  assert (buckets.mirrored(f"{bucket}/cut") / "weights.safetensors").stat().st_size == 1000


# A run


def test_a_run_in_a_bucket_is_that_in_a_folder(
  bucket, machine, tiny_models, program_cache, tmp_path, capsys
):
  """It goes on on another machine. The model, the prompts and the workdir are in the bucket."""
  buckets.filesystem().put(str(tiny_models.model), f"{bucket}/models/sd", recursive=True)
  prompts = str(ROOT / "assets" / "prompts" / "emoji_run.txt")
  buckets.filesystem().put_file(prompts, f"{bucket}/run.txt")

  def train(workdir: str, iterations: int, **changes) -> int:
    values = {
      "iterations": iterations,
      "rollout__samples_per_prompt": 4,
      "checkpoint__every": 1,
      "checkpoint__keep": 2,
      "evaluation__every": 1,
      "logging__compilation_cache": program_cache,
    }
    words = overrides(tiny_models, **values | changes)
    return main.main([CONFIG, f"--workdir={workdir}", *(f"--config.{word}" for word in words)])

  remote = {"model__checkpoint": f"{bucket}/models/sd", "data__prompts": f"{bucket}/run.txt"}
  workdir, folder = f"{bucket}/runs/a", tmp_path / "run"
  assert train(workdir, 1, **remote) == 0
  assert f"{workdir}: a new run of 1 iterations" in capsys.readouterr().out
  machine("second")
  assert train(workdir, 2, **remote) == 0
  assert "resuming at iteration 2 of 2" in capsys.readouterr().out
  assert train(str(folder), 2, data__prompts=prompts) == 0

  names = set(buckets.listing(workdir))
  assert {name for name in names if not name.startswith(("checkpoints/", "tensorboard/"))} == {
    path.relative_to(folder).as_posix()
    for path in folder.rglob("*")
    if path.is_file() and path.relative_to(folder).parts[0] not in ("checkpoints", "tensorboard")
  }
  (tmp_path / "copy").mkdir()
  (tmp_path / "copy" / "metrics.jsonl").write_bytes(buckets.read(f"{workdir}/metrics.jsonl"))
  for ours, theirs in zip(metrics.read(tmp_path / "copy"), metrics.read(folder), strict=True):
    for name in theirs:
      if not name.startswith(("time/", "samples_per_second")):
        assert ours[name] == theirs[name], name
  there, here = f"{workdir}/checkpoints", store.folder_of(folder)
  assert store.steps(there) == store.steps(here) == [1, 2]
  places = (here / "2", store.epath.Path(there) / "2")
  expected, found = (ocp.load_checkpointables(place)["trainable"] for place in places)
  assert len(jax.tree.leaves(found)) > 10
  for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(mine, theirs)

  out = tmp_path / "out"
  flags = [f"--checkpoint={workdir}@1", "--prompt=a red apple", f"--out={out}", "--samples=2"]
  assert sample.main(flags) == 0
  assert len(list(out.glob("00_*.png"))) == 2


# A workdir's faults


def test_what_could_not_be_copied_stays_and_is_copied_later(bucket, machine, monkeypatch):
  url, send = f"{bucket}/runs/faults", buckets.send
  monkeypatch.setattr(bucket_workdir, "PAUSE", 0.01)

  def refused(url, file):
    raise buckets.BucketError(f"{url}: no permission")

  monkeypatch.setattr(buckets, "send", refused)
  with pytest.raises(ConfigError) as caught, bucket_workdir.opened(url) as folder:
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "a.png").write_bytes(b"1")
  (line,) = str(caught.value).splitlines()
  assert line.startswith(
    f"--workdir={url}: 2 files of the run are not in the bucket, but in {folder}"
  )
  assert "no permission" in line and (folder / "metrics.jsonl").read_text() == "{}\n"
  assert not buckets.listing(url)

  # Every second attempt fails.
  calls = []

  def flaky(url, file):
    calls.append(url)
    if len(calls) % 2:
      raise buckets.BucketError("busy")
    return send(url, file)

  monkeypatch.setattr(buckets, "send", flaky)
  with bucket_workdir.opened(url) as folder:
    pass
  assert set(buckets.listing(url)) == {"metrics.jsonl", "samples/a.png"}


def test_files_are_copied_while_a_run_goes_on(bucket, machine, monkeypatch):
  url = f"{bucket}/runs/while"
  monkeypatch.setattr(bucket_workdir, "EVERY", 0.1)
  with bucket_workdir.opened(url) as folder:
    (folder / "metrics.jsonl").write_text("1\n")
    wait_for(lambda: buckets.listing(url))
    with (folder / "metrics.jsonl").open("a") as stream:
      stream.write("2\n")
    wait_for(lambda: buckets.read(f"{url}/metrics.jsonl") == b"1\n2\n")


def test_another_machine_s_files_are_fetched(bucket, machine):
  url = f"{bucket}/runs/two"
  with bucket_workdir.opened(url) as folder:
    (folder / "metrics.jsonl").write_text("1\n")
  machine("second")
  with bucket_workdir.opened(url) as other:
    assert other != folder and (other / "metrics.jsonl").read_text() == "1\n"
    (other / "metrics.jsonl").write_text("1\n2\n")
  machine("first")
  with bucket_workdir.opened(url) as again:
    assert again == folder and (again / "metrics.jsonl").read_text() == "1\n2\n"


def test_two_machines_lose_nothing(bucket, machine, monkeypatch, capsys):
  """The first could not copy its last file, and the second has gone on meanwhile."""
  url = f"{bucket}/runs/both"
  with bucket_workdir.opened(url) as folder:
    (folder / "metrics.jsonl").write_text("1\n")
  (folder / "metrics.jsonl").write_text("1\nnot copied\n")
  machine("second")
  with bucket_workdir.opened(url) as other:
    (other / "metrics.jsonl").write_text("1\n2\n")
  machine("first")
  with bucket_workdir.opened(url) as again:
    assert (again / "metrics.jsonl").read_text() == "1\n2\n"
  kept = folder / ".metrics.jsonl.of-this-machine"
  assert kept.read_text() == "1\nnot copied\n" and str(kept) in capsys.readouterr().out
  assert set(buckets.listing(url)) == {"metrics.jsonl"}


def test_the_error_of_a_run_is_not_hidden(bucket, machine, monkeypatch, capsys):
  def refused(url, file):
    raise buckets.BucketError("no permission")

  monkeypatch.setattr(bucket_workdir, "PAUSE", 0.01)
  monkeypatch.setattr(buckets, "send", refused)
  url = f"{bucket}/runs/error"
  with pytest.raises(ZeroDivisionError), bucket_workdir.opened(url) as folder:
    (folder / "status.json").write_text("{}")
    raise ZeroDivisionError
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: --workdir={url}: 1 files of the run are not in the bucket")


def test_looking_at_a_workdir_copies_nothing(bucket, machine):
  url = f"{bucket}/runs/looked_at"
  put(f"{url}/metrics.jsonl", "1\n")
  before = buckets.listing(url)
  with bucket_workdir.looked_at(url) as folder:
    assert store.folder_of(folder) == store.epath.Path(f"{url}/checkpoints")
    assert not (folder / "metrics.jsonl").exists()
  assert buckets.listing(url) == before and not folder.exists()


def wait_for(holds) -> None:
  end = time.monotonic() + 20
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_a_bucket_that_can_t_be_used_is_one_line(bucket, machine, capsys):
  assert main.main([CONFIG, "--workdir=gs://no-such-bucket/run"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "--workdir=gs://no-such-bucket/run" in line


def test_one_run_in_a_workdir(bucket, machine, tmp_path):
  """The second is refused while the first lives, and follows it when it is dead."""
  url, holding = f"{bucket}/runs/held", HOLD.replace("pathlib.Path(workdir)", "workdir")

  def hold(machine: str) -> subprocess.Popen:
    words = [sys.executable, "-c", holding, url, machine, "60", "0"]
    return subprocess.Popen(
      words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

  first = hold("one")
  assert first.stdout.readline() == "held\n"
  second = hold("two")
  _, errors = second.communicate(timeout=60)
  assert second.returncode == 2 and f"--workdir={url}: a run is going on there" in errors
  first.kill()
  first.wait()
  begin = time.monotonic()
  third = hold("two")
  lines = [third.stdout.readline() for _ in range(2)]
  assert "looking for a sign of life" in lines[0] and lines[1] == "held\n"
  assert time.monotonic() - begin < 30
  third.terminate()
  third.wait()


# URLs


@pytest.mark.parametrize(
  "words, message",
  [
    (["--workdir=s3://a/b"], "--workdir = 's3://a/b': such a URL can't be used there"),
    (["--workdir=gs://a"], "--workdir = 'gs://a': must be gs://BUCKET/NAME"),
    (["--config.data.prompts=https://a/b.txt"], "prompts file = 'https://a/b.txt': such a URL"),
    (["--config.model.checkpoint=hf://a/b"], "config.model.checkpoint = 'hf://a/b': such a URL"),
    (["--config.data.cache_folder=gs://a/b"], "config.data.cache_folder = 'gs://a/b': a bucket"),
    (["--config.reward.clip.checkpoint=file:///a"], "config.reward.clip.checkpoint = 'file:///a'"),
  ],
)
def test_other_urls_are_refused(words, message, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert main.main([CONFIG, *words]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line and not os.listdir(tmp_path)


def test_out_must_be_local(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert sample.main([CONFIG, "--prompt=x", "--out=gs://a/b"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "--out = 'gs://a/b': a bucket can't be used there; give a local path" in line


def test_without_the_library_it_says_what_to_install(monkeypatch, capsys):
  buckets.filesystem.cache_clear()
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  assert main.main([CONFIG, "--workdir=gs://a/b"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.endswith("pip install -r requirements-gcs.txt")
  buckets.filesystem.cache_clear()
