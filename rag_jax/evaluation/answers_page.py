"""Judged answers as tables and as a page.

In: `JudgedAnswer`s. Out: tables of their metrics, metrics.json, and an HTML
page with the worst answers, which holds everything it shows.
"""

from collections.abc import Collection, Mapping, Sequence
import json
from typing import Any

from etils import epath
import jinja2

from rag_jax import artifacts
from rag_jax.evaluation.answer_metrics import compare
from rag_jax.evaluation.answer_metrics import metrics
from rag_jax.evaluation.judged_answers import JudgedAnswer

_WORST = 50  # answers on the page
# Columns of the table of parts, if measured: metrics.json has all of them.
_OF_PARTS = ("exact_match", "token_f1", "rougeL", "bleu", "r_precision")
_RECALL = "answer_recall_at_"

Table = tuple[str, list[list[str]]]  # heading, rows; the first has the names


def metric_rows(found: Mapping[str, Any]) -> list[list[str]]:
  """Returns a table of the metrics of all questions, one in a row."""
  rows = [["metric", "mean", "95 % interval", "questions"]]
  for name, of in found.items():
    if isinstance(of, dict):
      number = of.get("num_questions", found["num_questions"])
      interval = f"{of['low']:.3f} to {of['high']:.3f}"
      rows.append([name, f"{of['mean']:.3f}", interval, str(number)])
  return rows


def part_rows(parts: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
  """Returns a table of some metrics of all parts, one part in a row."""
  every = parts["all"]
  recalls = [name for name in every if name.startswith(_RECALL)]
  names = [name for name in _OF_PARTS if name in every]
  names += dict.fromkeys([*recalls[:1], *recalls[-1:]])
  rows = [["questions", "number", *names]]
  for part, found in parts.items():
    numbers = (_number(found[x]) if x in found else "" for x in names)
    rows.append([part, str(found["num_questions"]), *numbers])
  return rows


def _number(found: Mapping[str, float]) -> str:
  return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def difference_rows(found: Mapping[str, Any]) -> list[list[str]]:
  """Returns a table of what `compare` found."""
  rows = [["metric", "difference", "p", "better", "worse"]]
  for name, of in found.items():
    if isinstance(of, dict):
      size = f"{of['difference']:+.3f} ({of['low']:+.3f} to {of['high']:+.3f})"
      # BLEU has no better or worse answers.
      counts = (str(of.get(x, "")) for x in ("better", "worse"))
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
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
<h2>Worst answers</h2>
<p>Wrong ones, the surest first: {{ worst|length }} of {{ num_wrong }}.</p>
{% for x in worst %}<h3>{{ x.question }}</h3>
{% for turn in x.history %}<div class="doc">{{ turn }}</div>{% endfor %}
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
  tables: Sequence[Table],
  notes: Sequence[str] = (),
) -> str:
  """Returns the page: tables, notes, the worst answers with what was read."""
  wrong = [x for x in judged if not x.exact_match]
  worst = sorted(wrong, key=lambda x: -x.log_prob)[:_WORST]
  return _PAGE.render(
    title=title,
    tables=tables,
    notes=notes,
    worst=worst,
    num_wrong=len(wrong),
  )


def write_summary(
  path: epath.PathLike,
  title: str,
  judged: Sequence[JudgedAnswer],
  against: Sequence[JudgedAnswer] = (),
  *,
  chosen: Collection[str] = ("em", "f1", "recall"),
  notes: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Table]]:
  """Writes metrics.json and report.html; returns the metrics and tables.

  Args:
    path: the directory.
    title: of the page.
    judged: all answers.
    against: of another model, to the same questions; empty: none.
    chosen: some of `METRICS`.
    notes: sentences on what was not measured.

  Raises:
    ValueError: there are no answers, or the questions differ.
    ImportError: the package of a metric is missing.
  """
  path = epath.Path(path)
  found: dict[str, Any] = {"metrics": metrics(judged, chosen)}
  tables = [
    ("Metrics", metric_rows(found["metrics"]["all"])),
    ("Parts", part_rows(found["metrics"])),
  ]
  if against:
    found["difference"] = compare(judged, against, chosen)
    tables.append(("Difference", difference_rows(found["difference"])))
  if notes:
    found["notes"] = list(notes)
  text = json.dumps(found, indent=2, sort_keys=True) + "\n"
  artifacts.write_atomically(path / "metrics.json", text)
  html = page(title, judged, tables, notes)
  artifacts.write_atomically(path / "report.html", html)
  return found, tables
