r"""Updates the documents of what rag-jax build-index wrote.

  rag-jax update-index --index=runs/index --upsert=documents/
  rag-jax update-index --index=runs/index --delete=old.md,notes/b.txt
  rag-jax update-index --index=runs/index --compact

A document of --upsert replaces the document with its id, and other documents
stay. In a folder the id is the path in the folder, so give the folder that was
built. Unchanged passages are not embedded again. A search meanwhile sees the
old state, and an interrupted update changes nothing. Texts that were deleted or
replaced are not found any more, but stay in the files until --compact writes
these anew.
"""

from absl import flags
from absl import logging
from etils import epath

from rag_jax.commands import command
from rag_jax.corpus.report import BadRecords
from rag_jax.corpus.text_files import read_texts
from rag_jax.evaluation.search_modes import fit_search_modes
from rag_jax.search.compact import compact_search_directory
from rag_jax.search.update import update_search_directory

_INDEX = flags.DEFINE_string("index", None, "The directory to update.")
_UPSERT = flags.DEFINE_string(
  "upsert", "", "Documents, as for --corpus of rag-jax build-index."
)
_DELETE = flags.DEFINE_string(
  "delete", "", "Ids: a file with one per line, or ids between commas."
)
_ENCODER = flags.DEFINE_string(
  "encoder", "", "The passage encoder; for DPR only."
)
_QUESTIONS = flags.DEFINE_string(
  "questions", "", "File with one question per line, to certify the index with."
)
_ON_BAD_RECORD = flags.DEFINE_enum(
  "on_bad_record", "", ["", *BadRecords.ACTIONS], "'': as in the build."
)
_COMPACT = flags.DEFINE_bool(
  "compact",
  False,
  "Write all files anew, without deleted and replaced texts.",
)
_FIT_HYBRID = flags.DEFINE_string("fit_hybrid", "", command.FIT_HYBRID)
_WAIT = flags.DEFINE_bool(
  "wait", False, "Wait for another process that writes there."
)
flags.mark_flag_as_required("index")


def _ids(file_or_list: str) -> list[str]:
  """Returns the ids that --delete names."""
  if file_or_list and epath.Path(file_or_list).expanduser().is_file():
    return read_texts(file_or_list)
  return [id for id in file_or_list.split(",") if id]


def main(argv: list[str]) -> None:
  """Runs the command."""
  path = _INDEX.value or ""
  questions = read_texts(_QUESTIONS.value) if _QUESTIONS.value else []
  if (
    _UPSERT.value or _DELETE.value or not (_COMPACT.value or _FIT_HYBRID.value)
  ):
    report = update_search_directory(
      path,
      upsert=_UPSERT.value or "",
      delete=_ids(_DELETE.value or ""),
      encoder=_ENCODER.value or "",
      on_bad_record=_ON_BAD_RECORD.value or "",
      questions=questions,
      wait=_WAIT.value,
    )
    print(report.text())
  if _FIT_HYBRID.value:
    modes = fit_search_modes(path, _FIT_HYBRID.value, wait=_WAIT.value)
    print("\n".join(f"{name}: {value}" for name, value in modes.rows()))
  if _COMPACT.value:
    num = compact_search_directory(path, questions=questions, wait=_WAIT.value)
    print(
      f"{num:,} passages are left; deleted texts are removed from the files."
    )


def run() -> None:
  """Runs `main`."""
  logging.set_verbosity(logging.INFO)
  command.run(
    main,
    interrupted="Stopped. What was there before is still in use: run the same"
    " command again.",
  )
