"""One tiny experiment on disk, and what it takes to run it in this process.

Several test files share its runs. Most of a run is compilation, so programs
that were compiled once are kept for the session.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import pathlib
import signal
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from rag_jax.config import Config
from rag_jax.config import validate
from rag_jax.data.experiment import Experiment
from rag_jax.data.experiment import open_experiment
from rag_jax.data.questions import Question
from rag_jax.data.questions import load_questions
from rag_jax.decoding.answerer import Answerer
from rag_jax.evaluation.evaluate import Evaluator
from rag_jax.evaluation.finish import finish
from rag_jax.training import loop
from rag_jax.training.checkpoint import Checkpointer
from rag_jax.training.interrupt import StoppedEarlyError
from rag_jax.training.metrics import MetricWriter
from rag_jax.training.metrics import read_metrics
from rag_jax.training.stages import stage_optimizer
from rag_jax.training.state import abstract_state
from rag_jax.training.state import init_params
from rag_jax.training.state import make_state
from rag_jax.training.workdir import Workdir
from rag_jax.training.workdir import open_workdir

PASSAGES, WARMUP_STEPS, STEPS = 40, 4, 12

# A config file of its own, as tools/train.py reads it.
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
  c.tokenizer.vocab_size = 600
  c.encoder.embed_dim = 16
  c.encoder.mlp_dim = 16
  c.generator.num_layers = 1
  c.generator.embed_dim = 16
  c.generator.mlp_dim = 16
  c.generator.max_positions = 64
  c.warmup.num_steps = 4
  c.warmup.batch_size = 8
  c.warmup.warmup_steps = 2
  c.warmup.span_max_tokens = 5
  c.warmup.window_tokens = 8
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


def _write_lines(path: pathlib.Path, records: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _facts() -> list[tuple[str, str, str]]:
  """Returns (relation, name, answer): half of them capitals, half rivers."""
  rng = np.random.default_rng(0)
  starts = ["Bal", "Cor", "Den", "Fir", "Gol", "Hum", "Jas", "Kel", "Lor"]
  ends = ["ania", "burg", "dor", "ford", "ina", "mark", "ovia", "stan"]
  names = [start + end for start in starts for end in ends]
  names = [names[i] for i in rng.permutation(len(names))]
  return [
    ("river" if i % 2 else "capital", names[i], names[-1 - i // 2])
    for i in range(PASSAGES)
  ]


class Tiny:
  """The files of the experiment, and ways to run it."""

  def __init__(self, root: pathlib.Path, compiled: pathlib.Path):
    self.root = root
    self.compiled = compiled  # where compiled programs are kept
    self.passages = root / "passages.jsonl"
    self.questions = root / "questions"
    self.config_file = root / "tiny.py"
    facts = _facts()
    _write_lines(
      self.passages,
      [
        {"id": str(i), "title": name, "text": f"The {relation} is {answer}."}
        for i, (relation, name, answer) in enumerate(facts)
      ],
    )
    asked = [
      {"question": text, "answers": [answer], "relation": relation}
      for relation, name, answer in facts
      for text in (
        f"What is the {relation} of {name}?",
        f"Which {relation} has {name}?",
      )
    ]
    splits = {
      "train": asked[:40],
      "validation": asked[40:50],
      "test": asked[50:60],
    }
    for split, records in splits.items():
      _write_lines(self.questions / f"{split}.jsonl", records)
    self.config_file.write_text(
      CONFIG.format(passages=str(self.passages), questions=str(self.questions))
    )

  def config(self, **changes: object) -> Config:
    """Returns the config with `section__name=value` changed."""
    scope: dict = {}
    exec(self.config_file.read_text(), scope)
    config = scope["get_config"]()
    for name, value in changes.items():
      section, _, field = name.rpartition("__")
      setattr(getattr(config, section) if section else config, field, value)
    return validate(config)

  def split(self, name: str) -> tuple[Question, ...]:
    """Returns the questions of a split."""
    return load_questions(str(self.questions), name)

  def train(
    self,
    path: pathlib.Path,
    config: Config,
    validate: Callable | None = None,
    stop_at: tuple[str, int] | None = None,  # (stage, step)
    measure: bool = False,
  ) -> "Run":
    """Runs what is left of a run, as tools/train.py does.

    Args:
      path: the workdir.
      config: of the run.
      validate: in place of answering the validation questions; by default
        nothing is answered, and every validation says 0.
      stop_at: where a SIGTERM arrives.
      measure: whether to answer questions: for validation, and at the end.
    """
    with (
      open_workdir(path, config) as workdir,
      pytest.MonkeyPatch.context() as m,
    ):
      if stop_at:
        m.setattr(MetricWriter, "write", _write_and_stop(*stop_at))
      experiment = open_experiment(config, tokenizer_path=workdir.tokenizer)
      run = Run(path, config, experiment)
      if measure:
        evaluator = Evaluator(experiment, Answerer(experiment))
        validate = evaluator.validator(self.split("validation"))
      validate = validate or (lambda *_: {"validation/exact_match": 0.0})
      try:
        run.clock = loop.train(
          experiment, self.split("train"), workdir, validate
        )
      except StoppedEarlyError as stopped:
        run.stopped = stopped
      if measure:
        run.results = finish(
          experiment, workdir, self.split("test"), evaluator, run.clock
        )
    return run


def _write_and_stop(stage: str, step: int) -> Callable:
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


@dataclasses.dataclass
class Run:
  """A run in this process, and what it left."""

  path: pathlib.Path
  config: Config
  experiment: Experiment
  clock: loop.Clock | None = None
  results: dict[str, Any] = dataclasses.field(default_factory=dict)
  stopped: StoppedEarlyError | None = None

  @property
  def metrics(self) -> list[dict[str, Any]]:
    """The lines of its metrics.jsonl."""
    return read_metrics(self.path / "metrics.jsonl")

  @property
  def steps(self) -> list[int]:
    """Those that it has a checkpoint of."""
    return self._checkpoints().steps()

  def extra(self, step: int) -> dict[str, Any]:
    """Returns what its checkpoint of `step` holds beside the state."""
    return self._checkpoints().read_extra(step)

  def state(self, step: int) -> dict[str, np.ndarray]:
    """Returns every array of its checkpoint of `step`, by path."""
    mesh = self.experiment.mesh
    params, layout = init_params(self.experiment.init, jax.random.key(0), mesh)
    stage = self.extra(step)["stage"]
    optimizer = stage_optimizer(self.config, stage, params)
    abstract = abstract_state(*make_state(params, layout, optimizer, mesh))
    return flatten(self._checkpoints().restore(abstract, step)[0])

  def first_params(self) -> dict[str, np.ndarray]:
    """Returns the parameters before the first step, by path."""
    key = jax.random.key(self.config.seed)
    params, _ = init_params(self.experiment.init, key, self.experiment.mesh)
    return flatten({"params": params})

  def _checkpoints(self) -> Checkpointer:
    return Checkpointer(self.path / "checkpoints", keep_last=100)


def flatten(tree: Any) -> dict[str, np.ndarray]:
  """Returns the arrays of a pytree by their path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
  """The tiny experiment, with a cache of compiled programs."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
  )
  before = {name: getattr(jax.config, name) for name in names}
  cache = tmp_path_factory.mktemp("compiled")
  for name, value in zip(names, (str(cache), 0.0, -1), strict=True):
    jax.config.update(name, value)
  # Whether there is a cache is asked once, at the first compilation.
  compilation_cache.reset_cache()
  yield Tiny(tmp_path_factory.mktemp("tiny"), cache)
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def uninterrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
  """A run from start to end that keeps the checkpoint of every step."""
  config = tiny.config(train__checkpoint_steps=1, train__keep_checkpoints=100)
  path = tmp_path_factory.mktemp("runs") / "uninterrupted"
  return tiny.train(path, config, measure=True)
