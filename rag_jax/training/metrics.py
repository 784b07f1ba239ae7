"""Writes the metrics of a training run, to disk and as a progress line.

In: named numbers at a step of a stage. Out: WORKDIR/metrics.jsonl, one JSON
object per line, with a digest of this line and the lines before; the same for
TensorBoard in WORKDIR/tensorboard; the text of the progress line.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import json
import math
import os
import resource
import sys
import time
from typing import Any, SupportsFloat

from absl import logging
from etils import epath

from rag_jax import artifacts
from rag_jax import disk
from rag_jax.training.tensorboard_files import close_writer
from rag_jax.training.tensorboard_files import open_writer

METRICS_FILE = "metrics.jsonl"
STAGES = (
  "warmup",
  "contrastive",
  "train",
)  # in the order in which a run passes them

_DIGEST = "digest"  # of a line and all before it, so that none can be lost
_DIGEST_CHARS = 16  # 64 bits: against damage, not against a forger
_RESERVED = ("step", "stage", "time_secs", _DIGEST)
_REMEDY = (
  "Restore the file from a copy, or delete it from that line on, which loses"
  " the metrics since then; no checkpoint depends on it."
)
# In a bucket each write uploads the whole file, and more than one a second to
# the same object is refused.
_BUCKET_SECS = 10.0


class MetricWriter:
  """Appends to metrics.jsonl and TensorBoard; does nothing if not `enabled`.

  Lines of an earlier attempt of the run are kept: call `truncate_after` with
  the step to resume from, before the first `write`. A killed run loses no line,
  except in a bucket, where it loses those of the last seconds.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    enabled: bool = True,  # on process 0 alone
    clock: Callable[[], float] = time.monotonic,  # in seconds
  ):
    """Opens the files, and removes a last line that was cut off.

    Raises:
      ValueError: metrics.jsonl has a line that is not a record of metrics.
    """
    self._enabled = enabled
    self._workdir = epath.Path(workdir)
    self._path = self._workdir / METRICS_FILE
    self._clock = clock
    self._file = None  # open for appending, while there is something to append
    self._last = ""  # digest of the last line
    self._lines = []  # all of the file in a bucket, where nothing is appended
    self._uploaded_at = 0.0
    self._tensorboards = {}  # by stage; None where it cannot be written
    # By stage: TensorBoard forgets from here on.
    self._purge_steps: dict[str, int] = {}
    if enabled:
      self._workdir.mkdir(parents=True, exist_ok=True)
      records = read_metrics(self._path) if self._path.exists() else []
      self._rewrite(records)

  def truncate_after(self, stage: str, step: int) -> None:
    """Removes all lines after `step` of `stage`.

    A run that resumes there measures them again. Step 0 removes the whole
    stage, so `truncate_after("warmup", 0)` starts afresh.
    """
    _check_stage(stage)
    if not self._enabled:
      return
    assert not self._tensorboards, "truncate_after comes before the first write"
    here = STAGES.index(stage)
    kept = []
    if step > 0 and not self._path.exists():
      logging.warning(
        "There is no %s of the steps before %d: it was removed. Metrics from"
        " here on are written.",
        *(self._path, step),
      )
    for record in read_metrics(self._path) if self._path.exists() else []:
      there = STAGES.index(record["stage"])
      in_time = step > 0 and record["step"] <= step
      if there < here or (there == here and in_time):
        kept.append(record)
    self._rewrite(kept)
    for later in STAGES[here:]:
      self._purge_steps[later] = 0
    self._purge_steps[stage] = step + 1 if step else 0

  def write(
    self, step: int, stage: str, metrics: Mapping[str, SupportsFloat]
  ) -> None:
    """Appends `metrics`, measured after `step` updates of `stage`.

    The line also holds `time_secs`, the time since the run began, without the
    time between its attempts. Numbers that are not finite become null, since
    JSON cannot hold them.

    Raises:
      ValueError: the stage is unknown, or a metric is not a scalar or has the
        name of another field.
    """
    _check_stage(stage)
    if not self._enabled:
      return
    values = {name: _scalar(name, value) for name, value in metrics.items()}
    time_secs = self._secs_before + self._clock() - self._opened_at
    record = {"step": step, "stage": stage, "time_secs": round(time_secs, 3)}
    for name, value in values.items():
      record[name] = value if math.isfinite(value) else None
    self._append(self._line(record))
    tensorboard = self._tensorboard(stage)
    for name, value in values.items():
      if tensorboard is not None and not math.isinf(value):
        tensorboard.add_scalar(name, value, global_step=step)

  def sync(self) -> None:
    """Waits until all lines are on the disk.

    Call it before a checkpoint is saved: a power cut must not leave a
    checkpoint of steps that were never measured.
    """
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Writes lines that are still in memory; no `write` may follow.

    Raises:
      OSError: they cannot be written. Everything is closed nevertheless.
    """
    with contextlib.ExitStack() as stack:  # closes each, whichever fails
      for tensorboard in self._tensorboards.values():
        if tensorboard is not None:
          stack.callback(close_writer, tensorboard)
      self._tensorboards = {}
      if self._file is not None:
        self._file.close()
      elif self._enabled:
        self._upload()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
    """Makes `records` the whole file, and gets ready to append to it."""
    if self._file is not None:
      self._file.close()
    self._last = ""
    lines = [self._line(record) for record in records]
    text = "".join(lines)
    if self._path.exists() and self._path.read_bytes() != text.encode():
      artifacts.write_atomically(self._path, text)
    self._secs_before = records[-1]["time_secs"] if records else 0.0
    self._opened_at = self._clock()
    if artifacts.is_local(self._path):
      file = disk.open_own(
        self._path,
        os.O_WRONLY | os.O_APPEND | os.O_CREAT,
        remedy="Remove it, or choose another --workdir.",
        writes=True,
      )
      self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115
    else:
      self._file, self._lines = None, lines
      self._uploaded_at = self._opened_at

  def _line(self, record: Mapping[str, Any]) -> str:
    """Returns the next line of the file."""
    self._last = _chained(self._last, record)
    line = {**record, _DIGEST: self._last}
    return json.dumps(line, allow_nan=False) + "\n"

  def _append(self, line: str) -> None:
    if self._file is not None:
      self._file.write(line)
      self._file.flush()  # a kill -9 takes at most the line being written
      return
    self._lines.append(line)
    if self._clock() - self._uploaded_at >= _BUCKET_SECS:
      self._upload()

  def _upload(self) -> None:
    artifacts.write_atomically(self._path, "".join(self._lines))
    self._uploaded_at = self._clock()

  def _tensorboard(self, stage: str) -> Any:
    """Returns the `SummaryWriter` of a stage; None if it cannot be opened."""
    if stage not in self._tensorboards:
      # One TensorBoard run per stage: each counts its steps from 0, and purging
      # the steps of one must not affect the other.
      try:
        self._tensorboards[stage] = open_writer(
          self._workdir / "tensorboard" / stage, self._purge_steps.get(stage)
        )
      except ImportError as e:  # the client of a bucket
        logging.warning(
          "Nothing is written for TensorBoard in %s: %s. All metrics are in"
          " %s.", self._workdir, e, METRICS_FILE,
        )  # fmt: skip
        self._tensorboards[stage] = None
    return self._tensorboards[stage]


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the lines of a metrics.jsonl, oldest first, without their digests.

  An incomplete last line, as a killed run leaves it, is ignored.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another line is not a record of metrics, was changed, or one
      before it is missing; names file and line. Or the file is a link.
  """
  path = epath.Path(path)
  if not path.exists() and not os.path.islink(path):
    raise FileNotFoundError(
      f"There is no {path}: no metrics were written yet. Expected the"
      f" {METRICS_FILE} in the workdir of a run. Check the path, or train"
      " first."
    )
  data = disk.read_own(path, remedy="Remove it, or choose another workdir.")
  *lines, _ = data.decode("utf-8", "replace").split("\n")
  records, last, with_digests = [], "", True
  for number, line in enumerate(lines, start=1):
    record: Any = None
    with contextlib.suppress(ValueError, RecursionError):
      record = json.loads(line)
    digest = record.pop(_DIGEST, "") if isinstance(record, dict) else ""
    if not _is_record(record):
      raise ValueError(
        f"{path}, line {number}: {line[:80]!r} is no record of metrics;"
        " expected a JSON object with step, stage"
        f" ({' or '.join(STAGES)}), time_secs and numbers. The file was edited"
        f" or damaged. {_REMEDY}"
      )
    if number == 1:
      with_digests = bool(digest)
    last = _chained(last, record) if with_digests else ""
    if digest != last:
      raise ValueError(
        f"{path}, line {number} was damaged: it changed since it was written,"
        f" or a line before it is missing. Expected the digest {last!r}, not"
        f" {digest!r}. {_REMEDY}"
      )
    records.append(record)
  if not with_digests:
    logging.warning(
      "The lines of %s have no digests: an older version wrote them. Changes to"
      " them cannot be detected.",
      path,
    )
  return records


