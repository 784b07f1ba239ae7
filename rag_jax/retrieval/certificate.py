"""What an index was measured to find, how fast, and what it takes.

In: an index, and embeddings of questions that it was not built from. Out: its
certificate, which `Index.save` keeps in the manifest, so that whoever uses the
index later knows what its results are worth.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from absl import logging
from jaxtyping import Float, Int
import numpy as np

from rag_jax.corpus.report import Coverage
from rag_jax.retrieval.cost import num_cpus
from rag_jax.retrieval.cost import queries_per_second
from rag_jax.retrieval.exact import ExactIndex
from rag_jax.retrieval.recall import Recall
from rag_jax.retrieval.recall import index_recall_at_k
from rag_jax.retrieval.recall import mean_recall

QUESTIONS = "questions"  # a sample of what the index will be asked
PASSAGES = "passages"  # a sample of what it holds, in place of questions

_SEED = 0  # of the sample: the same index and questions give the same recall
_SPEED_K = 10  # passages a question, when speed is measured
_SPEED_BATCHES = (1, 256)


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Certificate:
  """What `certify` measured of an index.

  None stands for what was not measured.
  """

  kind: str
  settings: Mapping[str, Any]
  num_passages: int
  embedding_dim: int
  sample: str  # QUESTIONS or PASSAGES
  num_questions: int
  recalls: tuple[Recall, ...]  # by rising k
  speed_k: int  # passages a question, in the next
  queries_per_second: Mapping[int, float]  # by batch size
  num_cpus: int  # that the process could use
  memory_bytes: int  # that searching takes
  disk_bytes: int | None = None  # of its directory; known once it is saved
  build_secs: float | None = None
  build_peak_bytes: int | None = None  # see BuildCost
  coverage: Coverage | None = None  # of the corpus, by what is embedded

  def recall(self, k: int) -> Recall:
    """Returns the recall at the smallest k measured that is not below `k`.

    Of a `k` above all, the largest. A certificate has at least one.
    """
    return next((r for r in self.recalls if r.k >= k), self.recalls[-1])

  def to_content(self) -> dict[str, Any]:
    """Returns what JSON can hold, for a manifest."""
    return json.loads(self.to_json())

  def to_json(self) -> str:
    """Returns the certificate as JSON."""
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(
    cls, text: str, origin: str = "the certificate"
  ) -> "Certificate":
    """Returns what `to_json` wrote.

    Args:
      text: JSON.
      origin: where it was read, for messages.

    Raises:
      ValueError: not JSON, or no certificate.
    """
    try:
      content = json.loads(text)
    except ValueError as error:
      raise ValueError(
        f"{origin} is not JSON ({error}); expected what to_json wrote. It was"
        " cut off or edited: certify the index again."
      ) from error
    return cls.from_content(content, origin)

  @classmethod
  def from_content(
    cls, content: Any, origin: str = "the certificate"
  ) -> "Certificate":
    """Returns the certificate of a manifest; see `from_json`."""
    try:
      content = dict(content)
      content["recalls"] = tuple(Recall(**r) for r in content["recalls"])
      if content.get("coverage") is not None:
        content["coverage"] = Coverage(**content["coverage"])
      content["queries_per_second"] = {
        int(size): float(speed)  # JSON has no keys but strings
        for size, speed in content["queries_per_second"].items()
      }
      if not content["recalls"]:
        raise ValueError("no recalls")
      return cls(**content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"{origin} holds no certificate that this version of rag_jax can read"
        f" ({type(error).__name__}: {error}); expected"
        f" {', '.join(f.name for f in dataclasses.fields(cls))}. It was edited,"
        " or written by a newer version: certify the index again, or upgrade"
        " rag_jax."
      ) from error

  def table(self) -> str:
    """Returns the certificate as a Markdown table."""
    rows = [("index", self._describe())]
    if self.coverage is not None:  # no recall finds what is not in there
      rows.append(("not embedded", str(self.coverage)))
    rows += [(f"index_recall@{r.k}", _interval(r)) for r in self.recalls]
    rows.append(("measured on", self._describe_sample()))
    rows += [
      (
        f"questions/s, {size} at a time",
        f"{speed:,.0f} ({self.speed_k} passages each, {self.num_cpus} CPUs)",
      )
      for size, speed in sorted(self.queries_per_second.items())
    ]
    rows.append(("memory", self._size(self.memory_bytes)))
    if self.disk_bytes is not None:
      rows.append(("disk", self._size(self.disk_bytes)))
    if self.build_secs is not None:
      rows.append(("build", f"{self.build_secs:,.1f} s, without embedding"))
    if self.build_peak_bytes is not None:
      peak = f"at most {_bytes(self.build_peak_bytes)} more than before"
      rows.append(("memory of the build", peak))
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| certificate | |", "|---|---|", *lines]) + "\n"

  def _describe(self) -> str:
    settings = "".join(
      f", {name}={value}" for name, value in self.settings.items() if value
    )
    size = f"{self.num_passages:,} passages x {self.embedding_dim}"
    return f"{self.kind}, {size}{settings}"

  def _describe_sample(self) -> str:
    if self.sample == QUESTIONS:
      return f"{self.num_questions:,} questions"
    return (
      f"{self.num_questions:,} of its own passages, each searched among the"
      " others; questions may find less"
    )

  def _size(self, size: int) -> str:
    each = size / self.num_passages
    return f"{_bytes(size)}, {each:,.0f} bytes a passage"


def certify(
  index: Any,
  questions: Float[np.ndarray, "B R"] | None = None,
  *,
  ks: Sequence[int] = (1, 10, 100),
  max_questions: int = 1000,
  speed_secs: float = 1.0,
) -> Certificate:
  """Returns the certificate of `index`, measured against exact search.

  Without questions, passages of the index stand for them. Such a passage finds
  itself, whatever the index does, so it is left out of both results: what
  counts is whether its neighbours are found. That is easier than to answer
  questions, which lie where no passage does; the certificate says which it was.

  The sample is searched at once. ScaNN may find a passage more or less for a
  question that is searched alone.

  Assign it to `index.certificate` before `index.save`.

  Args:
    index: any `Index`.
    questions: embeddings of questions that nothing was tuned on; None: of
      passages in the index.
    ks: how deep recall is measured; those above the number of passages become
      that number.
    max_questions: a larger sample is drawn down to this.
    speed_secs: how long each batch size is timed; 0: not at all.

  Raises:
    ValueError: there are no questions, they do not fit the index, or a number
      is out of range.
  """
  if min(ks, default=0) < 1 or max_questions < 1:
    raise ValueError(
      f"ks={tuple(ks)} and max_questions={max_questions} were given for the"
      " certificate; expected numbers of at least 1. Change them."
    )
  rng = np.random.default_rng(_SEED)
  if questions is None:
    rows = _draw(rng, index.num_passages, max_questions)
    sample, own = np.asarray(index.embeddings[rows]), rows
    # One passage alone has no others to find; it has to find itself.
    own = None if index.num_passages == 1 else own
  else:
    if not len(questions):
      raise ValueError(
        f"The questions to certify the index with have shape {questions.shape}:"
        " there are none. Expected at least one; pass None to measure with"
        " passages of the index."
      )
    rows = _draw(rng, len(questions), max_questions)
    sample, own = questions[rows], None
  most = index.num_passages - (own is not None)
  depths = sorted({min(k, most) for k in ks})
  return Certificate(
    kind=index.kind,
    settings=dict(index.settings),
    num_passages=index.num_passages,
    embedding_dim=index.embedding_dim,
    sample=PASSAGES if questions is None else QUESTIONS,
    num_questions=len(sample),
    recalls=_recalls(index, sample, own, depths),
    speed_k=min(_SPEED_K, index.num_passages),
    queries_per_second={
      size: queries_per_second(
        index, sample, min(_SPEED_K, index.num_passages), size, speed_secs
      )
      for size in _SPEED_BATCHES
      if speed_secs
    },
    num_cpus=num_cpus(),
    memory_bytes=index.memory_bytes,
    build_secs=index.build_cost.secs if index.build_cost else None,
    build_peak_bytes=index.build_cost.peak_bytes if index.build_cost else None,
  )


def check_min_recall(index: Any, minimum: float, k: int) -> None:
  """Refuses an index whose certificate says less than `minimum`.

  One without certificate gets it now, measured with its passages.

  Args:
    index: any `Index`.
    minimum: from 0 to 1; 0 never refuses.
    k: passages that are read for a question. Of the recalls measured, the one
      at the next larger number counts.

  Raises:
    ValueError: the index finds too little.
  """
  if not minimum:
    return
  if index.certificate is None:
    logging.info(
      "Measuring an index of kind %r: it has no certificate.", index.kind
    )
    index.certificate = certify(index, speed_secs=0.0)
  certificate = index.certificate
  found = certificate.recall(k)
  if found.mean < minimum:
    raise ValueError(
      f"The index of kind {index.kind!r} finds too little: its"
      f" index_recall_at_{found.k} is {found.mean:.4f} (95% interval"
      f" {found.low:.4f} to {found.high:.4f}, on {certificate.num_questions}"
      f" {certificate.sample}), expected at least index.min_recall={minimum}."
      " Raise index.scann_leaves_to_search or index.scann_reorder, use"
      " index.kind='exact', or lower index.min_recall."
    )


def exact_search(
  index: Any, questions: Float[np.ndarray, "B R"], n_docs: int
) -> Int[np.ndarray, "B K"]:
  """Returns what exact search finds among the embeddings of `index`."""
  exact = ExactIndex(
    index.embeddings,
    encoder_fingerprint=index.encoder_fingerprint,
    passages_fingerprint=index.passages_fingerprint,
  )
  return exact.search(questions, n_docs)[0]


def _recalls(
  index: Any,
  sample: np.ndarray,
  own: np.ndarray | None,  # the passage that each of the sample is
  depths: Sequence[int],
) -> tuple[Recall, ...]:
  more = own is not None
  truth = exact_search(index, sample, depths[-1] + more)
  if own is not None:
    truth = _without(truth, own)
  recalls = []
  # A search each: the first 10 of 100 are not what a search for 10 finds.
  for k in depths:
    found, _ = index.search(sample, k + more)
    if own is not None:
      found = _without(found, own)
    recalls.append(mean_recall(index_recall_at_k(found, truth, k), k))
  return tuple(recalls)


def _without(
  ids: Int[np.ndarray, "B K"], own: Int[np.ndarray, "B"]
) -> Int[np.ndarray, "B k"]:
  """Returns all but `own` of each row; where it is not there, all but the last.

  It is not there if others score higher: a longer passage may.
  """
  kept = ids != own[:, None]
  kept[kept.all(axis=1), -1] = False
  return ids[kept].reshape(len(ids), -1)


def _draw(rng: np.random.Generator, total: int, most: int) -> np.ndarray:
  """Returns `most` of the numbers below `total`, or all, rising."""
  if total <= most:
    return np.arange(total)
  return np.sort(rng.choice(total, most, replace=False))


def _interval(recall: Recall) -> str:
  return (
    f"{recall.mean:.4f} (95% interval {recall.low:.4f} to {recall.high:.4f})"
  )


def _bytes(size: int) -> str:
  for unit, factor in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
    if size >= 2**factor:
      return f"{size / 2**factor:,.1f} {unit}"
  return f"{size} bytes"
