"""The metrics beyond exact match: chosen, averaged, resampled, compared."""

import dataclasses
import json

import numpy as np
import pytest
import sacrebleu

from rag_jax.data.questions import Question
from rag_jax.decoding.answerer import Answer
from rag_jax.evaluation import answer_metrics
from rag_jax.evaluation import differences
from rag_jax.evaluation import text_overlap
from rag_jax.evaluation.answer_metrics import METRICS
from rag_jax.evaluation.answer_metrics import check_metrics
from rag_jax.evaluation.answer_metrics import choose_metrics
from rag_jax.evaluation.answer_metrics import compare
from rag_jax.evaluation.answer_metrics import metrics
from rag_jax.evaluation.answers_page import write_summary
from rag_jax.evaluation.judged_answers import JudgedAnswer
from rag_jax.evaluation.judged_answers import judge
from rag_jax.evaluation.judged_answers import line_of
from rag_jax.evaluation.judged_answers import read_judged

_RIGHT = "the cat sat on the mat and slept"


def judged(number, prediction, *, precision=None, answers=(_RIGHT,)):
  right = float(prediction in answers)
  return JudgedAnswer(
    question=f"q{number}", answers=answers, relation="", prediction=prediction,
    log_prob=-1.0, exact_match=right, token_f1=right, num_retrieved=5,
    answer_rank=0, docs=({"title": "Cats", "text": "The cat sat."},),
    r_precision=precision,
    gold_recall_at_5=None if precision is None else 1.0,
  )  # fmt: skip


def answers_of(seed, number=30):
  rng = np.random.default_rng(seed)
  words = [*_RIGHT.split(), "dog", "ran"]
  return [
    judged(i, " ".join([*_RIGHT.split()[: rng.integers(8)],
                        *rng.choice(words, 3)]))
    for i in range(number)
  ]  # fmt: skip


def test_kilt_scores_count_where_r_precision_is_one():
  answers = [
    judged(0, _RIGHT, precision=1.0),
    judged(1, _RIGHT, precision=0.5),
    judged(2, "dog", precision=1.0),
    judged(3, _RIGHT),  # no gold passage is known
  ]
  found = metrics(answers, ["kilt"])["all"]
  assert set(found) == {
    "num_questions", "log_prob", "r_precision", "gold_recall_at_5",
    "kilt_exact_match", "kilt_token_f1", "kilt_accuracy", "kilt_rougeL",
  }  # fmt: skip
  assert found["num_questions"] == 4
  assert found["r_precision"]["mean"] == pytest.approx(2.5 / 3)
  for name in ("exact_match", "token_f1", "accuracy", "rougeL"):
    kilt = found[f"kilt_{name}"]
    assert (kilt["mean"], kilt["num_questions"]) == (pytest.approx(1 / 3), 3)
  none = metrics([judged(0, _RIGHT)], ["em", "kilt"])["all"]
  assert set(none) == {"num_questions", "log_prob", "exact_match"}


def test_accuracy_is_to_the_letter():
  answers = [
    judged(0, "SUPPORTS ", answers=("SUPPORTS",)),
    judged(1, "supports", answers=("SUPPORTS",)),
  ]
  assert metrics(answers, ["accuracy"])["all"]["accuracy"]["mean"] == 0.5


