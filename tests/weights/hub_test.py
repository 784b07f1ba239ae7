"""Names of the hub, with and without a network; nothing is downloaded here."""

import os
import pathlib
import types

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from rag_jax.weights.hub import download
from rag_jax.weights.hub import download_pickles
from rag_jax.weights.load import load_encoder


@pytest.mark.parametrize(
  "name", ["hf:", "hf:a/b/c", "hf:../x y", "hf:a b", "hf:org/name@"]
)
def test_what_is_no_name_is_refused(name):
  with pytest.raises(
    ValueError, match=r"is no name of the hub; expected hf:ORG/NAME, for inst"
  ):
    download(name)


class Client:
  """Stands for the hub's client."""

  def __init__(self, monkeypatch, result):
    self.result = result
    self.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", self)

  def __call__(self, repo, **kwargs):
    """Records the call."""
    self.calls.append((repo, kwargs))
    if isinstance(self.result, Exception):
      raise self.result
    return self.result


@pytest.mark.parametrize(
  ("name", "repo", "revision"),
  [
    ("hf:facebook/bart-base", "facebook/bart-base", None),
    ("hf:gpt2", "gpt2", None),
    ("hf:org/name@refs/pr/3", "org/name", "refs/pr/3"),
  ],
)
def test_pickles_and_programs_are_not_downloaded(
  monkeypatch, name, repo, revision
):
  client = Client(monkeypatch, "/somewhere")
  assert download(name) == "/somewhere"
  ((called, kwargs),) = client.calls
  assert (called, kwargs["revision"]) == (repo, revision)
  from huggingface_hub.utils import filter_repo_objects

  files = [
    "config.json", "model.safetensors", "1_Pooling/config.json", "vocab.txt",
    "spiece.model", "pytorch_model.bin", "modeling.py", "weights.pkl",
    "onnx/model.safetensors",
  ]  # fmt: skip
  kept = filter_repo_objects(
    files,
    allow_patterns=kwargs["allow_patterns"],
    ignore_patterns=kwargs["ignore_patterns"],
  )
  assert list(kept) == files[:5]


def test_a_pickle_is_downloaded_where_it_is_asked_for(monkeypatch):
  client = Client(monkeypatch, "/somewhere")
  assert download_pickles("hf:facebook/rag-token-nq@main") == "/somewhere"
  ((repo, kwargs),) = client.calls
  assert (repo, kwargs["revision"]) == ("facebook/rag-token-nq", "main")
  from huggingface_hub.utils import filter_repo_objects

  files = [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5",
    "model.pkl", "training_args.bin", "onnx/pytorch_model.bin", "modeling.py",
  ]  # fmt: skip
  kept = filter_repo_objects(
    files,
    allow_patterns=kwargs["allow_patterns"],
    ignore_patterns=kwargs["ignore_patterns"],
  )
  assert list(kept) == files[:2]


# What the client's errors read of an answer; its HTTP library changes.
ANSWER = types.SimpleNamespace(headers={}, request=None)


def test_a_name_that_the_hub_does_not_know_is_named(monkeypatch):
  error = huggingface_hub.errors.RepositoryNotFoundError("404", response=ANSWER)
  Client(monkeypatch, error)
  with pytest.raises(
    FileNotFoundError, match=r"The hub has no hf:org/name \(404.*log in if it"
  ):
    download("hf:org/name")


def test_a_gated_model_says_where_to_agree(monkeypatch):
  error = huggingface_hub.errors.GatedRepoError("403", response=ANSWER)
  Client(monkeypatch, error)
  with pytest.raises(
    FileNotFoundError, match=r"Agree on https://huggingface\.co/org/name, then"
  ):
    download("hf:org/name")


@pytest.mark.parametrize(
  "error",
  [
    huggingface_hub.errors.LocalEntryNotFoundError("no network"),
    OSError("disk full"),
    RuntimeError("xet"),
  ],
)
def test_without_a_network_the_error_says_what_to_do(monkeypatch, error):
  Client(monkeypatch, error)
  with pytest.raises(
    FileNotFoundError,
    match=rf"could not be downloaded \({error}\)\. Without a network, download"
    r" it elsewhere .*give that directory.*HF_HUB_OFFLINE=1",
  ):
    download("hf:org/name")


def test_the_real_client_offline_is_such_an_error(monkeypatch, tmp_path):
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(FileNotFoundError, match="Without a network, download"):
    load_encoder("hf:org/name")


def test_what_is_in_the_cache_needs_no_network(
  monkeypatch, tmp_path, checkpoints
):
  path = checkpoints.dpr()
  (path / "manifest.json").unlink()
  home = tmp_path / "hub/models--org--name"
  (home / "refs").mkdir(parents=True)
  (home / "refs/main").write_text("0" * 40)
  (home / "blobs").mkdir()
  snapshot = home / "snapshots" / ("0" * 40)
  snapshot.parent.mkdir()
  pathlib.Path(path).rename(snapshot)
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  loaded = load_encoder("hf:org/name")
  assert loaded.fields["projection_dim"] == 5
  assert loaded.tokenizer == os.fspath(snapshot)
