"""Questions, and the answers that count as right.

In: "world_facts", "world_facts_dialogue", a folder with one .jsonl file per
split, or "tfds:NAME"; and a split. Out: a tuple of `Question`, always in the
same order.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import difflib
import re
from typing import Any, cast

from absl import logging
from etils import epath

from rag_jax.corpus.documents import BUNDLED
from rag_jax.corpus.folding import is_blank
from rag_jax.corpus.text_files import shorten
from rag_jax.corpus.tfds import TFDS
from rag_jax.corpus.tfds import open_tfds
from rag_jax.corpus.tfds import tfds_errors
from rag_jax.corpus.tfds import tfds_text
from rag_jax.data.dialogue import Asked
from rag_jax.data.question_files import ENDS as QUESTION_ENDS
from rag_jax.data.question_files import Page
from rag_jax.data.question_files import read_question_file
from rag_jax.disk import instead_of

SPLITS = ("train", "validation", "test")
DIALOGUES = "world_facts_dialogue"

# TFDS data sets that are read without TensorFlow, and how to get their answers.
# Both have only the splits train and validation.
_TFDS_ANSWERS: dict[str, Callable[[Any], Iterable[str | bytes]]] = {
  "natural_questions_open": lambda example: example["answer"],
  "squad": lambda example: example["answers"]["text"],
}

# Names of a split in other data sets.
_CALLED = {
  "train": ("train",),
  "validation": ("validation", "dev", "valid", "val"),
  "test": ("test",),
}

_EXPECTED = (
  f"one of {sorted([*BUNDLED, DIALOGUES])}, a folder with train.jsonl,"
  " validation.jsonl and test.jsonl, or one of"
  f" {[TFDS + name for name in sorted(_TFDS_ANSWERS)]}"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
  """A question and all accepted answers."""

  question: str
  answers: tuple[str, ...]  # one or more
  id: str = ""
  relation: str = ""  # what kind of fact is asked for, if known
  # What answers it, if the file says so. Not in the repr, which identifies what
  # is asked.
  gold: tuple[str, ...] = dataclasses.field(default=(), repr=False)  # passages
  pages: tuple[tuple[Page, ...], ...] = dataclasses.field(  # see FoundQuestion
    default=(), repr=False
  )
  # Passages that look right and are not, if the file says so.
  negatives: tuple[str, ...] = dataclasses.field(default=(), repr=False)
  # What was said before it in a dialogue, the oldest turn first. The last one
  # is of the one who answers, the one before it of the one who asks, and so on.
  history: tuple[str, ...] = ()
  # The text that the answer is based on, if the file says so.
  knowledge: str = dataclasses.field(default="", repr=False)

  def __repr__(self) -> str:
    """Returns what is asked; as before there were dialogues, if it is none."""
    said = f", history={self.history!r}" if self.history else ""
    return (
      f"Question(question={self.question!r}, answers={self.answers!r},"
      f" id={self.id!r}, relation={self.relation!r}{said})"
    )

  @property
  def asked(self) -> str | Asked:
    """The question, with its history if there is one."""
    return Asked(self.question, self.history) if self.history else self.question

  @property
  def said(self) -> str:
    """All of the dialogue, a turn in a line."""
    return Asked(self.question, self.history).said


def read_questions(path: epath.PathLike) -> tuple[Question, ...]:
  """Returns the questions of a file.

  The file has one of the formats of `question_files.read_question_file`.
  Questions that SQuAD 2 calls impossible are left out, and counted in the log:
  they have no answer to train on or to compare with.

  Raises:
    FileNotFoundError: there is no such file; names the nearest ones.
    ValueError: names the line of a record that cannot be used, or both lines
      with the same id; or there are no questions.
  """
  questions: list[Question] = []
  places: dict[str, str] = {}
  num_impossible = 0
  for found in read_question_file(path):
    if found.impossible:
      num_impossible += 1
      continue
    if not found.answers:
      raise ValueError(
        f"{found.where}: there are no answers. Expected a list of one or more"
        ' strings that are not empty, such as ["Paris"]. Correct or remove the'
        " question."
      )
    first = places.setdefault(found.id, found.where) if found.id else None
    if first not in (None, found.where):
      raise ValueError(
        f"{found.where}: the id {found.id!r} is that of {first} too. Expected"
        " one question per id. Rename or remove one of the two."
      )
    questions.append(
      Question(
        question=found.question,
        answers=found.answers,
        id=found.id,
        relation=found.relation,
        gold=tuple(id_ for id_, grade in found.gold.items() if grade > 0),
        pages=found.pages,
        negatives=found.negatives,
        history=found.history,
        knowledge=found.knowledge,
      )
    )
  if num_impossible:
    logging.warning(
      "%s: left out %d questions that the file calls impossible to answer.",
      *(path, num_impossible),
    )
  if not questions:
    raise ValueError(
      f"{path} holds no questions. Expected at least one with an answer. Is it"
      " the right file, and was it copied completely?"
    )
  return tuple(questions)


def _split_file(source: str, split: str) -> epath.Path:
  """Returns the file of a split of a bundled corpus or of a folder."""
  folder = BUNDLED.get(source) or epath.Path(source).expanduser()
  if not source or not folder.exists():  # Path("") is this folder
    close = difflib.get_close_matches(
      source,
      [*BUNDLED, DIALOGUES, *(TFDS + name for name in _TFDS_ANSWERS)],
      n=1,
    )
    if close:
      hint = f"Did you mean {close[0]!r}?"
    else:
      there = f"{instead_of(folder)} " if source else ""
      hint = f"{there}Correct the path."
    error = FileNotFoundError if "/" in source else ValueError
    raise error(
      f"There are no questions {source!r}. Expected {_EXPECTED}. {hint}"
    )
  if not folder.is_dir():
    raise ValueError(
      f"The questions {source} are a file. Expected {_EXPECTED}. Give the"
      f" folder, {folder.parent}, and name the file after its split."
    )
  inside = sorted(p.name for p in folder.iterdir())
  found = _files_of(split, inside)
  if not found:
    names = [f"{name}.jsonl" for name in SPLITS]
    raise FileNotFoundError(
      f"The questions {source} have no {split} split: there is no"
      f" {split}.jsonl. Expected {names}, or names with one of"
      f" {list(QUESTION_ENDS)} like nq-dev.csv; the folder holds"
      f" {shorten(inside, 200)}. Add or rename the file."
    )
  if len(found) > 1:
    raise ValueError(
      f"The questions {source} have several files of the {split} split:"
      f" {shorten(found, 200)}. Expected one. Move the others elsewhere."
    )
  return folder / found[0]


def _files_of(split: str, names: Sequence[str]) -> list[str]:
  """Returns the files of a split; only SPLIT.jsonl, if there is one."""
  own = [n for n in (f"{split}.jsonl", f"{split}.jsonl.gz") if n in names]
  if own:
    return own[:1]
  called = "|".join(_CALLED[split])
  ends = "|".join(map(re.escape, QUESTION_ENDS))
  # ".qa": DPR's own names, nq-test.qa.csv.
  pattern = re.compile(
    rf"(.*[-_.])?({called})(\.qa)?({ends})(\.gz)?", re.IGNORECASE
  )
  return [name for name in names if pattern.fullmatch(name)]


def _check_tfds_name(name: str) -> None:
  """Raises `ValueError` unless the data set is a supported one."""
  if name in _TFDS_ANSWERS:
    return
  known = [TFDS + known for known in sorted(_TFDS_ANSWERS)]
  close = difflib.get_close_matches(name, _TFDS_ANSWERS, n=1)
  hint = f" Did you mean '{TFDS}{close[0]}'?" if close else ""
  raise ValueError(
    f"{TFDS}{name} is not a data set that rag_jax reads. Expected one of"
    f" {known}, which need no TensorFlow.{hint} Write the questions of another"
    " one to a folder of .jsonl files and give that folder; to open it, most"
    " of TFDS needs TensorFlow (`pip install 'rag_jax[tf]'`), without which"
    " TFDS says that there is no such data set."
  )


def _rows(split: str, num_rows: int) -> range:
  """Returns which rows of TFDS's train or validation split are our `split`."""
  num_train = num_rows - max(num_rows // 10, 1)
  if split == "train":
    return range(num_train)
  return range(num_train if split == "validation" else 0, num_rows)


def _read_tfds(name: str, split: str) -> list[Any]:
  """Returns the examples of a split, downloaded if they are not there yet."""
  tfds_split = "validation" if split == "test" else "train"
  with tfds_errors(name):
    source = cast(Sequence[Any], open_tfds(name, tfds_split))
    rows = _rows(split, len(source))
    logging.info(
      "%s%s: split %s is rows %d to %d of the %d of TFDS's %s split.",
      *(TFDS, name, split, rows.start, rows.stop, len(source), tfds_split),
    )
    return [source[row] for row in rows]


def _load_tfds(name: str, split: str) -> tuple[Question, ...]:
  """Returns the questions of a TFDS data set without a public test split.

  As in the literature, its validation split serves as the test split, and the
  last tenth of its train split as the validation split. TFDS orders the rows by
  a hash, so this tenth is a random sample, and the same one everywhere.
  """
  _check_tfds_name(name)
  examples = _read_tfds(name, split)
  questions: list[Question] = []
  for example in examples:
    answers = dict.fromkeys(map(tfds_text, _TFDS_ANSWERS[name](example)))
    question = Question(
      question=tfds_text(example["question"]),
      answers=tuple(a for a in answers if not is_blank(a)),
      id=tfds_text(example.get("id", "")),
    )
    if not is_blank(question.question) and question.answers:
      questions.append(question)
  # Not an error: a user cannot correct a published data set.
  if len(questions) < len(examples):
    logging.warning(
      "%s%s: left out %d of the %d %s questions: empty, or without an answer.",
      *(TFDS, name, len(examples) - len(questions), len(examples), split),
    )
  if not questions:
    raise ValueError(
      f"{TFDS}{name} has no questions with an answer among the"
      f" {len(examples)} rows of its {split} split. Expected at least one."
      " Delete the prepared data set, and it is prepared again."
    )
  return tuple(questions)


def load_questions(source: str, split: str) -> tuple[Question, ...]:
  """Returns the questions of one split.

  Args:
    source: "world_facts", or "world_facts_dialogue", which has dialogues made
      of these questions too; a folder with train.jsonl, validation.jsonl and
      test.jsonl, or with one file per split whose name ends like train.json or
      nq-dev.csv; "tfds:natural_questions_open"; or "tfds:squad". The two of
      TFDS have no public test split: "test" is their validation split,
      "validation" the last tenth of their train split, "train" the rest.
    split: "train", "validation" or "test".

  Raises:
    FileNotFoundError: a folder, the file of the split or a download is missing.
    ImportError: TFDS needs a package that is not installed.
    ValueError: there is no such source or split, or a record cannot be used.
  """
  if split not in SPLITS:
    close = difflib.get_close_matches(split, SPLITS, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Choose one of them."
    raise ValueError(
      f"There is no split {split!r} of the questions {source}. Expected one of"
      f" {list(SPLITS)}. {hint}"
    )
  if source.startswith(TFDS):
    return _load_tfds(source.removeprefix(TFDS), split)
  if source == DIALOGUES:
    from rag_jax.data.world_dialogues import with_dialogues  # it imports this

    return with_dialogues(read_questions(_split_file("world_facts", split)))
  return read_questions(_split_file(source, split))
