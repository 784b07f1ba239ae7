"""The configs for pods, run in small by the commands that run them on a pod.

Passages and questions are in the formats that others publish: DPR's
psgs_w100.tsv, NQ-open's .jsonl with DPR's test questions, and TFDS. Checkpoints
are tiny ones of the same architecture. Only sizes, paths and learning rates are
overridden; eight simulated devices are the mesh.
"""

import csv
import json
import math

from nq_open import prepare_nq_open
from processes import ROOT
from processes import run_tool
import pytest
from small_checkpoints import write_checkpoints
from small_checkpoints import write_t5

from rag_jax.config_json import read_config
from rag_jax.training.metrics import read_metrics

NUM_PASSAGES, STEPS = 48, 4
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
SIZES = {
  "data.num_passages": NUM_PASSAGES,
  "data.n_docs": 2,
  "data.question_length": 16,
  "data.passage_length": 24,
  "data.context_length": 40,
  "data.target_length": 8,
  "optimizer.peak_lr": 1e-3,
  "optimizer.warmup_steps": 0,
  "train.batch_size": 8,
  "train.num_steps": STEPS,
  "train.log_steps": 1,
  "train.validate_steps": 2,
  "train.checkpoint_steps": 2,
  "eval.batch_size": 8,
  "eval.num_validation": 8,
}
# What makes a config what it is, of the settings that no override touches.
OF_ALL = {
  "train.scan_layers": True,
  "train.remat": "attention",
  "train.compute_dtype": "bfloat16",
}
IN_STEP = OF_ALL | {"index.kind": "device", "index.device_storage": "bfloat16"}
CONFIGS = {
  "nq_rag_token": IN_STEP | {"loss": "rag_token"},
  "nq_rag_sequence": IN_STEP | {"loss": "rag_sequence"},
  "nq_t5_xl": IN_STEP
  | {"optimizer.kind": "adafactor", "mesh.fsdp": 8, "generator.norm": "pre"},
  "nq_scann": OF_ALL
  | {"index.kind": "scann", "encoder.train_passage_encoder": False},
}


