"""What an index was measured to find, how fast, and what it takes.

In: what `certify` (certify.py) measured. Out: the certificate as JSON, which
`Index.save` keeps in the manifest, and as a table: whoever uses the index later
knows what its results are worth.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from rag_jax.corpus.report import Coverage
from rag_jax.retrieval.recall import Recall

QUESTIONS = "questions"  # a sample of what the index will be asked
PASSAGES = "passages"  # a sample of what it holds, in place of questions


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class ModeMetrics:
  """Of one way to search, over questions.

  Attributes:
    first: how often a passage of use comes first.
    among_5: how often one is among the first 5.
    mrr: 1 / rank of the first of use, 0 beyond the 10th, on average.
  """

  first: float
  among_5: float
  mrr: float


@dataclasses.dataclass(slots=True, frozen=True, kw_only=True)
class SearchModes:
  """What searching by embeddings, by words and by both found.

  Attributes:
    num_questions: whose passages of use are known.
    num_passages: that were there then.
    metrics: by mode; "reciprocal ranks" is hybrid search without weights.
    weights: of embeddings and of words in hybrid search; None: reciprocal ranks
      find more.
  """

  num_questions: int
  num_passages: int
  metrics: Mapping[str, ModeMetrics]
  weights: tuple[float, float] | None

  @property
  def best(self) -> str:
    """The mode with the largest mean reciprocal rank; of equal ones the first.

    The simpler ones come first: embeddings, words, both.
    """
    return max(("dense", "bm25", "hybrid"), key=lambda m: self.metrics[m].mrr)

  @classmethod
  def from_content(cls, content: Any) -> "SearchModes":
    """Returns what `dataclasses.asdict` made, by way of JSON."""
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
    """Returns lines of a table."""
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
  modes: SearchModes | None = None  # of a search directory, if asked for
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
      # Plain objects, which can be copied: those of a manifest name its file.
      content = json.loads(json.dumps(dict(content)))
      content["recalls"] = tuple(Recall(**r) for r in content["recalls"])
      if content.get("coverage") is not None:
        content["coverage"] = Coverage(**content["coverage"])
      content["queries_per_second"] = {
        int(size): float(speed)  # JSON has no keys but strings
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
      " others; questions may find less"
    )

  def _size(self, size: int) -> str:
    each = size / self.num_passages
    return f"{_bytes(size)}, {each:,.0f} bytes a passage"


def _check_types(certificate: Certificate) -> None:
  """Raises `ValueError` unless the numbers are numbers, and the texts texts."""
  for recall in certificate.recalls:
    numbers = (recall.mean, recall.low, recall.high)
    if not _is_count(recall.k) or not all(map(_is_number, numbers)):
      raise ValueError(f"recalls are {recall!r:.200}")
  for name in ("kind", "sample"):
    if not isinstance(getattr(certificate, name), str):
      raise ValueError(f"{name} is {getattr(certificate, name)!r:.80}")
  if not isinstance(certificate.settings, Mapping):
    raise ValueError(f"settings are {certificate.settings!r:.80}")
  for name in (
    "num_passages", "embedding_dim", "num_questions", "speed_k", "num_cpus",
    "memory_bytes", "disk_bytes", "build_peak_bytes",
  ):  # fmt: skip
    value = getattr(certificate, name)
    needed = name not in ("disk_bytes", "build_peak_bytes")
    least = 1 if name in ("num_passages", "embedding_dim") else 0
    if value is None and not needed:
      continue
    if not _is_count(value) or int(value or 0) < least:
      raise ValueError(f"{name} is {value!r:.80}")
  modes = certificate.modes
  found = modes.metrics.values() if modes else ()
  measured = [v for m in found for v in dataclasses.astuple(m)]
  measured += (modes and modes.weights) or ()
  if not all(map(_is_number, measured)):
    raise ValueError(f"modes are {modes!r:.200}")
  secs = certificate.build_secs
  if secs is not None and not _is_number(secs):
    raise ValueError(f"build_secs are {secs!r:.80}")


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
  return type(value) in (int, float) and abs(value) < 1e300


def _interval(recall: Recall) -> str:
  return (
    f"{recall.mean:.4f} (95% interval {recall.low:.4f} to {recall.high:.4f})"
  )


def _bytes(size: int) -> str:
  for unit, factor in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
    if size >= 2**factor:
      return f"{size / 2**factor:,.1f} {unit}"
  return f"{size} bytes"