def _chained(last: str, record: Mapping[str, Any]) -> str:
  """Returns the digest of a line after one whose digest is `last`."""
  text = json.dumps(record, sort_keys=True, separators=(",", ":"))
  whole = hashlib.sha256(f"{last}\n{text}".encode())
  return whole.hexdigest()[:_DIGEST_CHARS]


class Progress:
  """The speed of a stage and its remaining time, in one line."""

  def __init__(
    self,
    batch_size: int,  # questions of a step; passages in the warm-up
    *,
    first_step: int = 0,  # updates already done
    window: int = 10,  # speed is averaged over this many lines
    clock: Callable[[], float] = time.monotonic,  # in seconds
  ):
    self._batch_size = batch_size
    self._clock = clock
    self._paused_secs = 0.0
    self._paused_at = None
    self._points = deque([(first_step, clock())], maxlen=window + 1)
    self._validation = {}  # last seen: most lines are not at a validation

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out the time inside the `with`: compiling, validation."""
    if self._paused_at is not None:  # nested: the outer one measures
      yield
      return
    self._paused_at = self._clock()
    try:
      yield
    finally:
      self._paused_secs += self._clock() - self._paused_at
      self._paused_at = None

  def questions_per_sec(self, step: int) -> float:
    """Returns the speed now that `step` is done; NaN while it is unknown.

    Over the last few calls, so that a slow start is soon forgotten.
    """
    now = self._clock() if self._paused_at is None else self._paused_at
    if step > self._points[-1][0]:
      self._points.append((step, now - self._paused_secs))
    (first_step, first), (last_step, last) = self._points[0], self._points[-1]
    if last <= first:
      return math.nan
    return (last_step - first_step) * self._batch_size / (last - first)

  def line(
    self,
    step: int,
    num_steps: int,
    stage: str,
    metrics: Mapping[str, SupportsFloat],
  ) -> str:
    """Returns the state of the run in at most 110 columns.

    Args:
      step: updates done of the stage.
      num_steps: updates that the stage has.
      stage: one of `STAGES`.
      metrics: the loss, the entropy of the documents and, after a validation,
        its results, which are shown until the next one. "-" stands for metrics
        that are missing.

    Raises:
      ValueError: the stage is unknown.
    """
    _check_stage(stage)
    speed = self.questions_per_sec(step)
    for name, value in metrics.items():
      if name.startswith("validation/"):
        self._validation[name] = value
    known = {**self._validation, **metrics}
    left_secs = (num_steps - step) * self._batch_size / speed
    things = "p" if stage == "warmup" else "q"  # passages, questions
    per = "question" if stage == "contrastive" else "token"
    return "  ".join((
      f"{stage:<6} {step:>{len(str(num_steps))}}/{num_steps}",
      f"loss {_short(known.get(f'{stage}/loss'), 3)} nats/{per}",
      f"EM {_short(known.get('validation/exact_match'), 2)}",
      f"recall@5 {_short(known.get('validation/answer_recall_at_5'), 2)}",
      f"H(z|x) {_short(known.get('train/doc_entropy'), 2)}",
      f"{_short(None if math.isnan(speed) else speed, 0)} {things}/s",
      f"{_duration(left_secs)} left",
    ))  # fmt: skip


def peak_memory_bytes() -> int:
  """Returns the peak host memory of this process, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # In bytes on macOS, in KiB on Linux.
  return peak if sys.platform == "darwin" else peak * 1024


