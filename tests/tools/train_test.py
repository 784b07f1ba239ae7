"""The command that trains, given what is wrong: a message, not a stack trace.

Run as a program, this file imports the command once and then runs it in a
fork for each line of its input: importing takes seconds, and the many commands
that shall fail take less.
"""

import collections
import gc
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from small_checkpoints import GENERATION
from small_checkpoints import write_checkpoints

from rag_jax.training.workdir import open_workdir
from rag_jax.weights.convert import export_model

ROOT = pathlib.Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train.py"
HELPERS = ROOT / "tests" / "helpers"

Result = collections.namedtuple("Result", ["code", "stdout", "stderr"])


@pytest.fixture(scope="module")
def forks(tiny):
  """The program below."""
  with subprocess.Popen(
    [sys.executable, "-W", "ignore", __file__],
    env=os.environ
    | tiny.environment
    | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HELPERS)))},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    yield process
    process.stdin.close()


@pytest.fixture
def command(forks, tiny, tmp_path):
  """Runs the command with some more arguments."""

  def run(*arguments, config=tiny.config_file, **more):
    files = {name: str(tmp_path / name) for name in ("stdout", "stderr")}
    case = files | more
    case["arguments"] = [
      f"--config={config}",
      f"--workdir={tmp_path / 'run'}",  # unless another one follows
      *arguments,
    ]
    forks.stdin.write(json.dumps(case) + "\n")
    forks.stdin.flush()
    code = int(forks.stdout.readline())
    texts = (pathlib.Path(path).read_text() for path in files.values())
    return Result(code, *texts)

  return run


def assert_one_message(result, message):
  """Fails unless the command ended with this message and nothing else."""
  assert result.code == 1, result.stderr
  assert "Traceback" not in result.stderr
  errors = re.findall(r"^\w+Error: ", result.stderr, re.MULTILINE)
  assert len(errors) == 1, result.stderr
  # The log ends where the message begins.
  end = result.stderr[result.stderr.index(errors[0]) :]
  assert re.match(message, end, re.DOTALL), end
  assert not result.stdout


# What does not work, and what is said about it.
WRONG = {
  ("data.n_docs=41",): (
    r"ValueError: n_docs=41, but .*passages\.jsonl has only 40 passages\. Lower"
  ),
  ("warmup.batch_size=64",): (
    r"ValueError: warmup\.batch_size=64 is more than there are passages \(40\)"
    r".*Lower it, or skip the warm-up: warmup\.num_steps=0\."
  ),
  ("train.batch_size=64",): (
    r"ValueError: train\.batch_size=64 is larger than the training split \(40"
    r" questions\); lower it or bring more questions\."
  ),
  ("trian.num_steps=3",): (
    r"ValueError: There is no setting trian\.num_steps\. Did you mean"
    r" train\.num_steps\? All are in rag_jax/config\.py\."
  ),
  ("loss=rag_tokn",): (
    r"ValueError: The config is not valid:\n  loss='rag_tokn' is not one of"
    r" \['concatenate', 'fid', 'rag_sequence', 'rag_token'\]\. Did you mean"
    r" 'rag_token'\?"
  ),
  ("index.swap_steps=4", "encoder.train_passage_encoder=False"): (
    r"ValueError: The config is not valid:\n  encoder\.train_passage_encoder="
    r"False keeps.*Set encoder\.tied=False\.\n  index\.swap_steps=4 must be"
    r" between 1 and index\.refresh_steps=4"
  ),
  ("data.passages={root}/passage.jsonl",): (
    r"FileNotFoundError: There is no file .*/passage\.jsonl\. .*The nearest"
    r" names in .* are \['passages\.jsonl'"
  ),
  ("data.passages=world_fact",): (
    r"ValueError: There are no passages 'world_fact'\. .*Did you mean"
    r" 'world_facts'\?"
  ),
  ("data.passages={root}/empty.jsonl",): (
    r"ValueError: .*/empty\.jsonl holds no passages: .* Expected at least one"
  ),
  ("data.questions={root}/question",): (
    r"FileNotFoundError: There are no questions '.*/question'\. Expected one of"
  ),
  ("data.questions={root}",): (
    r"FileNotFoundError: The questions .* have no train split: there is no"
    r" train\.jsonl\."
  ),
  ("tokenizer.path={root}/none",): (
    r"FileNotFoundError: There is no tokenizer in .*/none; looked for"
  ),
  ("optimizer.freeze=('generatr',)",): (
    r"ValueError: optimizer\.freeze names 'generatr', but no parameter has that"
    r" path\. Top-level names are \['generator', 'question_encoder'\]"
  ),
  (
    "index.path={root}/none",
    "encoder.tied=False",
    "encoder.train_passage_encoder=False",
  ): r"FileNotFoundError: There is no manifest\.json, since there is .*/none",
  ("mesh.data=3",): (
    r"ValueError: mesh\.data=3, mesh\.fsdp=1 and mesh\.tensor=1 need 3 devices,"
    r" but there are 1\."
  ),
}


