"""Programs in processes of their own: tools, tests on several devices."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
_EIGHT_DEVICES = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}


def run_tool(tool, *arguments, timeout=500, optimized=False, **settings):
  """Returns the finished process of tools/`tool`, as a person runs it.

  Args:
    tool: the name of the file.
    arguments: of the command line.
    timeout: in seconds.
    optimized: whether its programs run longer than they compile.
    settings: of subprocess.run.
  """
  environment = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
  }
  if optimized:
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
  return subprocess.run(
    [sys.executable, ROOT / "tools" / tool, *map(str, arguments)],
    env=os.environ | environment,
    capture_output=True,
    encoding="utf-8",
    timeout=timeout,
    check=False,
    **settings,
  )


def run_on_eight_devices(file, *arguments):
  """Returns what a test file prints that is run as a program."""
  done = subprocess.run(
    [sys.executable, "-W", "error", file, *map(str, arguments)],
    env=os.environ
    | _EIGHT_DEVICES
    | {
      "PYTHONPATH": os.pathsep.join([str(ROOT), os.path.dirname(__file__)]),
    },
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def pytest_on_eight_devices(file, names):
  """Returns what pytest says of the tests in `file` that have `names`."""
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k",
     names, file],
    check=False,
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ
    | _EIGHT_DEVICES
    | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def free_port():
  """Returns a port of this machine that no program uses now."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def run_hosts(commands, *, timeout=120, stdin="", **environment):
  """Returns (exit status, stdout and stderr, seconds) of programs run together.

  Args:
    commands: arguments of Python, per program.
    timeout: seconds after which a program counts as hanging.
    stdin: what the first program reads; the others read nothing.
    environment: added to that of this process.
  """
  kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  path = os.pathsep.join([str(ROOT), os.path.dirname(__file__)])
  kept |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **environment}
  start = time.monotonic()
  done = [None] * len(commands)
  with contextlib.ExitStack() as files:
    # Not pipes: who waits for one process does not empty those of the others.
    logs = [files.enter_context(tempfile.TemporaryFile("w+"))
            for _ in commands]  # fmt: skip
    given = files.enter_context(tempfile.TemporaryFile("w+"))
    given.write(stdin)
    given.seek(0)
    started = [
      subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=kept, stdout=log, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL if number else given,
      )
      for number, (command, log) in enumerate(zip(commands, logs, strict=True))
    ]  # fmt: skip
    try:
      while None in done:
        assert time.monotonic() < start + timeout, "a process hangs"
        for i, process in enumerate(started):
          if done[i] is None and process.poll() is not None:
            logs[i].seek(0)
            secs = time.monotonic() - start
            done[i] = process.returncode, logs[i].read(), secs
        time.sleep(0.1)
    finally:
      for process in started:
        process.kill()
        process.wait()
  return done


def run_tool_on_hosts(tool, *arguments, count=2, timeout=300, stdin=""):
  """Returns what `run_hosts` does, of tools/`tool` on the hosts of a pod."""
  port = free_port()
  pod = ("--distributed", f"--num_processes={count}",
         f"--coordinator=localhost:{port}")  # fmt: skip
  commands = [
    (ROOT / "tools" / tool, *pod, f"--process_id={number}", *arguments)
    for number in range(count)
  ]
  return run_hosts(commands, timeout=timeout, stdin=stdin, HF_HUB_OFFLINE="1")


def run_on_hosts(file, *arguments, count, cache, num_devices=4, timeout=900):
  """Returns what each process prints of a program that `count` run together.

  The program calls `join_hosts` before it uses JAX. Together its processes have
  `num_devices` simulated devices; what they compile is kept in `cache`.
  """
  port = free_port()
  settings = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(num_devices // count),
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.path.dirname(__file__)]),
    "HOSTS": f"localhost:{port} {count}",
  }
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  started, outputs = [], []
  with contextlib.ExitStack() as files:
    for host in range(count):
      # Not pipes: who waits for one process does not empty those of the others.
      outputs += [files.enter_context(tempfile.TemporaryFile("w+"))
                  for _ in range(2)]  # fmt: skip
      started.append(
        subprocess.Popen(
          [sys.executable, str(file), *map(str, arguments)],
          env=environment | settings | {"HOST": str(host)},
          stdout=outputs[-2],
          stderr=outputs[-1],
        )
      )
    try:
      for process in started:
        process.wait(timeout)
    finally:
      for process in started:
        process.kill()
        process.wait()
    texts = []
    for output in outputs:
      output.seek(0)
      texts.append(output.read())
  for process, errors in zip(started, texts[1::2], strict=True):
    assert process.returncode == 0, errors[-5000:]
  return texts[::2]


def join_hosts():
  """Joins the other processes of `run_on_hosts`; returns this one's number."""
  import jax  # the tests of tools need none

  address, count = os.environ["HOSTS"].split()
  host = int(os.environ["HOST"])
  if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), host)
  return host
