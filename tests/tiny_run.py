"""A tiny experiment on disk, and functions to run it in this process.

A run has 4 warm-up steps and 12 steps. Nearly all of its time is compilation,
so it compiles without optimizing and caches the programs: runs that differ only
in where they stop, validate and save share them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import pathlib
import signal
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from rag_jax.api import configs
from rag_jax.api import runs
from rag_jax.config import Config
from rag_jax.config_rules import validate as validate_config
from rag_jax.data.experiment import Experiment
from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import Question
from rag_jax.data.questions import load_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.training import loop
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.metrics import MetricWriter
from rag_jax.training.metrics import read_metrics
from rag_jax.training.search_in_step import abstract_index
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.state import abstract_state
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state

PASSAGES = 40
WARMUP_STEPS, STEPS = 4, 12
LAST = WARMUP_STEPS + STEPS  # name of the last checkpoint

# As tools/train.py reads it. A version of the index is built at the steps 4, 8
# and 12 and first searched at 6, 10 and 14.
CONFIG = '''"""The tiny experiment of the tests."""

from rag_jax.config import Config


def get_config():
  """Returns the settings that differ from the defaults."""
  c = Config()
  c.data.passages = {passages!r}
  c.data.questions = {questions!r}
  c.data.n_docs = 2
  c.data.question_length = 16
  c.data.passage_length = 24
  c.data.context_length = 40
  c.data.target_length = 8
  c.data.substitute_answers = 0.5
  c.tokenizer.vocab_size = 600
  c.encoder.embed_dim = 16
  c.generator.num_layers = 1
  c.generator.embed_dim = 16
  c.generator.mlp_dim = 16
  c.generator.max_positions = 64
  c.warmup.num_steps = 4
  c.warmup.batch_size = 8
  c.warmup.warmup_steps = 2
  c.warmup.span_max_tokens = 5
  c.optimizer.peak_lr = 1e-2
  c.optimizer.retriever_lr = 1e-2
  c.optimizer.warmup_steps = 2
  c.optimizer.schedule = "constant"
  c.optimizer.weight_decay = 0.01
  c.index.kind = "exact"
  c.index.refresh_steps = 4
  c.index.swap_steps = 2
  c.index.embed_batch_size = 16
  c.train.num_steps = 12
  c.train.batch_size = 8
  c.train.log_steps = 1
  c.train.validate_steps = 3
  c.train.checkpoint_steps = 3
  c.eval.batch_size = 8
  return c
'''

_WATCHED = ("log_steps", "validate_steps", "checkpoint_steps",
            "keep_checkpoints", "peak_tflops", "profile_steps")  # fmt: skip


class Tiny:
  """The files of the experiment, and ways to run it."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    self.passages = root / "passages.jsonl"
    self.questions = root / "questions"
    self.config_file = root / "tiny.py"
    # For a process that shall compile what is not compiled yet, alike.
    self.environment = {
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    self._opened: dict[str, tuple[Experiment, Answerer, dict]] = {}
    _write_corpus(self.passages, self.questions)
    self.config_file.write_text(
      CONFIG.format(passages=str(self.passages), questions=str(self.questions))
    )

  def config(self, **changes: object) -> Config:
    """Returns the config with `section__name=value` changed."""
    config = configs.load_config(self.config_file)
    for name, value in changes.items():
      section, _, field = name.rpartition("__")
      setattr(getattr(config, section) if section else config, field, value)
    return validate_config(config)

  def split(self, name: str) -> tuple[Question, ...]:
    """Returns the questions of a split."""
    return load_questions(str(self.questions), name)

  def open(self, config: Config) -> tuple[Experiment, Answerer, dict]:
    """Returns the experiment, what answers, and what was compiled for them."""
    tree = dataclasses.asdict(config)
    for name in _WATCHED:
      del tree["train"][name]
    key = json.dumps(tree)
    if key not in self._opened:
      experiment = open_experiment(config)
      self._opened[key] = (experiment, Answerer(experiment), {})
    experiment, answerer, compiled = self._opened[key]
    return dataclasses.replace(experiment, config=config), answerer, compiled

  def train(
    self,
    path: pathlib.Path,
    config: Config,
    *,
    validate: Callable[..., dict[str, float]] | None = None,
    measure: bool = False,
    stop_at: tuple[str, int] | None = None,
    resume_from: int | None = None,
    spoil: Callable[[int, dict], dict] = lambda step, metrics: metrics,
  ) -> "Run":
    """Runs what is left of a run with `rag_jax.train`.

    What takes long is done once for all runs: opening the experiment and
    compiling.

    Args:
      path: the workdir.
      config: of the run.
      validate: replaces the validation; by default no question is answered, and
        every metric is 0.
      measure: whether to answer questions, for validation and at the end.
      stop_at: stage and step at which a SIGTERM arrives.
      resume_from: as --resume_from.
      spoil: (step, metrics) -> metrics, of every update.
    """
    experiment, answerer, compiled = self.open(config)
    run = Run(self, path, config, experiment, compiled)
    finish = runs.finish

    def opened(config: Config, *, tokenizer_path: Any, **_: Any) -> Experiment:
      experiment.tokenizer.save(tokenizer_path)
      return experiment

    def finished(*args: Any) -> dict[str, Any]:
      run.clock = args[4]
      return finish(*args) if measure else {}

    with pytest.MonkeyPatch.context() as patch, self.compiling():
      patch.setattr(runs, "open_experiment", opened)
      patch.setattr(runs, "Answerer", lambda *_: answerer)
      patch.setattr(runs, "finish", finished)
      if not measure:
        measured = validate or find_nothing
        patch.setattr(Evaluator, "validator", lambda *_: measured)
      patch.setattr(loop, "compile_update", _compile_once(compiled, spoil))
      if stop_at:
        patch.setattr(MetricWriter, "write", _write_and_stop(*stop_at))
      try:
        run.results = runs.train(config, path, resume_from=resume_from)
      except StoppedEarlyError as stopped:
        run.stopped = stopped
    return run

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """Compiles as a process with `environment` does, and keeps it."""
    settings = {
      "jax_disable_most_optimizations": True,
      "jax_compilation_cache_dir": str(self.root / "compiled"),
      "jax_persistent_cache_min_compile_time_secs": 0.0,
      "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    try:
      for name, value in settings.items():
        jax.config.update(name, value)
      # Whether there is a cache is asked once, at the first compilation.
      compilation_cache.reset_cache()
      yield
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()


@dataclasses.dataclass
class Run:
  """A run in this process, and what it left."""

  tiny: Tiny
  path: pathlib.Path
  config: Config
  experiment: Experiment
  compiled: dict[str, Any]  # for its config, and what else takes long
  clock: loop.Clock | None = None
  results: dict[str, Any] = dataclasses.field(default_factory=dict)
  stopped: StoppedEarlyError | None = None

  @property
  def metrics(self) -> list[dict[str, Any]]:
    """The lines of its metrics.jsonl."""
    return read_metrics(self.path / "metrics.jsonl")

  @property
  def steps(self) -> list[int]:
    """Those that there is a checkpoint of."""
    return self._checkpoints().steps()

  def extra(self, step: int) -> dict[str, Any]:
    """Returns what the checkpoint of `step` holds beside the state."""
    return self._checkpoints().read_extra(step)

  def state(self, step: int = LAST) -> dict[str, np.ndarray]:
    """Returns every array of the checkpoint of `step`, by its path."""
    stage = self.extra(step)["stage"]
    if f"{stage} state" not in self.compiled:
      params, layout = self._first_params()
      optimizer = stage_optimizer(self.config, stage, params)
      state = make_state(params, layout, optimizer, self.experiment.mesh)
      abstract = abstract_state(*state)
      if stage == "train":
        index = abstract_index(self.experiment, params)
        abstract = abstract.replace(index=index)
      self.compiled[f"{stage} state"] = abstract
    abstract = self.compiled[f"{stage} state"]
    return flat(self._checkpoints().restore(abstract, step)[0])

  def first_state(self) -> dict[str, np.ndarray]:
    """Returns the parameters before the first step, by their path."""
    return flat({"params": self._first_params()[0]})

  def _first_params(self) -> Any:
    if "params" not in self.compiled:
      key = jax.random.key(self.config.seed)
      with self.tiny.compiling():
        self.compiled["params"] = init_params(
          self.experiment.init, key, self.experiment.mesh
        )
    return self.compiled["params"]

  def _checkpoints(self) -> Checkpointer:
    return Checkpointer(self.path / "checkpoints", keep_last=100)


def find_nothing(*_: object) -> dict[str, float]:
  """Returns what a validation finds that answers nothing."""
  return {"validation/exact_match": 0.0}


def flat(tree: Any) -> dict[str, np.ndarray]:
  """Returns the arrays of a pytree by their path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_bit_equal(
  one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> None:
  """Raises `AssertionError` unless every array is the same to the last bit."""
  assert set(one) == set(other)
  different = [
    name
    for name, x in one.items()
    if (x.dtype, x.shape, x.tobytes())
    != (other[name].dtype, other[name].shape, other[name].tobytes())
  ]
  assert not different, different[:3]


def _write_corpus(passages: pathlib.Path, questions: pathlib.Path) -> None:
  """Writes 40 passages, and 40, 10 and 10 questions about them."""
  rng = np.random.default_rng(0)
  starts = ("Bal", "Cor", "Den", "Fir", "Gol", "Hum", "Jas", "Kel", "Lor")
  ends = ("ania", "burg", "dor", "ford", "ina", "mark", "ovia", "stan", "wick")
  words = [start + end for start in starts for end in ends]
  words = [words[i] for i in rng.permutation(len(words))[: 2 * PASSAGES]]
  facts = [
    ("river" if i % 2 else "capital", words[i], words[PASSAGES + i])
    for i in range(PASSAGES)
  ]
  _write_lines(
    passages,
    [
      {"id": str(i), "title": name, "text": f"The {relation} is {answer}."}
      for i, (relation, name, answer) in enumerate(facts)
    ],
  )
  asked = [
    {
      "question": f"What is the {relation} of {name}?",
      "answers": [answer],
      "relation": relation,
    }
    for relation, name, answer in facts
  ]
  again = [q | {"question": "Tell: " + q["question"]} for q in asked[:20]]
  questions.mkdir()
  _write_lines(questions / "train.jsonl", asked)
  _write_lines(questions / "validation.jsonl", again[:10])
  _write_lines(questions / "test.jsonl", again[10:])


def _write_lines(path: pathlib.Path, records: Sequence[dict]) -> None:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _compile_once(
  compiled: dict[str, Any], spoil: Callable[[int, dict], dict]
) -> Callable[..., Any]:
  """Returns a `compile_update` that compiles each stage a single time."""
  compile_update = loop.compile_update

  def compile_once(*args: Any) -> Any:
    return _Lowered(compile_update(*args), args[4], compiled, spoil)

  return compile_once


class _Lowered:
  """Stands for a function of `jax.jit` while it is lowered and compiled."""

  def __init__(
    self,
    function: Any,
    stage: str,
    compiled: dict[str, Any],
    spoil: Callable[[int, dict], dict],
  ):
    self._function, self._stage = function, stage
    self._compiled, self._spoil = compiled, spoil

  def lower(self, *args: Any) -> "_Lowered":
    """Compiles, unless it was done before."""
    if self._stage not in self._compiled:
      self._compiled[self._stage] = self._function.lower(*args).compile()
    return self

  def compile(self) -> Callable[..., Any]:
    """Returns what was compiled."""
    update = self._compiled[self._stage]

    def spoiled(*args: Any) -> Any:
      state, metrics = update(*args)
      return state, self._spoil(int(state.step), metrics)

    return spoiled


def _write_and_stop(stage: str, step: int) -> Callable[..., None]:
  """Returns a `MetricWriter.write` during which a SIGTERM arrives."""
  write = MetricWriter.write

  def write_and_stop(
    self: MetricWriter, at: int, of: str, metrics: Mapping[str, Any]
  ) -> None:
    write(self, at, of, metrics)
    if (of, at) == (stage, step):
      # To this thread: os.kill may choose another, and act a little later.
      signal.raise_signal(signal.SIGTERM)

  return write_and_stop