@pytest.mark.parametrize("settings", WRONG, ids=" ".join)
def test_what_cannot_work_is_one_message_and_no_stack(settings, command, tiny):
  (tiny.root / "empty.jsonl").touch()
  result = command(
    *(f"--config.{setting.format(root=tiny.root)}" for setting in settings)
  )
  assert_one_message(result, WRONG[settings])


def test_the_limit_of_recall_can_be_given_by_its_name(command):
  assert_one_message(
    command("--min_index_recall=1.5"),
    r"ValueError: The config is not valid:\n  index\.min_recall=1\.5 must be",
  )


def test_a_batch_that_eight_devices_cannot_share_is_refused(command):
  result = command(
    "--config.train.batch_size=12",
    environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
  )
  assert_one_message(
    result,
    r"ValueError: train\.batch_size=12 must be a multiple of 8, the devices"
    r" that the batch is split over \(mesh\.data=8 x mesh\.fsdp=1\), so that"
    r" each gets an equal share\.",
  )


def test_a_config_file_that_is_not_there_is_refused(command):
  assert_one_message(
    command(config="configs/quikstart.py"),
    r"FileNotFoundError: There is no config file configs/quikstart\.py\."
    r" Expected a Python file with a function get_config, like configs/quick"
    r"start\.py\. Did you mean 'configs/quickstart\.py'\? Correct --config\.",
  )


def test_a_config_file_that_returns_something_else_is_refused(
  command, tmp_path
):
  file = tmp_path / "other.py"
  file.write_text("def get_config():\n  return {'loss': 'rag_token'}\n")
  assert_one_message(
    command(config=file),
    r"TypeError: Expected a rag_jax\.config\.Config, got dict\.",
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n", r"other\.py:1: the config cannot be read \(Syntax"),
    ("x = 1\n", r"other\.py has no function get_config\. Expected a Python"),
    (
      "def get_config():\n  return 1 / 0\n",
      r"other\.py:2: the config cannot be read \(ZeroDivisionError: ",
    ),
  ],
)
def test_a_config_file_with_a_mistake_is_named_with_its_line(
  text, message, command, tmp_path
):
  (tmp_path / "other.py").write_text(text)
  result = command(config=tmp_path / "other.py")
  assert_one_message(result, rf"ValueError: .*{message}")


def test_a_value_of_another_type_is_refused(command):
  result = command("--config.train.num_steps=many")
  assert result.code == 1
  assert "Traceback" not in result.stderr
  assert "--config.train.num_steps=many: invalid literal" in result.stderr


def test_a_loss_that_is_not_finite_is_a_message_too(command, tmp_path):
  result = command(
    "--config.optimizer.peak_lr=1e30", "--config.warmup.num_steps=0"
  )
  assert_one_message(
    result,
    r"FloatingPointError: .*train/loss is not finite at step 2 of train: the"
    r" run diverged\..* Lower optimizer\.peak_lr",
  )
  assert not (tmp_path / "run" / "results.json").exists()


def test_debug_shows_where_an_error_came_from(command):
  result = command("--config.data.n_docs=41", "--debug")
  assert result.code == 1
  assert "Traceback" in result.stderr
  assert "check_n_docs" in result.stderr
  assert result.stderr.rstrip().endswith("or bring more passages.")


def test_ctrl_c_before_there_is_anything_to_save_says_how_to_go_on(command):
  result = command(interrupted=True)
  assert result.code == 130
  assert "Traceback" not in result.stderr
  assert result.stderr.endswith(
    "Stopped. Run the same command again to continue.\n"
  )


def test_a_setting_can_be_corrected_in_the_same_workdir(command):
  assert "n_docs=41, but" in command("--config.data.n_docs=41").stderr
  # It goes on to what is wrong next, with a new tokenizer.
  result = command(
    "--config.tokenizer.vocab_size=512", "--config.train.batch_size=64"
  )
  assert_one_message(result, r"ValueError: train\.batch_size=64 is larger")


# The workdir of a run that has ended.


@pytest.fixture
def finished(uninterrupted, tmp_path):
  path = tmp_path / "run"
  shutil.copytree(uninterrupted.path, path)
  return path


def test_the_workdir_of_another_experiment_is_refused(command, finished):
  result = command("--config.seed=5", "--config.optimizer.peak_lr=0.5")
  assert_one_message(
    result,
    r"ValueError: --workdir=.*/run belongs to another experiment\. .*"
    r"\n  seed: 0 -> 5\n  optimizer\.peak_lr: 0\.01 -> 0\.5\n.*Choose another"
    r" --workdir",
  )


