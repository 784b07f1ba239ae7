"""Dialogues about the bundled world, made of its questions.

In: the questions of one split of world_facts. Out: these, each the first turn
of a dialogue; and for most of them a dialogue in which the same is asked after
something else was:

    What is the capital of France?  Paris  And its currency?

A later question names nothing, so that nobody can answer it without the turns
before it. All turns of a dialogue are of one split, and about an entity that
the other splits do not know.
"""

from collections.abc import Sequence
import dataclasses

from rag_jax.corpus.folding import fold
from rag_jax.data.questions import Question

FOLLOW_UP = ", later turn"  # the end of such a question's relation

# What is asked of an entity that was named before.
_LATER = {
  "capital": (
    "And its capital?",
    "What is its capital?",
    "Which city is the capital there?",
  ),
  "currency": (
    "And its currency?",
    "What is its currency?",
    "Which currency is used there?",
  ),
  "calling_code": (
    "And its calling code?",
    "What is its calling code?",
    "What code do I dial to call there?",
  ),
  "continent": (
    "And its continent?",
    "On which continent is it?",
    "Which continent does it belong to?",
  ),
  "country": (
    "And its country?",
    "In which country is it?",
    "What country does it belong to?",
  ),
  "population": (
    "And its population?",
    "How many people live there?",
    "How many inhabitants does it have?",
  ),
}
_EVERY = 3  # dialogue has a turn more before its question, if there is a fact


def with_dialogues(questions: Sequence[Question]) -> tuple[Question, ...]:
  """Returns questions, and dialogues that end with the same ones.

  Args:
    questions: of one split, with ids like country/FR/capital/0.
  """
  about: dict[str, list[Question]] = {}
  for question in questions:
    about.setdefault(_entity(question), []).append(question)
  made = list(questions)
  for number, question in enumerate(questions):
    history = _history(number, question, about[_entity(question)])
    said = fold(" ".join(history))
    if history and fold(question.answers[0]) not in said:
      made.append(
        dataclasses.replace(
          question,
          question=_later(question.relation, number),
          id=question.id + "/later",
          relation=question.relation + FOLLOW_UP,
          history=history,
        )
      )
  return tuple(made)


def _entity(question: Question) -> str:
  return question.id.rsplit("/", 2)[0]


def _later(relation: str, number: int) -> str:
  return _LATER[relation][number % len(_LATER[relation])]


def _history(
  number: int, question: Question, same: Sequence[Question]
) -> tuple[str, ...]:
  """Returns what is said before a question; () if nothing else is asked."""
  others = [q for q in same if q.relation != question.relation]
  if not others or question.relation not in _LATER:
    return ()
  first = others[number % len(others)]
  turns = [first.question, first.answers[0]]
  third = [q for q in others if q.relation != first.relation]
  if third and not number % _EVERY:
    then = third[number % len(third)]
    turns += [_later(then.relation, number), then.answers[0]]
  return tuple(turns)
