"""A run that starts from checkpoints has their shapes, weights and tokens."""

import copy
import dataclasses

from flax import linen as nn
import jax
import numpy as np
import pytest

from rag_jax.config import EncoderConfig
from rag_jax.config import GeneratorConfig
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.experiment import open_experiment
from rag_jax.data.initial import load_initial
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import build_generator
from rag_jax.training.state import init_params
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_generator

V = 600
ENCODER = EncoderConfig(
  num_layers=1,
  embed_dim=8,
  num_heads=2,
  mlp_dim=12,
  max_positions=30,
  num_token_types=2,
  pooling="cls",
  vocab_size=V,
)
GENERATOR = GeneratorConfig(
  num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12, max_positions=50,
  vocab_size=V,
)  # fmt: skip


def params_of(module, *args, seed):
  """Random parameters, none of them zero."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    nn.meta.unbox(shapes),
  )


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
  """Directories of a question encoder, a passage encoder and a generator."""
  root = tmp_path_factory.mktemp("checkpoints")
  tokens = np.zeros((1, 4), np.int32)
  mask = tokens == 0
  encoder = build_encoder(
    ENCODER, vocab_size=V, max_positions=30, dtype=np.dtype("float32")
  )
  generator = build_generator(
    GENERATOR, vocab_size=V, decoder_start_id=2, dtype=np.dtype("float32")
  )
  texts = [q.question for q in tiny.split("train")]
  made = {}
  for seed, (name, kind) in enumerate(
    {"question": "dpr_question", "passage": "dpr_context"}.items()
  ):
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save(root / "encoder_tokenizer")
    made[name] = params_of(encoder, tokens, mask, seed=seed)
    ids = SpecialIds(
      pad=tokenizer.pad_id, bos=tokenizer.bos_id, eos=tokenizer.eos_id
    )
    export_encoder(
      root / name,
      ENCODER,
      made[name],
      kind=kind,
      tokenizer=TokenizerFiles(str(root / "encoder_tokenizer"), ids),
    )
  tokenizer = train_tokenizer([*texts, "Quite another text."], 500)
  tokenizer.save(root / "generator_tokenizer")
  made["generator"] = params_of(generator, tokens, mask, tokens, seed=2)
  export_generator(
    root / "generator",
    GENERATOR,
    made["generator"],
    tokenizer=TokenizerFiles(str(root / "generator_tokenizer"), ids),
  )
  return root, made


@pytest.fixture
def config(tiny, checkpoints):
  root, _ = checkpoints
  return tiny.config(
    encoder__init_from=str(root / "question"),
    encoder__passage_init_from=str(root / "passage"),
    encoder__tied=False,
    generator__init_from=str(root / "generator"),
    warmup__num_steps=0,
  )


def test_the_parameters_are_those_of_the_checkpoints(config, checkpoints):
  _, made = checkpoints
  before = copy.deepcopy(config)
  resolved, initial = load_initial(config)
  assert config == before
  assert resolved.encoder.embed_dim == 8
  assert resolved.generator.vocab_size == V
  experiment = open_experiment(resolved, initial=initial)
  params, _ = init_params(
    experiment.init, jax.random.key(0), experiment.mesh, initial.params
  )
  for part, name in (
    ("question_encoder", "question"),
    ("passage_encoder", "passage"),
    ("generator", "generator"),
  ):
    jax.tree.map(np.testing.assert_array_equal, params[part], made[name])


def test_retriever_and_generator_keep_their_own_tokenizers(config, tmp_path):
  resolved, initial = load_initial(config)
  first = open_experiment(
    resolved, initial=initial, tokenizer_path=tmp_path / "tokenizer"
  )
  assert first.retriever_tokenizer.vocab_size < first.tokenizer.vocab_size
  assert not first.context.one_tokenizer
  # Opened again, as serving does: from what the run saved, without the rest.
  again = open_experiment(resolved, tokenizer_path=tmp_path / "tokenizer")
  assert again.token_ids == first.token_ids


def test_what_is_not_given_is_fresh(config, checkpoints):
  _, made = checkpoints
  config.encoder.init_from = config.encoder.passage_init_from = ""
  resolved, initial = load_initial(config)
  experiment = open_experiment(resolved, initial=initial)
  assert experiment.context.one_tokenizer
  params, layout = init_params(
    experiment.init, jax.random.key(0), experiment.mesh, initial.params
  )
  assert jax.tree.structure(params) == jax.tree.structure(layout)
  jax.tree.map(
    np.testing.assert_array_equal, params["generator"], made["generator"]
  )


def test_a_part_that_does_not_fit_is_refused(config):
  resolved, initial = load_initial(config)
  resolved.generator.mlp_dim = 13
  experiment = open_experiment(resolved, initial=initial)
  with pytest.raises(ValueError, match=r"generator to start from .*mlp") as e:
    init_params(
      experiment.init, jax.random.key(0), experiment.mesh, initial.params
    )
  assert "(8, 12), expected (8, 13)" in str(e.value)


def test_towers_of_two_architectures_are_refused(config, checkpoints, tmp_path):
  _, made = checkpoints
  other = dataclasses.replace(ENCODER, activation="relu")
  ids = SpecialIds(pad=1, bos=0, eos=2)
  export_encoder(
    tmp_path / "other",
    other,
    made["passage"],
    kind="dpr_context",
    tokenizer=TokenizerFiles("", ids),
  )
  config.encoder.passage_init_from = str(tmp_path / "other")
  with pytest.raises(
    ValueError, match="differ in activation='gelu' and 'relu'"
  ):
    load_initial(config)


def test_inputs_longer_than_the_positions_are_refused(config):
  config.data.context_length = 51
  with pytest.raises(ValueError, match="max_positions=50 is below the longest"):
    load_initial(config)


def test_a_tokenizer_with_more_ids_than_the_table_is_refused(config, tmp_path):
  resolved, initial = load_initial(config)
  resolved.encoder.vocab_size = 300
  with pytest.raises(ValueError, match=r"encoder\.vocab_size=300 is below the"):
    open_experiment(resolved, initial=initial)


def test_the_warm_up_needs_one_tokenizer(config):
  config.warmup.num_steps = 2
  resolved, initial = load_initial(config)
  with pytest.raises(ValueError, match="needs one tokenizer"):
    open_experiment(resolved, initial=initial)
