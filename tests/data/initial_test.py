"""A run that starts from checkpoints has their shapes, weights and tokens."""

import copy
import dataclasses

from flax import linen as nn
import jax
import numpy as np
import pytest

from rag_jax.config import EncoderConfig
from rag_jax.config import GeneratorConfig
from rag_jax.config_json import to_json
from rag_jax.corpus.tokenizer import train_tokenizer
from rag_jax.data.experiment import open_experiment
from rag_jax.data.initial import load_initial
from rag_jax.models.rag import build_encoder
from rag_jax.models.rag import build_generator
from rag_jax.training.state import init_params
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.convert import import_checkpoint
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_generator
from rag_jax.weights.model_files import save_model

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


def test_what_convert_hf_wrote_is_taken_as_the_checkpoint_is(
  config, checkpoints, tmp_path
):
  root, _ = checkpoints
  expected, first = load_initial(config)
  for name in ("question", "passage", "generator"):
    import_checkpoint(root / name, tmp_path / name)
  config.encoder.init_from = str(tmp_path / "question")
  config.encoder.passage_init_from = str(tmp_path / "passage")
  config.generator.init_from = str(tmp_path / "generator")
  resolved, initial = load_initial(config)
  jax.tree.map(np.testing.assert_array_equal, initial.params, first.params)
  for part in (resolved.encoder, expected.encoder):
    part.init_from = part.passage_init_from = ""
  resolved.generator.init_from = expected.generator.init_from = ""
  assert resolved == expected
  experiments = [
    open_experiment(resolved, initial=start) for start in (initial, first)
  ]
  assert len({e.token_ids for e in experiments}) == 1


@pytest.fixture
def finished(tiny, tmp_path):
  """A function that writes what a run with some settings leaves."""

  def write(**changes):
    path = tmp_path / "run"
    config = tiny.config(**changes)
    experiment = open_experiment(config, tokenizer_path=path / "tokenizer")
    params, _ = init_params(experiment.init, jax.random.key(3), experiment.mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32), params
    )
    (path / "config.json").write_text(to_json(config))
    content = {"step": 3, "tokenizer": experiment.token_ids}
    save_model(path / "model", params, content)
    return str(path), jax.tree.map(np.asarray, params), experiment

  return write


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_starts_from_the_weights_of_another(tiny, finished, tied):
  shape = {
    "encoder__embed_dim": 12,
    "encoder__tied": tied,
    "encoder__learn_score_scale": True,
    "generator__mlp_dim": 20,
    "generator__init": "copy",
    "generator__norm": "pre",
    "generator__embedding_norm": False,
    "generator__relative_buckets": 32,
  }
  path, params, before = finished(**shape)
  # Another schedule, and no word of the shape.
  config = tiny.config(
    init_from=path,
    encoder__learn_score_scale=True,
    optimizer__schedule="cosine",
    train__num_steps=20,
  )
  resolved, initial = load_initial(config)
  assert resolved.encoder.tied == tied
  experiment = open_experiment(resolved, initial=initial)
  assert experiment.token_ids == before.token_ids
  start, _ = init_params(
    experiment.init, jax.random.key(0), experiment.mesh, initial.params
  )
  jax.tree_util.tree_map_with_path(
    lambda path, x, y: np.testing.assert_allclose(
      x, y, rtol=1e-6 if "scale" in str(path[-1]) else 0
    ),
    dict(start),
    params,
  )
  assert resolved.encoder.score_scale == pytest.approx(
    float(np.exp(params["log_score_scale"])), rel=1e-6
  )


def test_a_run_starts_with_the_learned_weights_of_words(tiny, finished):
  path, params, _ = finished(index__hybrid=True)
  resolved, _ = load_initial(tiny.config(init_from=path, index__hybrid=True))
  learned = np.exp([float(x) for x in jax.tree.leaves(params["hybrid"])])
  found = [resolved.index.hybrid_bm25, resolved.index.hybrid_dense]
  np.testing.assert_allclose(sorted(found), sorted(learned), rtol=1e-6)


def test_one_part_of_a_run_is_enough_and_another_may_win(
  tiny, finished, checkpoints
):
  root, made = checkpoints
  path, params, _ = finished()
  config = tiny.config(
    init_from=path, generator__init_from=str(root / "generator"),
    warmup__num_steps=0,
  )  # fmt: skip
  _, initial = load_initial(config)
  jax.tree.map(
    np.testing.assert_array_equal,
    {k: initial.params[k] for k in ("question_encoder", "generator")},
    {
      "question_encoder": params["question_encoder"],
      "generator": made["generator"],
    },
  )


def test_where_one_tower_would_be_lost_it_is_refused(tiny, finished):
  path, _, _ = finished(encoder__tied=False)
  with pytest.raises(ValueError, match=r"two towers, but encoder\.tied"):
    load_initial(tiny.config(encoder__init_from=path))


def test_one_part_is_not_the_whole(tiny, checkpoints, tmp_path):
  root, _ = checkpoints
  with pytest.raises(ValueError, match="of kind 'bart'; expected retriever"):
    load_initial(tiny.config(init_from=str(root / "generator")))
  with pytest.raises(FileNotFoundError, match="There is no directory"):
    load_initial(tiny.config(init_from=str(tmp_path / "none")))
