"""Reads the dialogues of data sets, turn by turn.

In: JSON objects of Wizard of Wikipedia and of CMU-DoG. Out: each turn of the
one who knows, with what was said before it. question_files.py reads the files,
and our own form, where a question has a `history`.

- Wizard of Wikipedia (Dinan et al. 2019, https://arxiv.org/abs/1811.01241), as
  ParlAI downloads it: a list of objects with `dialog`. Its turns have a `text`
  and a `speaker` such as "0_Wizard" or "1_Apprentice". Each turn of the wizard
  is an answer. `checked_sentence` is the knowledge, an object of one sentence;
  its name ("self_Title_of_the_page_0") or `checked_passage` has the title of
  the page. If the wizard begins, `chosen_topic` stands for the apprentice's
  first turn.
- KILT (https://arxiv.org/abs/2009.02252) has the same dialogues with a turn in
  each line of `input`. Nothing else marks them, so every input of several lines
  is a dialogue, but for those of entity linking.
- CMU-DoG (Zhou et al. 2018, https://arxiv.org/abs/1809.07358): objects with a
  `history` of {"docIdx", "text", "uid"}: one conversation, a list of them, or
  an object of them by id, as ParlAI packs them. Each turn of someone in
  `whoSawDoc` (without it: of both) that has a turn before it is an answer. The
  document is elsewhere: if wiki_data.json (ParlAI's, documents by
  `wikiDocumentIdx`) is in the folder of the file, or in the one above it, the
  section that was shown is the knowledge.

Turns of one speaker that follow one another become one, joined by spaces, with
the knowledge of all of them. ParlAI does the same for CMU-DoG.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

from etils import epath

from rag_jax.corpus.folding import is_blank
from rag_jax.corpus.text_files import check_fields
from rag_jax.corpus.text_files import decode_text
from rag_jax.corpus.text_files import read_bytes
from rag_jax.corpus.text_files import shorten
from rag_jax.json_input import parse_json

EXPECTED = (
  "a dialogue of Wizard of Wikipedia ('dialog' with turns of 'speaker' and"
  " 'text') or of CMU-DoG ('history' with turns of 'uid' and 'text')"
)
_ENTITY = "[START_ENT]"  # in KILT's inputs for entity linking
_NOTHING = "no_passages_used"
_DOCUMENTS = "wiki_data.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
  """A turn, the answer, and what was said before it."""

  where: str  # for messages
  question: str  # the turn before the answer
  history: tuple[str, ...]  # the turns before the question
  answer: str
  knowledge: str = ""
  title: str = ""  # of the page of the knowledge; "" if not known


@dataclasses.dataclass(slots=True)
class _Turn:
  where: str
  speaker: str
  text: str
  is_answer: bool
  knowledge: str = ""
  title: str = ""


def dialogues_of(tree: Any) -> list[tuple[str, Any]] | None:
  """Returns the dialogues in parsed JSON with their places; None: it has none.

  Args:
    tree: of a file.
  """
  if is_dialogue(tree):
    return [("", tree)]
  items: list[tuple[str, Any]] = []
  if isinstance(tree, list):
    items = [(f":[{number}]", one) for number, one in enumerate(tree)]
  elif isinstance(tree, dict):
    items = [(f":[{name!r}]", one) for name, one in tree.items()]
  # The first decides, so that a bad one later is named by its place.
  return items if items and is_dialogue(items[0][1]) else None


def is_dialogue(record: Any) -> bool:
  """Returns whether a JSON object is a dialogue of one of the two data sets."""
  if not isinstance(record, dict) or {"question", "input"} & set(record):
    return False
  turns = record.get("dialog", record.get("history"))
  return "dialog" in record or (
    isinstance(turns, list)
    and any(isinstance(turn, dict) and "uid" in turn for turn in turns)
  )


class DialogueReader:
  """Reads the dialogues of one file."""

  def __init__(self, path: epath.Path):
    self._path = path

  def exchanges(self, record: Any, where: str) -> Iterator[Exchange]:
    """Yields the turns of a dialogue that answer another one, in their order.

    Args:
      record: a JSON object.
      where: its file and place, for messages.

    Raises:
      ValueError: it is no dialogue, or a turn cannot be used; names its place.
    """
    if not is_dialogue(record):
      raise ValueError(
        f"{where}: {shorten(record)} is no dialogue, as the first one is."
        f" Expected {EXPECTED}. Correct or remove it."
      )
    is_wizard = "dialog" in record
    name = "dialog" if is_wizard else "history"
    check_fields(record, where, required={name: list})
    read = _wizard_turn if is_wizard else self._cmu_turn(record, where)
    turns = []
    for number, turn in enumerate(record[name]):
      place = f"{where}.{name}[{number}]"
      if not isinstance(turn, dict):
        raise ValueError(
          f"{place} is {shorten(turn)}. Expected an object with the text of a"
          " turn. Correct or remove it."
        )
      turns.append(read(turn, place))
    if is_wizard and turns and turns[0].is_answer:
      check_fields(record, where, required={"chosen_topic": str})
      turns.insert(0, _Turn(where, "", record["chosen_topic"], False))
    said: list[str] = []
    for turn in _joined(turns):
      if turn.is_answer and said:
        yield Exchange(
          where=turn.where,
          question=said[-1],
          history=tuple(said[:-1]),
          answer=turn.text,
          knowledge=turn.knowledge,
          title=turn.title,
        )
      said.append(turn.text)

  def _cmu_turn(
    self, conversation: Mapping[str, Any], where: str
  ) -> Callable[[Mapping[str, Any], str], _Turn]:
    """Returns a function that reads a turn of a conversation."""
    check_fields(
      conversation,
      where,
      required={},
      optional={"whoSawDoc": list, "wikiDocumentIdx": int},
    )
    saw = conversation.get("whoSawDoc")
    number = conversation.get("wikiDocumentIdx")
    documents = self._documents if number is not None else {}
    document = documents.get(str(number), {})

    def read(turn: Mapping[str, Any], where: str) -> _Turn:
      check_fields(
        turn,
        where,
        required={"uid": str, "text": str},
        optional={"docIdx": int},
      )
      knows = saw is None or turn["uid"] in saw
      section = document.get(str(turn.get("docIdx", 0)), "") if knows else ""
      text = " ".join(turn["text"].split())
      return _Turn(where, turn["uid"], text, knows, _section(section))

    return read

  @functools.cached_property
  def _documents(self) -> Mapping[str, Any]:
    """The documents beside or above the file; {}: there are none."""
    for folder in (self._path.parent, self._path.parent.parent):
      file = folder / _DOCUMENTS
      if not file.exists():
        continue
      try:
        tree = parse_json(decode_text(read_bytes(file), file))
      except ValueError as error:
        raise ValueError(
          f"{file} cannot be read ({error}). Expected the documents of CMU-DoG"
          " by their number. Correct or remove it."
        ) from error
      if isinstance(tree, dict) and all(
        isinstance(document, dict) for document in tree.values()
      ):
        return tree
      raise ValueError(
        f"{file} holds {shorten(tree)}. Expected an object with the documents"
        " of CMU-DoG by their number, each with sections by their number."
        " Correct or remove it."
      )
    return {}


def _joined(turns: Sequence[_Turn]) -> list[_Turn]:
  """Returns turns of alternating speakers, without those that say nothing."""
  joined: list[_Turn] = []
  for turn in turns:
    if is_blank(turn.text):
      continue
    last = joined[-1] if joined else None
    if last is None or last.speaker != turn.speaker:
      joined.append(turn)
      continue
    last.text = f"{last.text} {turn.text}"
    known = (last.knowledge, turn.knowledge)
    last.knowledge = " ".join(dict.fromkeys(filter(None, known)))
    last.title = last.title or turn.title
  return joined


def _wizard_turn(turn: Mapping[str, Any], where: str) -> _Turn:
  check_fields(turn, where, required={"speaker": str, "text": str})
  speaker = turn["speaker"].rpartition("_")[2]
  if speaker not in ("Wizard", "Apprentice"):
    raise ValueError(
      f"{where}: the speaker is {shorten(turn['speaker'])}. Expected one whose"
      " name ends in 'Wizard' or 'Apprentice', such as '0_Wizard'. Correct it."
    )
  checked = {}
  for name in ("checked_sentence", "checked_passage"):
    value = turn.get(name) or {}  # null and {}: nothing was chosen
    check_fields({name: value}, where, required={name: dict})
    checked[name] = next(iter(value.items()), ("", ""))
    if not isinstance(checked[name][1], str):
      raise ValueError(
        f"{where}: field {name!r} holds {shorten(checked[name][1])}. Expected"
        " an object with one text. Correct it."
      )
  key, sentence = checked["checked_sentence"]
  title = ""
  if sentence == _NOTHING or key == _NOTHING:
    sentence = ""
  elif sentence:
    title = " ".join(key.split("_")[1:-1]) or checked["checked_passage"][1]
  return _Turn(
    where,
    speaker,
    turn["text"].strip(),
    speaker == "Wizard",
    sentence.strip(),
    "" if title == _NOTHING else title,
  )


def _section(section: Any) -> str:
  """Returns a section of a document, which is a text or an object of facts."""
  if isinstance(section, dict):
    return " ".join(filter(None, map(_section, section.values())))
  if isinstance(section, list):
    return " ".join(filter(None, map(_section, section)))
  return section.strip() if isinstance(section, str) else ""


def history_of(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
  """Returns the earlier turns of a question in our form; () if it has none.

  Args:
    record: whose `history`, if there is one, is a list.
    where: its file and place, for messages.

  Raises:
    ValueError: a turn is no text.
  """
  turns = record.get("history", [])
  for number, turn in enumerate(turns):
    if not isinstance(turn, str) or is_blank(turn):
      raise ValueError(
        f"{where}: field 'history' has {shorten(turn)} at place {number}."
        " Expected the texts of earlier turns, the oldest first, of the one who"
        " asks and the one who answers in turn. Correct it."
      )
  return tuple(turns)


def kilt_turns(text: str) -> tuple[tuple[str, ...], str]:
  """Returns the earlier turns and the last one of an input of KILT."""
  lines = [line.strip() for line in text.split("\n") if not is_blank(line)]
  if len(lines) < 2 or _ENTITY in text:
    return (), text
  return tuple(lines[:-1]), lines[-1]
