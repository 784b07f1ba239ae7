"""The stages of a run, each with its loss, batches and optimizer.

In: an experiment and its questions. Out: the warm-up and the contrastive stage,
if the config asks for them, and the main stage.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from absl import logging
from flax import linen as nn
import jax
from jaxtyping import PyTree
import numpy as np
import optax

from rag_jax.config import Config
from rag_jax.data.cloze import ClozeBatches
from rag_jax.data.context import ContextBuilder
from rag_jax.data.contrastive import ContrastiveBatches
from rag_jax.data.experiment import Experiment
from rag_jax.data.pipeline import Prepared
from rag_jax.data.pipeline import QuestionBatches
from rag_jax.data.questions import Question
from rag_jax.data.step_batches import StepBatches
from rag_jax.losses import MARGINAL_NLL_FNS
from rag_jax.losses import RetrieverLoss
from rag_jax.losses_hf import HF_NLL_FNS
from rag_jax.models import hybrid
from rag_jax.models.length_groups import LengthGroups
from rag_jax.models.length_groups import choose_groups
from rag_jax.models.packing import Packing
from rag_jax.models.packing import choose_packing
from rag_jax.models.partitioning import batch_shards
from rag_jax.models.partitioning import process_rows
from rag_jax.models.rag import ContextLayout
from rag_jax.models.rag import RagModel
from rag_jax.training.contrastive import contrastive_loss
from rag_jax.training.metrics import STAGES
from rag_jax.training.objectives import Metrics
from rag_jax.training.objectives import cloze_loss
from rag_jax.training.objectives import fid_loss
from rag_jax.training.objectives import hf_loss
from rag_jax.training.objectives import marginal_loss
from rag_jax.training.optimizer import make_optimizer
from rag_jax.training.optimizer import parameter_labels
from rag_jax.training.search_in_step import InStep
from rag_jax.training.search_in_step import open_in_step
from rag_jax.training.state import TrainState
from rag_jax.training.step import LossFn
from rag_jax.training.step import update

_NUM_LENGTHS = 2000  # of contexts, from which groups are chosen
WARMUP, CONTRASTIVE, TRAIN = STAGES


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
  """A part of the run that has its own loss, data and optimizer state."""

  name: str
  num_steps: int
  batch_size: int
  first_step: int  # counted over the run; steps of a stage count from 0
  loss_fn: LossFn
  # (step, retriever's params, index, document ids) -> batch of that step
  prepare: Callable[..., Prepared]
  in_step: InStep | None = None  # None: documents are searched between steps
  accumulate: int = 1  # parts that the gradient of a batch is computed in
  # None: contexts have one length, and a row each.
  context_layout: ContextLayout | None = None
  batches: QuestionBatches | None = None  # of the main stage

  def context_shapes(self, num_devices: int) -> dict[str, Any]:
    """Returns the fields of `StepShapes` that the layout of contexts sets."""
    num_shares = num_devices * self.accumulate
    layout = self.context_layout
    if isinstance(layout, LengthGroups):
      return {"context_groups": layout.shapes(num_shares)}
    if layout is None:
      return {}
    return {"packed_rows": (num_shares * layout.rows, layout.length)}

  @property
  def update_fn(self) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update of a step, for `compile_update`."""
    update_fn = self.in_step.update if self.in_step else update
    return functools.partial(
      update_fn, accumulate=self.accumulate, context_layout=self.context_layout
    )


def stage_optimizer(
  config: Config, name: str, params: PyTree
) -> optax.GradientTransformation:
  """Returns the optimizer of stage `name`."""
  settings = config.optimizer
  num_steps = config.train.num_steps
  if name == WARMUP:
    num_steps = config.warmup.num_steps
    settings = dataclasses.replace(
      settings,
      peak_lr=config.warmup.peak_lr,
      retriever_lr=config.warmup.retriever_lr,
      warmup_steps=config.warmup.warmup_steps,
      schedule="constant",
    )
  if name == CONTRASTIVE:
    num_steps = config.contrastive.num_steps
    settings = dataclasses.replace(
      settings,
      retriever_lr=config.contrastive.retriever_lr,
      warmup_steps=config.contrastive.warmup_steps,
    )
  if not num_steps:
    return optax.set_to_zero()  # nothing trains, and no moments are needed
  return make_optimizer(
    settings, params, num_steps, _frozen(config, name, params)
  )


