"""Builds a certified index in the directory of its embeddings.

In: the directory that embedding_job.py filled, and a sample of questions. Out:
the index in it, tuned if that was asked for, and certified. The embeddings are
stored once, even if the index is split into shards.
"""

import dataclasses
from typing import Any

from absl import logging
from etils import epath
from jaxtyping import Float
import numpy as np

from rag_jax import artifacts
from rag_jax.config import IndexConfig
from rag_jax.corpus.report import Coverage
from rag_jax.retrieval.certificate import SearchModes
from rag_jax.retrieval.certify import certify
from rag_jax.retrieval.embeddings import open_embeddings
from rag_jax.retrieval.index import build_index
from rag_jax.retrieval.index import build_index_directory
from rag_jax.retrieval.index import load_index
from rag_jax.retrieval.index import resolve_kind
from rag_jax.retrieval.resources import BuildMeter
from rag_jax.retrieval.tuner import tune

_LEAST_QUESTIONS = 20  # fewest questions to tune an index on


def check_tuning(
  config: IndexConfig, target_recall: float, num_questions: int
) -> None:
  """Raises `ValueError` if the index cannot be built or tuned as asked."""
  kind = resolve_kind(config.kind)
  if config.passages_per_shard < 0:
    raise ValueError(
      f"index.passages_per_shard={config.passages_per_shard}; expected at least"
      " 1, or 0 for an index without shards. Change it."
    )
  if not target_recall:
    return
  if kind != "scann" or not 0 < target_recall <= 1:
    raise ValueError(
      f"target_recall={target_recall} with an index of kind {kind!r};"
      " expected a number above 0 and at most 1, and kind 'scann', the only one"
      " that is tuned. Change them, or leave target_recall at 0."
    )
  if config.passages_per_shard:
    raise ValueError(
      f"target_recall={target_recall} with index.passages_per_shard="
      f"{config.passages_per_shard}: an index in shards cannot be tuned;"
      " expected one of the two. Leave the other at 0."
    )
  if num_questions < _LEAST_QUESTIONS:
    raise ValueError(
      f"target_recall={target_recall} is tuned on questions, of which"
      f" there are {num_questions}; expected at least {_LEAST_QUESTIONS}: half"
      " of them to tune on, half for the certificate. Pass a file of questions."
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CertificateSettings:
  """How an index is certified, and further fields of its certificate.

  Attributes:
    sample: embeddings of questions; None to certify with passages.
    target_recall: the recall that ScaNN is tuned to, on half of the sample; 0
      for no tuning.
    speed_secs: how long each batch size is timed.
    coverage: how much of the corpus was embedded.
    modes: the search modes, if they were measured before.
  """

  sample: Float[np.ndarray, "B R"] | None
  target_recall: float
  speed_secs: float
  coverage: Coverage | None = None
  modes: SearchModes | None = None


def build_certified_index(
  path: epath.Path,
  config: IndexConfig,
  settings: CertificateSettings,
  *,
  encoder_fingerprint: str,
  passages_fingerprint: str,
) -> None:
  """Builds and certifies the index, unless the directory has one already.

  With `index.passages_per_shard` only one shard is in memory at a time, and an
  interrupted build continues after the last finished shard. The embeddings are
  those in the directory. Other arguments as in `index.build_index`; errors also
  as in `tuner.tune`.
  """
  index, sample = None, settings.sample
  if (path / artifacts.MANIFEST).exists():
    index = load_index(path)
    # An index in shards is complete before it is certified.
    if index.certificate is not None:
      return
  embeddings = open_embeddings(path)
  fingerprints: dict[str, Any] = {
    "encoder_fingerprint": encoder_fingerprint,
    "passages_fingerprint": passages_fingerprint,
  }
  if index is None and 0 < config.passages_per_shard < len(embeddings):
    meter = BuildMeter()
    build_index_directory(path, embeddings, config, **fingerprints)
    cost = meter.cost()
    index = load_index(path)
    index.build_cost = cost
  elif index is None and settings.target_recall:
    assert sample is not None, "check_tuning was called"
    tuned = tune(
      embeddings[:],
      sample[::2],
      target_recall=settings.target_recall,
      k=min(10, len(embeddings)),
      config=config,
    )
    logging.info("The tuner tried:\n%s", tuned.table())
    index, sample = tuned.index, sample[1::2]
    index.info = dataclasses.replace(index.info, **fingerprints)
  elif index is None:
    index = build_index(embeddings, config, **fingerprints)
  certificate = certify(index, sample, speed_secs=settings.speed_secs)
  index.certificate = dataclasses.replace(
    certificate, coverage=settings.coverage, modes=settings.modes
  )
  index.save(path)
