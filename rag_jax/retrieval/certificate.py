"""The certificate of an index: its measured recall, speed, time and memory.

In: the measurements of `certify` (certify.py). Out: the certificate as JSON,
which `Index.save` stores in the manifest, and as a table. So everyone who uses
the index later knows how good its results are.
"""

from collections.abc import Mapping
import dataclasses
import json
import types
from typing import Any

from rag_jax.corpus.report import Coverage
from rag_jax.json_input import Content
from rag_jax.retrieval.recall import Recall

QUESTIONS = "questions"  # the sample is like the questions it will be asked
PASSAGES = "passages"  # the sample is passages of the index, for lack of these

_FIELDS = {
  "kind": str,
  "settings": dict,
  "num_passages": int,
  "embedding_dim": int,
  "sample": str,
  "num_questions": int,
  "speed_k": int,
  "num_cpus": int,
  "memory_bytes": int,
  "disk_bytes": (int, types.NoneType),
  "build_secs": (int, float, types.NoneType),
  "build_peak_bytes": (int, types.NoneType),
}


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class ModeMetrics:
  """The metrics of one search mode, averaged over questions.

  Attributes:
    first: the share of questions whose first passage is relevant.
    among_5: the share with a relevant passage among the first 5.
    mrr: the mean of 1 / rank of the first relevant passage, 0 beyond rank 10.
  """

  first: float
  among_5: float
  mrr: float


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class SearchModes:
  """The metrics of searching by embeddings, by words and by both.

  Attributes:
    num_questions: the number of questions with known relevant passages.
    num_passages: the number of passages when it was measured.
    metrics: by mode; "reciprocal ranks" is hybrid search without weights.
    weights: of embeddings and words in hybrid search; None if fusing reciprocal
      ranks is better.
  """

  num_questions: int
  num_passages: int
  metrics: Mapping[str, ModeMetrics]
  weights: tuple[float, float] | None

  @property
  def best(self) -> str:
    """The mode with the largest mean reciprocal rank.

    Of equal modes it is the simplest: embeddings, then words, then both.
    """
    return max(("dense", "bm25", "hybrid"), key=lambda m: self.metrics[m].mrr)

  @classmethod
  def from_content(cls, content: Any) -> "SearchModes":
    """Returns the modes in the JSON of `dataclasses.asdict`."""
    weights = content["weights"]
    made = cls(
      num_questions=int(content["num_questions"]),
      num_passages=int(content["num_passages"]),
      metrics={k: ModeMetrics(**v) for k, v in content["metrics"].items()},
      weights=None
      if weights is None
      else (float(weights[0]), float(weights[1])),
    )
    if made.best not in made.metrics:
      raise ValueError("no metrics")
    return made

  def rows(self) -> list[tuple[str, str]]:
    """Returns the rows of a table."""
    how = "reciprocal ranks"
    if self.weights:
      how = "{:.3g} of embeddings + {:.3g} of words".format(*self.weights)
    about = (
      f"{self.best} (on {self.num_questions:,} questions among"
      f" {self.num_passages:,} passages)"
    )
    lines = [("best mode", about)]
    for name, found in self.metrics.items():
      what = f"{name} ({how})" if name == "hybrid" else name
      value = (
        f"first {found.first:.3f}, among 5 {found.among_5:.3f}, MRR@10"
        f" {found.mrr:.3f}"
      )
      lines.append((what, value))
    return lines


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class Certificate:
  """What `certify` measured of an index; None for what was not measured."""

  kind: str
  settings: Mapping[str, Any]
  num_passages: int
  embedding_dim: int
  sample: str  # QUESTIONS or PASSAGES
  num_questions: int
  recalls: tuple[Recall, ...]  # in ascending order of k
  speed_k: int  # passages per question, when speed was measured
  queries_per_second: Mapping[int, float]  # by batch size
  num_cpus: int  # available to the process
  memory_bytes: int  # that searching takes
  disk_bytes: int | None = None  # size of the directory; known after saving
  build_secs: float | None = None
  build_peak_bytes: int | None = None  # see BuildCost
  modes: SearchModes | None = None  # of a search directory, if asked for
  coverage: Coverage | None = None  # how much of the corpus is embedded

  def recall(self, k: int) -> Recall:
    """Returns the recall at the smallest measured k that is not below `k`.

    If there is none, it is the recall at the largest measured k.
    """
    return next((r for r in self.recalls if r.k >= k), self.recalls[-1])

  def to_content(self) -> dict[str, Any]:
    """Returns the certificate as JSON values, for a manifest."""
    return json.loads(self.to_json())

  def to_json(self) -> str:
    """Returns the certificate as JSON."""
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(
    cls, text: str, origin: str = "the certificate"
  ) -> "Certificate":
    """Returns the certificate that `to_json` wrote.

    Args:
      text: JSON.
      origin: the file that was read, for messages.

    Raises:
      ValueError: it is not JSON, or no certificate.
    """
    try:
      content = json.loads(text)
    except ValueError as error:
      raise ValueError(
        f"{origin} is not JSON ({error}); expected the JSON that to_json wrote."
        " It was cut off or edited: certify the index again."
      ) from error
    return cls.from_content(content, origin)

  @classmethod
  def from_content(
    cls, content: Any, origin: str = "the certificate"
  ) -> "Certificate":
    """Returns the certificate of a manifest; see `from_json`."""
    try:
      # Plain dicts, which can be copied: those of a manifest know its file.
      content = json.loads(json.dumps(dict(content)))
      content["recalls"] = tuple(Recall(**r) for r in content["recalls"])
      if content.get("coverage") is not None:
        content["coverage"] = Coverage(**content["coverage"])
      content["queries_per_second"] = {
        int(size): float(speed)  # the keys of JSON are strings
        for size, speed in content["queries_per_second"].items()
      }
      if content.get("modes") is not None:
        content["modes"] = SearchModes.from_content(content["modes"])
      if not content["recalls"]:
        raise ValueError("no recalls")
      certificate = cls(**content)
      _check_types(certificate)
      return certificate
    except (
      AttributeError, LookupError, TypeError, ValueError, OverflowError
    ) as error:  # fmt: skip
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
    if self.coverage is not None:  # recall does not show what is missing
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
    if self.modes:
      rows += self.modes.rows()
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
      " others; the recall of questions may be lower"
    )

  def _size(self, size: int) -> str:
    each = size / self.num_passages
    return f"{_bytes(size)}, {each:,.0f} bytes per passage"


def _check_types(certificate: Certificate) -> None:
  """Raises `ValueError` unless all fields have the right types and ranges."""
  values = {name: getattr(certificate, name) for name in _FIELDS}
  Content(values, "it").check(**_FIELDS)
  numbers = [certificate.build_secs or 0.0]
  for recall in certificate.recalls:
    Content({"k": recall.k}, "a recall").check(k=int)
    numbers += [recall.mean, recall.low, recall.high]
  if certificate.modes:
    for metrics in certificate.modes.metrics.values():
      numbers += dataclasses.astuple(metrics)
    numbers += certificate.modes.weights or ()
  if not all(type(n) in (int, float) and abs(n) < 1e300 for n in numbers):
    raise ValueError(f"one of its numbers is wrong: {numbers!r:.200}")
  if not certificate.num_passages or not certificate.embedding_dim:
    raise ValueError("it has no passages or no dimensions")


def _interval(recall: Recall) -> str:
  return (
    f"{recall.mean:.4f} (95% interval {recall.low:.4f} to {recall.high:.4f})"
  )


def _bytes(size: int) -> str:
  for unit, factor in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
    if size >= 2**factor:
      return f"{size / 2**factor:,.1f} {unit}"
  return f"{size} bytes"
