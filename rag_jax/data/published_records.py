"""Questions of TriviaQA and WebQuestions, in the fields of our own files.

In: a JSON object as their authors publish it. Out: an object with `question`,
`answers` and perhaps `id`; any other object unchanged.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any

from rag_jax.corpus.text_files import check_fields
from rag_jax.corpus.text_files import shorten

_DESCRIPTION = r'\(description\s+(?:"((?:[^"\\]|\\.)*)"|([^\s()"]+))\)'
_LIST = re.compile(rf"\(list(?:\s+{_DESCRIPTION})+\)")
_ITEM = re.compile(_DESCRIPTION)
_ALSO = ("Aliases", "HumanAnswers")
# At Hugging Face.
_LOWER = {
  "Question": "question", "QuestionId": "question_id", "Answer": "answer",
  "Value": "value", "Aliases": "aliases", "HumanAnswers": "human_answers",
}  # fmt: skip


def as_ours(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
  """Returns an object with our names of the fields.

  - TriviaQA (Joshi et al. 2017, https://arxiv.org/abs/1705.03551): the value is
    the first answer; its aliases, and what people answered, count as right too.
    As in its own files, or with names in lower case as at Hugging Face.
  - WebQuestions (Berant et al. 2013, https://aclanthology.org/D13-1160): each
    description of the target value counts as right.

  Args:
    record: any JSON object.
    where: file and line, or place, for messages.

  Raises:
    ValueError: it is one of these, but a field is not as published.
  """
  if "utterance" in record and "targetValue" in record:
    return _web_questions(record, where)
  if "Question" in record and "QuestionId" in record:
    return _trivia_qa(record, where, str)
  answer = record.get("answer")
  if isinstance(answer, dict) and "value" in answer:
    return _trivia_qa(record, where, _LOWER.__getitem__)
  return record


def _trivia_qa(
  record: Mapping[str, Any], where: str, name: Callable[[str], str]
) -> dict[str, Any]:
  """Returns a question of TriviaQA, whose fields `name` gives the names of."""
  ours = {"question": record.get(name("Question"))}
  if name("QuestionId") in record:
    ours["id"] = record[name("QuestionId")]
  if record.get(name("Answer")) is None:
    return ours  # of the test split
  check_fields(record, where, required={name("Answer"): dict})
  answer, lists = record[name("Answer")], [name(n) for n in _ALSO]
  check_fields(
    answer,
    f"{where}.{name('Answer')}",
    required={name("Value"): str},
    optional=dict.fromkeys(lists, list),
  )
  texts = [answer[name("Value")]]
  for other in lists:
    texts += answer.get(other, [])
  return ours | {"answers": [text for text in texts if text != ""]}


def _web_questions(record: Mapping[str, Any], where: str) -> dict[str, Any]:
  check_fields(record, where, required={"utterance": str, "targetValue": str})
  target = record["targetValue"].strip()
  if not _LIST.fullmatch(target):
    raise ValueError(
      f"{where}: field 'targetValue' is {shorten(target)}. Expected"
      ' WebQuestions\' list, such as (list (description "Jamaican English")'
      " (description Patois)). Correct or remove the question."
    )
  answers = [
    re.sub(r"\\(.)", r"\1", quoted) or bare
    for quoted, bare in _ITEM.findall(target)
  ]
  return {"question": record["utterance"], "answers": answers}