def trained(config: Config, name: str, params: PyTree) -> PyTree:
  """Returns which parameters have a gradient in stage `name`."""
  labels = parameter_labels(params, _frozen(config, name, params))
  return jax.tree.map(lambda label: label != "frozen", labels)


def _frozen(config: Config, name: str, params: PyTree) -> tuple[str, ...]:
  """Returns the paths of parameters that stay as they are in stage `name`."""
  held = params.get("generator", {})
  frozen = config.optimizer.freeze + tuple(
    f"generator/{name}"
    for name in config.generator.fixed
    if name != "final_logits_bias" or name in held  # not every model has one
  )
  # Once there is an index, passages keep its embeddings.
  has_index = name == TRAIN or bool(config.index.path)
  if has_index and not config.encoder.train_passage_encoder:
    frozen += ("passage_encoder",)
  if name == TRAIN and config.retriever_loss == "none":
    frozen += tuple(part for part in params if part != "generator")
  if name == CONTRASTIVE:
    # Neither writes an answer nor weighs words against embeddings.
    frozen += tuple(p for p in ("generator", hybrid.PARAMS) if p in params)
    adapted = any(t.startswith("encoder/") for t in config.lora.targets)
    # It has no adapters then, and would train whole beside those of the other.
    if (
      config.lora.rank and adapted and not config.encoder.train_passage_encoder
    ):
      frozen += ("passage_encoder",)
  return frozen


def make_stages(
  experiment: Experiment, questions: Sequence[Question]
) -> list[Stage]:
  """Returns the stages that the config asks for, in order."""
  config = experiment.config
  stages = []
  if config.warmup.num_steps:
    cloze = ClozeBatches(
      experiment.tokenizer,
      experiment.tokenized,
      experiment.context,
      config,
      share=process_rows(experiment.mesh, config.warmup.batch_size).tolist(),
    )

    def prepare_cloze(step: int, *_: object) -> Prepared:
      with experiment.context.counting() as cut:
        return Prepared(cloze.batch(step), np.zeros((0, 0), np.int32), cut)

    stages.append(
      Stage(
        name=WARMUP,
        num_steps=config.warmup.num_steps,
        batch_size=config.warmup.batch_size,
        first_step=0,
        loss_fn=functools.partial(
          cloze_loss,
          model=experiment.model,
          contrastive_weight=config.warmup.contrastive_weight,
        ),
        prepare=prepare_cloze,
      )
    )
  if config.contrastive.num_steps:
    stages.append(_contrastive_stage(experiment, questions))
  in_step = open_in_step(experiment)
  share = process_rows(experiment.mesh, config.train.batch_size).tolist()
  batches = (StepBatches if in_step else QuestionBatches)(
    questions,
    experiment.context,
    experiment.embedder,
    config,
    bm25=experiment.bm25,
    share=share if config.train.num_steps else [0],
  )
  stages.append(
    Stage(
      name=TRAIN,
      num_steps=config.train.num_steps,
      batch_size=config.train.batch_size,
      first_step=config.steps_before_main,
      loss_fn=main_loss(
        config, experiment.model, special_ids(experiment.context)
      ),
      prepare=batches.prepare,
      in_step=in_step,
      accumulate=config.train.accumulate,
      context_layout=_context_layout(experiment, batches),
      batches=batches,
    )
  )
  return stages


def _contrastive_stage(
  experiment: Experiment, questions: Sequence[Question]
) -> Stage:
  """Returns the stage that trains the retriever alone.

  Raises:
    ValueError: the questions have no passages of their own, or nothing of the
      retriever is trained.
  """
  config = experiment.config
  settings, context = config.contrastive, experiment.context
  shapes = nn.meta.unbox(jax.eval_shape(experiment.init, jax.random.key(0)))
  if not any(jax.tree.leaves(trained(config, CONTRASTIVE, shapes))):
    raise ValueError(
      f"contrastive.num_steps={settings.num_steps} trains the retriever, but"
      " all its parameters are held: optimizer.freeze="
      f"{config.optimizer.freeze}, lora.targets={config.lora.targets}. Set"
      " contrastive.num_steps=0, or let some of them learn."
    )
  batches = ContrastiveBatches(
    questions,
    experiment.passages,
    context,
    config,
    share=process_rows(experiment.mesh, settings.batch_size).tolist(),
  )

  def prepare(step: int, *_: object) -> Prepared:
    with context.counting() as cut:
      return Prepared(batches.batch(step), np.zeros((0, 0), np.int32), cut)

  return Stage(
    name=CONTRASTIVE,
    num_steps=settings.num_steps,
    batch_size=settings.batch_size,
    first_step=config.warmup.num_steps,
    loss_fn=functools.partial(
      contrastive_loss,
      model=experiment.model,
      temperature=settings.temperature,
      chunk=settings.chunk,
    ),
    prepare=prepare,
  )