def test_lengths_and_copies_are_described():
  answers = [judged(i, text) for i, text in enumerate(
    ["the cat sat", "cat dog", "", "dog ran the cat sat well"]
  )]  # fmt: skip
  found = metrics(answers, ["length", "copy"])["all"]
  words = found["answer_words"]
  assert (words["mean"], words["median"]) == (2.75, 2.5)
  assert (words["least"], words["most"]) == (0.0, 6.0)
  assert 0 < words["low"] < 2.75 < words["high"] < 6
  assert found["answer_characters"]["most"] == 24.0
  assert found["accepted_words"]["mean"] == 8.0
  assert found["answered"]["mean"] == 0.75
  copies = found["copied_words"]
  assert copies["num_questions"] == 3
  assert copies["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3)
  trigrams = found["copied_trigrams"]
  assert trigrams["num_questions"] == 2
  assert trigrams["mean"] == pytest.approx((1 + 0.25) / 2)
  different = compare(answers, [*answers[:3], judged(3, "dog")], ["length"])
  assert different["answer_words"]["difference"] == 1.25
  assert different["answer_words"]["better"] == 1


def test_bleu_is_resampled_as_a_slow_loop_does(monkeypatch):
  monkeypatch.setattr(differences, "_CORPUS_RESAMPLES", 40)
  answers, others = answers_of(0), answers_of(1)

  def score(of, rows):
    texts = [of[i].prediction for i in rows]
    return sacrebleu.corpus_bleu(texts, [[_RIGHT] * len(rows)]).score

  rng = np.random.default_rng(0)
  draws = []
  for _ in range(40):
    times = rng.multinomial(30, np.full(30, 1 / 30))
    draws.append([i for i, number in enumerate(times) for _ in range(number)])
  expected = np.quantile(
    [score(answers, rows) for rows in draws], [0.025, 0.975]
  )
  found = metrics(answers, ["bleu"])["all"]["bleu"]
  assert found["mean"] == pytest.approx(score(answers, range(30)))
  assert [found["low"], found["high"]] == pytest.approx(expected)
  assert found["low"] < found["mean"] < found["high"]

  drawn = [score(answers, rows) - score(others, rows) for rows in draws]
  paired = compare(answers, others, ["bleu"])["bleu"]
  assert [paired["low"], paired["high"]] == pytest.approx(
    np.quantile(drawn, [0.025, 0.975])
  )
  assert paired["difference"] == pytest.approx(
    score(answers, range(30)) - score(others, range(30))
  )


def test_the_p_value_of_bleu_tells_like_from_unlike():
  answers = answers_of(0)
  assert compare(answers, answers, ["bleu"])["bleu"]["p"] == 1.0
  like = compare(answers, answers_of(1), ["bleu"])["bleu"]
  assert like["p"] > 0.05
  unlike = [judged(i, "dog ran " + _RIGHT[:11]) for i in range(30)]
  found = compare([judged(i, _RIGHT) for i in range(30)], unlike, ["bleu"])
  assert found["bleu"]["p"] < 0.005
  # All resamples of equal answers are equal, which is no certainty.
  assert found["bleu"]["low"] < found["bleu"]["difference"]
  every = metrics(unlike, ["bleu"])["all"]["bleu"]
  assert every["low"] < every["mean"] < every["high"] < 100


def test_metrics_are_chosen_by_what_there_is(monkeypatch):
  assert choose_metrics(
    [], variant="squad", has_gold=True, has_knowledge=True
  ) == (METRICS, ())
  chosen, notes = choose_metrics([], variant="regex", has_gold=True)
  assert chosen == ("em", "f1", "recall", "copy")
  assert notes[0] == (
    "Not measured: accuracy, since the accepted answers are patterns, not"
    " texts."
  )
  with pytest.raises(
    ValueError, match="'kilt' cannot be computed: no question"
  ):
    choose_metrics(["em", "kilt"], variant="squad", has_gold=False)
  with pytest.raises(
    ValueError, match=r"no metric 'meteor'\. Expected some of em,"
  ):
    check_metrics(["em", "meteor"])
  with pytest.raises(ValueError, match="one is given twice"):
    check_metrics(["em", "em"])

  monkeypatch.setattr(text_overlap.importlib.util, "find_spec", lambda _: None)
  chosen, notes = choose_metrics([], variant="squad", has_gold=False)
  assert chosen == ("em", "f1", "accuracy", "recall", "length", "copy")
  assert notes[0].endswith('rouge, since it needs the extra `eval`: pip install'
                           ' -e ".[eval]".')  # fmt: skip
  with pytest.raises(
    ImportError, match="'bleu' is computed by sacrebleu, which"
  ):
    choose_metrics(["bleu"], variant="squad", has_gold=False)


def test_everything_is_in_the_file_the_tables_and_the_page(tmp_path):
  answers = [judged(i, _RIGHT, precision=float(i % 2)) for i in range(4)]
  others = [judged(i, "dog ran off", precision=1.0) for i in range(4)]
  found, tables = write_summary(
    tmp_path, "title", answers, others, chosen=METRICS, notes=["A < note."]
  )
  names = {row[0] for row in dict(tables)["Metrics"]}
  assert {"exact_match", "rouge2", "bleu", "kilt_rougeL", "answer_words",
          "copied_trigrams", "r_precision", "accuracy"} <= names  # fmt: skip
  compared = {row[0] for row in dict(tables)["Difference"]}
  assert compared == names
  assert found["notes"] == ["A < note."]
  html = (tmp_path / "report.html").read_text()
  assert "A &lt; note." in html
  assert all(name in html for name in names)


def test_lines_keep_the_gold_scores_and_older_lines_have_none(tmp_path):
  answers = [judged(0, "x", precision=0.5), judged(1, "y")]
  path = tmp_path / "answers.jsonl"
  path.write_text("".join(line_of(x) + "\n" for x in answers))
  assert read_judged(path) == answers
  older = line_of(answers[1]).replace(', "r_precision": null', "")
  older = older.replace(', "gold_recall_at_5": null', "")
  assert "r_precision" not in older
  path.write_text(older + "\n")
  assert read_judged(path) == [answers[1]]
  path.write_text(line_of(answers[0]).replace("0.5", '"high"') + "\n")
  with pytest.raises(ValueError, match=r"answers.jsonl:1: .*r_precision"):
    read_judged(path)


def test_a_length_is_no_share_of_questions():
  same = [judged(i, "one two three") for i in range(5)]
  found = answer_metrics.metrics(same, ["length"])["all"]["answer_words"]
  assert found["mean"] == 3.0
  assert 0 < found["low"] < 3.0 <= found["high"]


def test_knowledge_is_measured_where_it_is_known():
  known = [
    Question("Why?", ("So",), knowledge="The sea is blue, blue."),
    Question("Why?", ("So",), knowledge="Nothing of it."),
    Question("Why?", ("So",)),
  ]
  answer = Answer(
    question="Why?", text="A blue sky!", log_prob=-0.5, tokens=(),
    token_log_probs=(), docs=(), question_cut=False, retrieved=(),
  )  # fmt: skip
  answers = [
    judge(answer, q, [], variant="squad", language="en") for q in known
  ]
  # One shared word of 2 ("a" is an article), and of sea, is, blue, blue.
  assert [x.knowledge_f1 for x in answers] == [2 * 1 / (2 + 4), 0.0, None]
  found = metrics(answers, ["knowledge"])["all"]["knowledge_f1"]
  assert found["mean"] == pytest.approx(1 / 6)
  assert found["num_questions"] == 2
  assert "knowledge_f1" not in metrics(answers, ["em"])["all"]
  (regex,) = [judge(answer, known[0], [], variant="regex", language="en")]
  assert regex.knowledge_f1 == 1 / 3
  chosen, notes = choose_metrics([], variant="squad", has_gold=True)
  assert "knowledge" not in chosen
  assert notes == (
    "Not measured: knowledge, since no question has a text of knowledge.",
  )
  with pytest.raises(ValueError, match="'knowledge' cannot be computed: no q"):
    choose_metrics(["knowledge"], variant="squad", has_gold=True)


def test_dialogues_are_parts_by_how_far_they_are(tmp_path):
  histories = ((), ("a", "b"), ("a", "b"), ("a", "b", "c", "d"), ("b",))
  answers = [
    dataclasses.replace(judged(i, _RIGHT), history=turns)
    for i, turns in enumerate(histories)
  ]
  found = metrics(answers, ["em"])
  assert {
    name: part["num_questions"]
    for name, part in found.items()
    if "dialogue" in name
  } == {
    "question 1 of a dialogue": 1,
    "question 2 of a dialogue": 3,
    "question 3 of a dialogue": 1,
  }
  assert not any("dialogue" in name for name in metrics([answers[0]], ["em"]))
  path = tmp_path / "answers.jsonl"
  path.write_text("".join(line_of(x) + "\n" for x in answers))
  assert read_judged(path) == answers
  # Older files do not name them.
  old = json.loads(line_of(answers[0]))
  del old["history"], old["knowledge_f1"]
  path.write_text(json.dumps(old) + "\n")
  assert read_judged(path) == [answers[0]]
  # The same question after other turns is another one.
  moved = [dataclasses.replace(answers[1], history=("c", "d"))]
  with pytest.raises(ValueError, match="different questions: 1 of 1"):
    compare(answers[1:2], moved)
