"""Summarises answered questions as results.json and as a table.

In: one `AnswerRecord` per question. Out: named numbers with an interval, as a
table of 80 columns and as WORKDIR/results.json. This file is written last: a
run that has it has ended.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

from etils import epath
import numpy as np

from rag_jax import artifacts
from rag_jax.evaluation.answers import exact_match
from rag_jax.evaluation.answers import token_f1
from rag_jax.retrieval.certificate import Certificate
from rag_jax.retrieval.intervals import mean_interval
from rag_jax.terminal import one_line

RESULTS_FILE = "results.json"
RECALL_K = 5  # of answer_recall_at_5
CERTIFICATE = "index/certificate"  # among the results: of the index
FINGERPRINTS = "fingerprints"  # among them: of passages and test questions

_WIDTH = 80
_RELATION_WIDTH = 34


@dataclasses.dataclass(slots=True, kw_only=True, frozen=True)
class AnswerRecord:
  """One question, its predicted answer, and its retrieved passages."""

  question: str
  answers: tuple[str, ...]  # accepted answers
  relation: str = ""  # kind of fact, such as "capital"; "" if not known
  prediction: str
  log_prob: float  # of the prediction, in nats
  retrieved_ids: tuple[int | str, ...] = ()  # passages, best first; () if none
  # Whether one of the first RECALL_K passages holds an answer.
  answer_in_top: bool = False
  answer_in_first: bool = False  # whether the first one does


def summarise(
  records: Sequence[AnswerRecord],
  prefix: str = "test",
  *,
  variant: str = "multilingual",
  language: str = "en",
) -> dict[str, float]:
  """Returns the mean metrics of `records`, all from 0 to 1, by name.

  These are exact_match with its 95% interval (`exact_match_low`,
  `exact_match_high`), token_f1, num_questions, and unless nothing was retrieved
  (closed book) answer_recall_at_1 and _at_5. Those of exact_match,
  num_questions and answer_recall_at_5 are also given per relation, as
  `PREFIX/exact_match/RELATION`.

  Args:
    records: one per question.
    prefix: of the names; the split, for instance "test".
    variant: how answers are compared; see answers.py.
    language: its articles are ignored in comparisons.

  Raises:
    ValueError: there are no records.
  """
  if not records:
    raise ValueError(
      f"There are no answers to summarise for {prefix!r}; expected at least one"
      " question. Is the split empty?"
    )
  hits = np.array(
    [
      exact_match(r.prediction, r.answers, variant, language) == 1.0
      for r in records
    ]
  )
  f1s = np.array(
    [token_f1(r.prediction, r.answers, variant, language) for r in records]
  )
  in_top = np.array([r.answer_in_top for r in records])
  in_first = np.array([r.answer_in_first for r in records])
  relations = np.array([r.relation for r in records])
  has_docs = any(r.retrieved_ids for r in records)

  low, high = mean_interval(hits)
  result = {
    f"{prefix}/exact_match_low": low,
    f"{prefix}/exact_match_high": high,
    f"{prefix}/token_f1": float(f1s.mean()),
  }
  if has_docs:
    result[f"{prefix}/answer_recall_at_1"] = float(in_first.mean())
  for relation in ["", *sorted(set(relations) - {""})]:
    chosen = relations == relation if relation else np.full(len(records), True)
    tail = f"/{relation}" if relation else ""
    result[f"{prefix}/num_questions{tail}"] = float(chosen.sum())
    result[f"{prefix}/exact_match{tail}"] = float(hits[chosen].mean())
    if has_docs:
      name = f"{prefix}/answer_recall_at_{RECALL_K}{tail}"
      result[name] = float(in_top[chosen].mean())
  return result


def table(results: Mapping[str, Any], prefix: str = "test") -> str:
  """Returns `results` as text of at most 80 columns.

  Args:
    results: from `summarise` with the same `prefix`. Optional entries about the
      run: `PREFIX/index_recall_at_5`, `index/certificate`, `train/seconds`,
      `train/questions_per_second`, `train/peak_memory_bytes` and `seed`.
    prefix: of the names that are shown.
  """
  recall = f"{prefix}/answer_recall_at_{RECALL_K}"
  count = f"{prefix}/num_questions"
  lines = [
    f"{prefix}: {results[count]:,.0f} questions",
    "",
    f"exact match       {results[f'{prefix}/exact_match']:.3f}"
    f"   95% interval {results[f'{prefix}/exact_match_low']:.3f}"
    f" to {results[f'{prefix}/exact_match_high']:.3f}",
    f"token F1          {results[f'{prefix}/token_f1']:.3f}",
    f"answer recall@{RECALL_K}   " + _share(results.get(recall)),
    "",
  ]
  relations = [
    name.removeprefix(f"{count}/")
    for name in sorted(results)
    if name.startswith(f"{count}/")
  ]
  if relations:
    lines.append(
      _row("relation", "questions", "exact match", f"answer recall@{RECALL_K}")
    )
    for relation in relations:
      lines.append(
        _row(
          relation,
          f"{results[f'{count}/{relation}']:,.0f}",
          _share(results[f"{prefix}/exact_match/{relation}"]),
          _share(results.get(f"{recall}/{relation}")),
        )
      )
    lines.append("")
  return "\n".join([*lines, *_run_lines(results, prefix)]).rstrip() + "\n"


def write_results(workdir: epath.PathLike, results: Mapping[str, Any]) -> None:
  """Writes `results` to WORKDIR/results.json atomically, sorted by name.

  The file has a digest, with which `read_results` detects any change.

  Raises:
    ValueError: a number is not finite, which JSON cannot hold.
  """
  plain = {name: _plain(name, value) for name, value in results.items()}
  whole = artifacts.with_digest(plain)
  text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False)
  artifacts.write_atomically(epath.Path(workdir) / RESULTS_FILE, text + "\n")


def read_results(path: epath.PathLike) -> dict[str, Any]:
  """Returns the results that `write_results` wrote.

  Args:
    path: the file, or the workdir that holds it.

  Raises:
    FileNotFoundError: there is no such file: the run has not ended.
    ValueError: it is not a JSON object, was cut off or edited, or is a link.
  """
  path = epath.Path(path)
  path = path / RESULTS_FILE if path.is_dir() else path
  if not path.exists():
    raise FileNotFoundError(
      f"There is no {path}: the run has not ended, since it writes its results"
      " last. Start it again with the same workdir and it continues, or check"
      " the path."
    )
  remedy = "Remove it and start the run again with the same workdir."
  return artifacts.read_json(path, remedy)


def _share(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"


def _row(relation: str, questions: str, match: str, recall: str) -> str:
  relation = one_line(relation)
  if len(relation) > _RELATION_WIDTH:
    relation = relation[: _RELATION_WIDTH - 3] + "..."
  row = f"{relation:<{_RELATION_WIDTH}} {questions:>9}  {match:>11}"
  row += f"  {recall:>15}"
  assert len(row) <= _WIDTH, "a count of more than nine digits"
  return row


def _run_lines(results: Mapping[str, Any], prefix: str) -> Iterator[str]:
  """Yields what is known about the run itself."""
  if f"{prefix}/index_recall_at_{RECALL_K}" in results:
    recall = results[f"{prefix}/index_recall_at_{RECALL_K}"]
    yield f"index recall@{RECALL_K}    {recall:.3f}   against exact search"
  if CERTIFICATE in results:
    yield from _certificate_lines(results[CERTIFICATE])
  if "train/seconds" in results:
    secs = results["train/seconds"]
    yield f"training          {secs:,.0f} s, without compilation"
  if "train/questions_per_second" in results:
    yield f"questions/s       {results['train/questions_per_second']:,.0f}"
  if "train/peak_memory_bytes" in results:
    peak = results["train/peak_memory_bytes"]
    yield f"peak memory       {peak / 2**30:.2f} GiB"
  if "seed" in results:
    yield f"seed              {results['seed']}"


def _certificate_lines(content: Mapping[str, Any]) -> Iterator[str]:
  """Yields the certificate of the index, shorter than its own table."""
  certificate = Certificate.from_content(content)
  sample = f"{certificate.num_questions:,} {certificate.sample}"
  yield f"index             {certificate.kind}, certified on {sample}"
  for recall in certificate.recalls:
    yield (
      f"{f'  recall@{recall.k}':<17} {recall.mean:.3f}"
      f"   95% interval {recall.low:.3f} to {recall.high:.3f}"
    )
  for size, speed in sorted(certificate.queries_per_second.items()):
    yield f"  questions/s     {speed:,.0f}, {size} at a time"
  each = certificate.memory_bytes / certificate.num_passages
  yield f"  memory          {each:,.0f} bytes per passage"


def _plain(name: str, value: Any) -> Any:
  """Returns `value` as plain JSON types, arrays without axes as numbers."""
  if isinstance(value, Mapping):
    return {str(k): _plain(f"{name}.{k}", v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(f"{name}[{i}]", v) for i, v in enumerate(value)]
  if getattr(value, "shape", None) == ():
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(
      f"The result {name}={value} is not finite; expected a number, since JSON"
      " has no other. Leave out what was not measured; if it was, the run"
      " diverged: lower the learning rate."
    )
  return value