def _context_layout(
  experiment: Experiment, batches: QuestionBatches
) -> ContextLayout | None:
  """Returns how contexts are computed with less padding, if they are."""
  config = experiment.config
  t, longest = config.train, config.data.context_length
  if not t.num_steps or (t.length_groups == 1 and not t.pack_contexts):
    return None
  shares = batch_shards(experiment.mesh) * t.accumulate
  num_rows = t.batch_size * config.contexts_per_question // shares
  lengths = batches.context_lengths(_NUM_LENGTHS)
  if t.pack_contexts:
    dim = config.generator_sizes.embed_dim
    packing = choose_packing(lengths, num_rows, longest, dim)
    shape = packing or Packing(num_rows, longest)
    logging.info(
      "The %d contexts of up to %d tokens that a device computes at a time are"
      " put into %d rows of %d tokens.",
      *(num_rows, longest, shape.rows, shape.length),
    )
    return packing
  groups = choose_groups(lengths, num_rows, t.length_groups, longest)
  parts = [f"{rows} of {length}" for rows, length in groups.shapes(1)]
  logging.info(
    "The %d contexts that a device computes at a time are padded to these"
    " numbers of tokens: %s. That is %.0f%% of %d for each.",
    *(num_rows, ", ".join(parts)),
    *(100 * groups.places.mean() / longest, longest),
  )
  return groups if len(groups.rows) > 1 else None


@dataclasses.dataclass(frozen=True, slots=True)
class SpecialIds:
  """Tokens of the generator that a loss treats otherwise than others."""

  bos_id: int | None  # the begin token, which exclude_bos_score leaves out
  end_ids: tuple[int, ...]  # each ends an answer
  ignored_ids: tuple[int, ...]  # are no part of an answer


def special_ids(context: ContextBuilder) -> SpecialIds:
  """Returns the special tokens of what the generator reads and writes."""
  tokenizer = context.tokenizer
  ends = (tokenizer.eos_id, *context.stop_ids)
  others = [i for i in (tokenizer.pad_id, tokenizer.bos_id) if i is not None]
  with context.counting():  # what stands before every answer is none of it
    tokens, mask = context.targets(context.encode_answers([""]))
  others += tokens[mask].tolist()
  return SpecialIds(tokenizer.bos_id, ends, (*ends, *others))


def main_loss(config: Config, model: RagModel, special: SpecialIds) -> LossFn:
  """Returns the loss of the main stage.

  Args:
    config: chooses the loss.
    model: of retriever and generator.
    special: tokens of the generator.
  """
  if config.hf_loss:
    nll_fn = HF_NLL_FNS[config.loss]
    if config.exclude_bos_score:
      nll_fn = functools.partial(nll_fn, excluded_bos=special.bos_id)
    return functools.partial(
      hf_loss,
      model=model,
      nll_fn=nll_fn,
      label_smoothing=config.label_smoothing,
    )
  settings: dict[str, Any] = {
    "model": model,
    "label_smoothing": config.label_smoothing,
    "vocab_chunk": config.train.vocab_chunk,
    "retriever": retriever_loss(config, special),
  }
  if config.loss == "fid":
    return functools.partial(fid_loss, **settings)
  joined = config.loss == "concatenate"
  return functools.partial(
    marginal_loss,
    nll_fn=MARGINAL_NLL_FNS["rag_token" if joined else config.loss],
    joined=joined,
    constant_scores=config.retriever_loss != "marginal",
    **settings,
  )


def retriever_loss(config: Config, special: SpecialIds) -> RetrieverLoss | None:
  """Returns the loss that the retriever has for itself, if it has one."""
  if config.retriever_loss in ("marginal", "none"):
    return None
  return RetrieverLoss(
    kind=config.retriever_loss,
    temperature=config.retriever_temperature,
    target_temperature=config.target_temperature,
    weight=config.retriever_weight,
    reward=config.reward,
    end_ids=special.end_ids,
    ignored_ids=special.ignored_ids,
  )