def _check_stage(stage: str) -> None:
  if stage not in STAGES:
    raise ValueError(
      f"stage={stage!r} is not one of {STAGES}, the stages of a run."
    )


def _scalar(name: str, value: SupportsFloat) -> float:
  """Returns the value of a metric as a float."""
  if name in _RESERVED:
    raise ValueError(
      f"A metric is called {name!r}, which every line of {METRICS_FILE} has"
      " already. Give it another name, for instance with its stage in front."
    )
  shape = getattr(value, "shape", ())
  if shape != ():
    raise ValueError(
      f"The metric {name!r} has shape {tuple(shape)}; expected one number."
      " Take its mean."
    )
  return float(value)


def _is_record(record: Any) -> bool:
  if not isinstance(record, dict) or record.get("stage") not in STAGES:
    return False
  numbers = {k: v for k, v in record.items() if k != "stage" and v is not None}
  return (
    type(record.get("step")) is int
    and "time_secs" in numbers
    and all(type(v) in (int, float) for v in numbers.values())
  )


def _short(value: SupportsFloat | None, digits: int) -> str:
  if value is None:
    return "-"
  value = float(value)
  texts = [f"{value:.{d}f}" for d in range(digits, -1, -1)]
  # As many digits as fit into six characters.
  return next((t for t in texts if len(t) <= 6), f"{value:.0e}")


def _duration(secs: float) -> str:
  if not math.isfinite(secs):
    return "-"
  minutes, seconds = divmod(round(secs), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 24:
    return f"{hours // 24}d{hours % 24:02}h"
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"