class Inputs:
  """The files that the runs read."""

  def __init__(self, root):
    self.root = root
    facts = [
      (f"River {i}", f"{37 * i % 101 + 7} km") for i in range(NUM_PASSAGES)
    ]
    self.passages = root / "psgs_w100.tsv"
    with self.passages.open("w", newline="") as file:
      # DPR quotes the text alone, and doubles the quotation marks in it.
      file.write("id\ttext\ttitle\n")
      for number, (title, length) in enumerate(facts, start=1):
        text = f'{title}, ""the long"", is {length} long.'
        file.write(f'{number}\t"{text}"\t{title}\n')
    asked = [(f"how long is {title.lower()}", [a]) for title, a in facts]
    train, dev, test = asked[:32], asked[32:40], asked[40:]
    self.nq_open = root / "nq_open"
    self.nq_open.mkdir()
    for name, split in (("train", train), ("dev", dev)):
      lines = [json.dumps({"question": q, "answer": a}) for q, a in split]
      (self.nq_open / f"NQ-open.{name}.jsonl").write_text("\n".join(lines))
    with (self.nq_open / "nq-test.qa.csv").open("w", newline="") as file:
      csv.writer(file, delimiter="\t").writerows(test)
    self.tfds = root / "tfds"
    prepare_nq_open(self.tfds, train=train + dev, validation=test)
    write_checkpoints(root, [f"{q} {a}" for q, (a,) in asked] * 4)
    write_t5(root)
    self.wiki = root / "wiki"  # of wiki_embed.py

  def run(self, tool, config, settings, *arguments):
    """Runs a tool with a config on eight devices."""
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("XLA_FLAGS", EIGHT_DEVICES)
      patch.setenv("TFDS_DATA_DIR", str(self.tfds))
      done = run_tool(
        tool,
        f"--config={ROOT / 'configs' / config}.py",
        *(f"--config.{name}={value}" for name, value in settings.items()),
        *arguments,
        timeout=1500,  # a minute, on a machine that does nothing else
      )
    assert done.returncode == 0, done.stderr[-5000:]
    return done

  @property
  def encoders(self):
    """Settings of DPR's two towers."""
    return {
      "encoder.init_from": self.root / "question",
      "encoder.passage_init_from": self.root / "passage",
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  return Inputs(tmp_path_factory.mktemp("pods"))


@pytest.fixture(scope="module")
def wiki(inputs):
  """What wiki_embed.py builds."""
  return inputs.run(
    "build_index.py",
    "wiki_embed",
    inputs.encoders
    | {
      "data.passage_length": 24,
      "index.embed_batch_size": 16,
      "index.passages_per_shard": 20,
      "index.scann_tree_passages": 18,
    },
    f"--corpus={inputs.passages}",
    f"--output={inputs.wiki}",
    *("--split=none", "--storage=bfloat16", "--nobm25"),
  )


def train(inputs, name, **settings):
  """Returns the workdir of a run of a config, and what it printed."""
  workdir = inputs.root / name
  generator = "t5" if name == "nq_t5_xl" else "generator"
  done = inputs.run(
    "train.py",
    name,
    SIZES
    | inputs.encoders
    | {"generator.init_from": inputs.root / generator}
    | settings,
    f"--workdir={workdir}",
  )
  return workdir, done


@pytest.fixture(scope="module", params=CONFIGS)
def run(request, inputs):
  """Name, workdir and output of a run of each config."""
  name, own = request.param, {}
  if name == "nq_scann":
    request.getfixturevalue("wiki")
    own = {
      "data.questions": "tfds:natural_questions_open",
      "data.passages": inputs.wiki / "passages",
      "index.path": inputs.wiki / "index",
    }
  else:
    own = {
      "data.questions": inputs.nq_open,
      "data.passages": inputs.passages,
      "index.refresh_rows": 16,
    }
  return name, *train(inputs, name, **own)


def test_a_config_trains_validates_saves_and_answers(run):
  _, workdir, done = run
  lines = read_metrics(workdir / "metrics.jsonl")
  losses = {
    line["step"]: line["train/loss"] for line in lines if "train/loss" in line
  }
  assert list(losses) == list(range(1, STEPS + 1))
  assert all(map(math.isfinite, losses.values()))
  validated = [line for line in lines if "validation/exact_match" in line]
  assert [line["step"] for line in validated] == [2, STEPS]
  results = json.loads((workdir / "results.json").read_text())
  assert results["test/num_questions"] == 8
  assert {"test/exact_match", "test/answer_recall_at_5"} <= results.keys()
  saved = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert {"2", str(STEPS)} <= saved
  assert "Ask it: " in done.stdout


def test_a_config_is_itself_in_the_run(run):
  name, workdir, done = run
  config = read_config(workdir / "config.json")
  for setting, value in CONFIGS[name].items():
    part = config
    for field in setting.split("."):
      part = getattr(part, field)
    assert part == value, setting
  assert f"passages    {NUM_PASSAGES}" in done.stderr
  # TFDS has no test split: validation is a tenth of its train split.
  asked = (36, 4, 8) if name == "nq_scann" else (32, 8, 8)
  assert "{} train, {} validation, {} test".format(*asked) in done.stderr
  shape = (1, 8, 1) if name == "nq_t5_xl" else (8, 1, 1)
  assert (
    "devices     8 (cpu, cpu); data={}, fsdp={}, tensor={}".format(*shape)
    in done.stderr
  )


def test_documents_are_found_where_the_config_says(run):
  name, workdir, _ = run
  lines = read_metrics(workdir / "metrics.jsonl")
  age = [line.get("train/index_staleness_max_steps") for line in lines]
  age = [value for value in age if value is not None]
  if name == "nq_scann":  # the index was opened, and nothing embeds again
    assert not (workdir / "indexes").exists()
    manifest = json.loads((workdir / "config.json").read_text())
    assert manifest["index"]["path"]
  else:  # the step embeds 16 of 48 passages again: all, in three steps
    assert max(age) <= 3
    assert max(age) > 0


def test_all_passages_are_embedded_with_the_encoder_of_passages(inputs, wiki):
  assert f"{NUM_PASSAGES} passages can be searched" in wiki.stdout
  manifest = json.loads((inputs.wiki / "index/manifest.json").read_text())
  shards = manifest["content"]["settings"]["shards"]
  assert [shard["num_passages"] for shard in shards] == [16, 16, 16]
  assert {shard["kind"] for shard in shards} == {"scann"}
  found = run_tool(
    "search.py", f"--index={inputs.wiki}", "--json", "how long is river 7"
  )
  assert found.returncode == 0, found.stderr
  assert json.loads(found.stdout.splitlines()[0])
