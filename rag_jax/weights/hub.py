"""The hub's copy of a checkpoint, downloaded once.

In: "hf:ORG/NAME". Out: the directory of the cache where its files lie.
"""

from collections.abc import Sequence
import re

import huggingface_hub
import huggingface_hub.errors

HUB_PREFIX = "hf:"

# No Python file is ever downloaded, and a pickle only if it is asked for.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model")
_PICKLES = ("pytorch_model*.bin",)
_UNWANTED = ("onnx/*", "openvino/*")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def download(name: str) -> str:
  """Returns the local directory of "hf:ORG/NAME" or "hf:ORG/NAME@REVISION".

  Shows the hub's progress bar. What was downloaded before is not downloaded
  again, so that it is there without a network too.

  Raises:
    ValueError: that is no name of the hub.
    FileNotFoundError: the hub does not know it, or cannot be reached.
  """
  return _download(name, _WANTED)


def download_pickles(name: str) -> str:
  """Adds to what `download` fetched the weights that are a pickle.

  For api/pickles.py, which converts them; nothing else reads one. Arguments
  and errors are those of `download`.
  """
  return _download(name, _PICKLES)


def _download(name: str, wanted: Sequence[str]) -> str:
  if not _NAME.fullmatch(name.removeprefix(HUB_PREFIX)):
    raise ValueError(
      f"{name!r} is no name of the hub; expected {HUB_PREFIX}ORG/NAME, for"
      f" instance {HUB_PREFIX}facebook/bart-base. Correct it, or give a local"
      " directory."
    )
  repo, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
  errors = huggingface_hub.errors
  try:
    return huggingface_hub.snapshot_download(
      repo,
      revision=revision or None,
      allow_patterns=list(wanted),
      ignore_patterns=list(_UNWANTED),
    )
  except errors.GatedRepoError as error:
    raise FileNotFoundError(
      f"{name} asks for an agreement before it can be downloaded ({error})."
      f" Agree on https://huggingface.co/{repo}, then log in with: hf auth"
      " login"
    ) from error
  except (
    errors.RepositoryNotFoundError, errors.RevisionNotFoundError
  ) as error:  # fmt: skip
    raise FileNotFoundError(
      f"The hub has no {name} ({error}). Expected {HUB_PREFIX}ORG/NAME of a"
      " model; correct the name, or log in if it is private: hf auth login"
    ) from error
  except Exception as error:  # each part of the client raises its own kinds
    raise FileNotFoundError(
      f"{name} is not in the hub's cache on this machine, and could not be"
      f" downloaded ({error}). Without a network, download it elsewhere (hf"
      f" download {repo} --local-dir DIR) and give that directory; or copy the"
      " cache here and set HF_HUB_OFFLINE=1."
    ) from error
