"""Answers compared with the right ones: lines, metrics, a comparison, a page.

In: questions with the answers that a model wrote. Out: `JudgedAnswer`s, which
are kept as JSON lines; means with intervals, for all questions and for parts of
them; the difference between two models on the same questions; and an HTML page
with the worst answers, which holds everything it shows.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import math
from typing import Any

from etils import epath
from jaxtyping import Float
import jinja2
import numpy as np
from scipy import stats

from rag_jax import artifacts
from rag_jax.corpus.text_files import read_records
from rag_jax.data.questions import Question
from rag_jax.decoding.answerer import Answer
from rag_jax.evaluation.answers import exact_match
from rag_jax.evaluation.answers import token_f1
from rag_jax.evaluation.retrieval import contains_answer
from rag_jax.retrieval.intervals import mean_interval
from rag_jax.terminal import json_line

LINES = "answers.jsonl"
_DEPTHS = (1, 5, 10, 20, 50, 100)  # of answer recall
_WORDS = ((1, 5), (6, 10), (11, 20), (21, None))  # parts by length of question
_WORST = 50  # answers on the page
_RESAMPLES = 10_000
_SEED = 0


@dataclasses.dataclass(frozen=True, slots=True)
class JudgedAnswer:
  """One question, its answer, and how right that is."""

  question: str
  answers: tuple[str, ...]  # accepted
  relation: str  # kind of question; "": not known
  prediction: str
  log_prob: float  # of the prediction, in nats
  exact_match: float  # 0 or 1
  token_f1: float
  num_retrieved: int
  # Of the first passage that holds an accepted answer, from 1; 0: none does.
  answer_rank: int
  docs: tuple[dict[str, Any], ...]  # that were read: see `AnswerDoc`


def judge(
  answer: Answer,
  question: Question,
  retrieved_texts: Sequence[str],
  *,
  variant: str,
  language: str,
) -> JudgedAnswer:
  """Returns how right an answer is.

  Args:
    answer: to the question.
    question: with the accepted answers.
    retrieved_texts: title and text of what was retrieved, best first.
    variant: how answers are compared; see answers.py.
    language: its articles are ignored.
  """
  accepted = question.answers
  ranks = (
    rank
    for rank, text in enumerate(retrieved_texts, start=1)
    if contains_answer(text, accepted, variant)
  )
  return JudgedAnswer(
    question=question.question,
    answers=accepted,
    relation=question.relation,
    prediction=answer.text,
    log_prob=answer.log_prob,
    exact_match=exact_match(answer.text, accepted, variant, language),
    token_f1=token_f1(answer.text, accepted, variant, language),
    num_retrieved=len(retrieved_texts),
    answer_rank=next(ranks, 0),
    docs=tuple(
      {
        name: getattr(doc, name)
        for name in ("id", "title", "text", "score", "prior", "posterior")
      }
      for doc in answer.docs
    ),
  )


def line_of(judged: JudgedAnswer) -> str:
  """Returns the line of a file of answers, without its end."""
  return json_line(dataclasses.asdict(judged))


def read_judged(path: epath.PathLike) -> list[JudgedAnswer]:
  """Returns the answers in a file, or in that of a directory.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is no such answer; begins with `path:line`.
  """
  path = epath.Path(path).expanduser()
  path = path / LINES if path.is_dir() else path
  if not path.exists():
    raise FileNotFoundError(
      f"There is no {path}; expected the {LINES} that rag-jax evaluate wrote."
      " Evaluate the model first, or correct the path."
    )
  kinds = {
    "question": str, "answers": list, "relation": str, "prediction": str,
    "log_prob": (int, float), "exact_match": (int, float),
    "token_f1": (int, float), "num_retrieved": int, "answer_rank": int,
    "docs": list,
  }  # fmt: skip
  found = []
  for _, record in read_records(path, required=kinds):
    values = {name: record[name] for name in kinds}
    values |= {name: tuple(values[name]) for name in ("answers", "docs")}
    found.append(JudgedAnswer(**values))
  return found


def _means(judged: Sequence[JudgedAnswer]) -> dict[str, Any]:
  """Returns metrics with their 95 % intervals."""
  values: dict[str, list[float]] = {
    "exact_match": [x.exact_match for x in judged],
    "token_f1": [x.token_f1 for x in judged],
  }
  depth = min(x.num_retrieved for x in judged)
  for k in sorted({k for k in _DEPTHS if k <= depth} | ({depth} - {0})):
    values[f"answer_recall_at_{k}"] = [
      float(0 < x.answer_rank <= k) for x in judged
    ]
  means: dict[str, Any] = {"num_questions": len(judged)}
  for name, numbers in values.items():
    low, high = mean_interval(np.array(numbers))
    means[name] = {"mean": float(np.mean(numbers)), "low": low, "high": high}
  means["log_prob"] = float(np.mean([x.log_prob for x in judged]))
  return means


def metrics(judged: Sequence[JudgedAnswer]) -> dict[str, dict[str, Any]]:
  """Returns the metrics of all questions ("all"), and of parts of them.

  Parts are "relation: NAME", if relations are known, and "words: A to B" by the
  length of the question.

  Raises:
    ValueError: there are no answers.
  """
  if not judged:
    raise ValueError(
      "There are no answers to measure; expected at least one. Is the file of"
      " questions empty?"
    )
  parts = {"all": list(judged)}
  for relation in sorted({x.relation for x in judged} - {""}):
    parts[f"relation: {relation}"] = [
      x for x in judged if x.relation == relation
    ]
  for first, last in _WORDS:
    name = f"words: {first} to {last}" if last else f"words: {first} or more"
    parts[name] = [
      x
      for x in judged
      if first <= max(len(x.question.split()), 1) <= (last or math.inf)
    ]
  return {name: _means(part) for name, part in parts.items() if part}


def compare(
  judged: Sequence[JudgedAnswer], others: Sequence[JudgedAnswer]
) -> dict[str, Any]:
  """Returns how much better `judged` is than `others` on the same questions.

  By metric: the mean difference, its 95 % interval (bootstrap over questions)
  and the p value of no difference, two-sided: of McNemar's exact test for exact
  match, of random signs of the differences for F1.

  Raises:
    ValueError: the questions are not the same, or one has other right answers.
  """
  pairs = list(_pairs(judged, others))
  found: dict[str, Any] = {"num_questions": len(pairs)}
  for name in ("exact_match", "token_f1"):
    difference = np.array(
      [getattr(a, name) - getattr(b, name) for a, b in pairs]
    )
    low, high = _difference_interval(difference)
    test = _mcnemar if name == "exact_match" else _random_signs
    found[name] = {
      "difference": float(difference.mean()),
      "low": low,
      "high": high,
      "p": test(difference),
      "better": int(np.sum(difference > 0)),
      "worse": int(np.sum(difference < 0)),
    }
  return found


def _pairs(
  judged: Sequence[JudgedAnswer], others: Sequence[JudgedAnswer]
) -> Iterator[tuple[JudgedAnswer, JudgedAnswer]]:
  def key(x: JudgedAnswer) -> tuple[str, ...]:
    return (x.question, *x.answers)

  left: dict[tuple[str, ...], list[JudgedAnswer]] = {}
  for other in others:
    left.setdefault(key(other), []).append(other)
  missing = []
  for one in judged:
    same = left.get(key(one))
    if same:
      yield one, same.pop(0)
    else:
      missing.append(one.question)
  more = sum(map(len, left.values()))
  if missing or more:
    example = f", for instance {missing[0]!r}" if missing else ""
    raise ValueError(
      f"The two were asked different questions: {len(missing)} of"
      f" {len(judged)} are not among the other's{example}, and {more} of"
      f" {len(others)} are only there. Expected the same questions with the"
      " same right answers. Evaluate both on one file."
    )


def _difference_interval(
  difference: Float[np.ndarray, "B"],
) -> tuple[float, float]:
  if np.all(difference == difference[0]):
    # All resamples are equal, which would claim certainty: see `mean_interval`.
    low, high = mean_interval((difference + 1) / 2)
    return 2 * low - 1, 2 * high - 1
  found = stats.bootstrap(
    (difference,), np.mean, n_resamples=_RESAMPLES, method="percentile",
    rng=np.random.default_rng(_SEED), batch=100,
  )  # fmt: skip
  interval = found.confidence_interval
  return float(interval.low), float(interval.high)


def _mcnemar(difference: Float[np.ndarray, "B"]) -> float:
  better, worse = np.sum(difference > 0), np.sum(difference < 0)
  if not better + worse:
    return 1.0
  return float(stats.binomtest(int(better), int(better + worse)).pvalue)


def _random_signs(difference: Float[np.ndarray, "B"]) -> float:
  if not np.any(difference):
    return 1.0
  found = stats.permutation_test(
    (difference,), np.mean, permutation_type="samples", vectorized=True,
    n_resamples=_RESAMPLES, rng=np.random.default_rng(_SEED), batch=100,
  )  # fmt: skip
  return float(found.pvalue)


def _number(found: dict[str, float]) -> str:
  return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def rows_of(parts: dict[str, dict[str, Any]]) -> list[list[str]]:
  """Returns a table of `metrics`: a header, and a row for each part."""
  names = [
    name for name in parts["all"] if isinstance(parts["all"][name], dict)
  ]
  rows = [["questions", "number", *names]]
  for part, found in parts.items():
    numbers = (_number(found[x]) if x in found else "" for x in names)
    rows.append([part, str(found["num_questions"]), *numbers])
  return rows


def difference_rows(found: dict[str, Any]) -> list[list[str]]:
  """Returns a table of what `compare` found."""
  rows = [["metric", "difference", "p", "better", "worse"]]
  for name, of in found.items():
    if isinstance(of, dict):
      size = f"{of['difference']:+.3f} ({of['low']:+.3f} to {of['high']:+.3f})"
      counts = str(of["better"]), str(of["worse"])
      rows.append([name, size, f"{of['p']:.2g}", *counts])
  return rows


# Whatever is put into it is escaped.
_PAGE = jinja2.Environment(autoescape=True).from_string("""\
<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<title>{{ title }}</title><style>
body{font:15px/1.5 sans-serif;margin:2em auto;max-width:70em;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}
td,th{border-bottom:1px solid #ddd;padding:.2em .7em;text-align:left}
.doc{color:#333;margin:.3em 0 .3em 1.5em}.wrong{color:#b03000}
h3{margin-bottom:.2em}
</style></head><body><h1>{{ title }}</h1>
{% for heading, rows in tables %}<h2>{{ heading }}</h2><table>
<tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>{% endfor %}
<h2>Worst answers</h2>
<p>Wrong ones, the surest first: {{ worst|length }} of {{ num_wrong }}.</p>
{% for x in worst %}<h3>{{ x.question }}</h3>
<div><span class="wrong">{{ x.prediction or "(no answer)" }}</span>
(log p {{ "%.2f"|format(x.log_prob) }}, F1 {{ "%.2f"|format(x.token_f1) }});
right: {{ x.answers|join(" / ") }};
{% if x.answer_rank %}passage {{ x.answer_rank }} holds it{% else %}
no retrieved passage holds it{% endif %}</div>
{% for doc in x.docs %}<details class="doc"><summary>
p(z|x) {{ "%.2f"|format(doc.prior) }}, p(z|x,y)
{{ "%.2f"|format(doc.posterior) }}: {{ doc.title }} [{{ doc.id }}]</summary>
{{ doc.text }}</details>{% endfor %}{% endfor %}
</body></html>
""")


def page(
  title: str,
  judged: Sequence[JudgedAnswer],
  tables: Sequence[tuple[str, list[list[str]]]],
) -> str:
  """Returns the page: tables, and the worst answers with what was read."""
  wrong = [x for x in judged if not x.exact_match]
  worst = sorted(wrong, key=lambda x: -x.log_prob)[:_WORST]
  return _PAGE.render(
    title=title, tables=tables, worst=worst, num_wrong=len(wrong)
  )


def write_summary(
  path: epath.PathLike,
  title: str,
  judged: Sequence[JudgedAnswer],
  against: Sequence[JudgedAnswer] = (),
) -> tuple[dict[str, Any], list[tuple[str, list[list[str]]]]]:
  """Writes metrics.json and report.html; returns the metrics and tables.

  Args:
    path: the directory.
    title: of the page.
    judged: all answers.
    against: of another model, to the same questions; empty: none.

  Raises:
    ValueError: there are no answers, or the questions differ.
  """
  path = epath.Path(path)
  found: dict[str, Any] = {"metrics": metrics(judged)}
  tables = [("Metrics", rows_of(found["metrics"]))]
  if against:
    found["difference"] = compare(judged, against)
    tables.append(("Difference", difference_rows(found["difference"])))
  text = json.dumps(found, indent=2, sort_keys=True) + "\n"
  artifacts.write_atomically(path / "metrics.json", text)
  artifacts.write_atomically(path / "report.html", page(title, judged, tables))
  return found, tables