def test_a_second_run_in_a_workdir_is_refused(command, finished, tiny):
  with open_workdir(finished, tiny.config()):
    result = command()
  assert_one_message(
    result,
    rf"ValueError: --workdir=.*/run is in use by another run: pid {os.getpid()}"
    r" on host .*Wait until it ends, stop it, or choose another --workdir\.",
  )


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
  command, finished
):
  folder = finished / "checkpoints" / "16"
  files = json.loads((folder / "manifest.json").read_text())["files"]
  name = max(files, key=lambda name: files[name]["bytes"])
  content = bytearray((folder / name).read_bytes())
  content[len(content) // 2] ^= 1
  (folder / name).write_bytes(content)
  result = command()
  assert result.code == 0, result.stderr
  assert re.search(
    r"The checkpoint of step 16 cannot be used: "
    + re.escape(f"{name} in {folder} was damaged")
    + r".* It is now .*16\.damaged\. The run goes on from step 15,",
    result.stderr,
  ), result.stderr
  assert (folder.parent / "16.damaged" / name).read_bytes() == content
  assert (folder / "manifest.json").exists()  # made again


def test_passages_that_changed_since_the_checkpoint_are_refused(
  command, finished, tiny
):
  before = tiny.passages.read_text()
  tiny.passages.write_text(before.replace("The river", "A river", 1))
  try:
    result = command()
  finally:
    tiny.passages.write_text(before)
  assert_one_message(
    result,
    r"ValueError: The checkpoint of step 16 was made with other passages: what"
    r" the config names has changed since\. Put the old files back",
  )


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
  root = tmp_path_factory.mktemp("checkpoints")
  write_checkpoints(root, [q.question for q in tiny.split("train")])
  return root


def test_the_command_line_names_checkpoints_beside_a_file_of_a_fresh_model(
  command, checkpoints, tmp_path
):
  result = command(
    f"--config.encoder.init_from={checkpoints / 'question'}",
    f"--config.generator.init_from={checkpoints / 'generator'}",
    "--config.generator.activation_dropout=0.0",
    "--config.data.context_length=40",
    "--config.train.num_steps=2",
    "--config.eval.num_test=4",
  )
  assert result.code == 0, result.stderr
  # The file, of a model from scratch, sets other values.
  assert "encoder.embed_dim: 16 -> 8" in result.stderr
  assert "optimizer.peak_lr: 0.01 -> 3e-05" in result.stderr
  assert "is DPR's question encoder, and will embed" in result.stderr
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["data"]["context_length"] == 40
  assert config["data"]["target_length"] == 25
  assert config["warmup"]["num_steps"] == 0
  # What the checkpoint said of training and answering is exported again.
  export_model(tmp_path / "run", tmp_path / "exported", "generator")
  path = tmp_path / "exported"
  exported = json.loads((path / "config.json").read_text())
  assert exported["dropout"] == 0.2
  assert exported["attention_dropout"] == 0.1
  assert exported["activation_dropout"] == 0.0
  settings = json.loads((path / "generation_config.json").read_text())
  assert settings.pop("min_new_tokens") == GENERATION["min_length"] - 1
  names = GENERATION.keys() - {"min_length"}
  assert {n: settings[n] for n in names} == {n: GENERATION[n] for n in names}


def test_another_shape_than_the_checkpoint_s_is_refused(command, checkpoints):
  result = command(
    f"--config.generator.init_from={checkpoints / 'generator'}",
    "--config.generator.num_layers=3",
  )
  assert_one_message(
    result,
    r"ValueError: The command line contradicts the checkpoints that it starts"
    r" from:\n  generator\.num_layers=3, but the checkpoint has 1\nExpected",
  )


# The program that forks.


def serve():
  """Runs tools/train.py once a line of the input, and prints its exit code."""
  train = importlib.import_module("rag_jax.commands.train")
  runs = importlib.import_module("rag_jax.api.runs")
  importlib.import_module("transformers")  # which takes long as well
  gc.freeze()  # a fork shall not look through all of it when it ends
  for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if not child:
      os.environ.update(case.get("environment", {}))
      for number, name in (
        (0, os.devnull),
        (1, case["stdout"]),
        (2, case["stderr"]),
      ):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags), number)
      sys.argv = [str(TOOL), *case["arguments"]]
      # As in a terminal; started in the background, Python ignores Ctrl-C.
      signal.signal(signal.SIGINT, signal.default_int_handler)
      if case.get("interrupted"):
        runs.load_questions = lambda *_: signal.raise_signal(signal.SIGINT)
      train.run()  # which exits
    _, status = os.waitpid(child, 0)
    sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
  serve()
