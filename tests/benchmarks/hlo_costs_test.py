"""Costs of programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from rag_jax.benchmarks.hlo_costs import Collective
from rag_jax.benchmarks.hlo_costs import program_costs
from rag_jax.retrieval.device import RARELY

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
KIB = 1024

# A loop that runs 7 times; an all-reduce of 1 KiB and a fusion are in it.
TEXT = """HloModule jit_f, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p0: f32[16,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[16,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,256}
}

%body (state: (s32[], f32[16,256])) -> (s32[], f32[16,256]) {
  %state = (s32[], f32[16,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %all = f32[16,256]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,256]{1,0} fusion(%all, %i), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %reduced = f32[1,256]{1,0:T(8,128)} all-reduce(%row), channel_id=1, GROUPS, to_apply=%add
  %near = f32[1,256]{1,0:T(8,128)S(1)} copy(%reduced)
  %new = f32[16,256]{1,0} dynamic-update-slice(%all, %near, %i, %i)
  ROOT %next = (s32[], f32[16,256]{1,0}) tuple(%i, %new)
}

%condition (state.1: (s32[], f32[16,256])) -> pred[] {
  %state.1 = (s32[], f32[16,256]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (start: (s32[], f32[16,256])) -> (s32[], f32[16,256]) {
  %start = (s32[], f32[16,256]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[16,256]{1,0}) while(%start), condition=%condition, body=%body
}
"""  # noqa: E501


@pytest.mark.parametrize(
  ("groups", "axes", "size"),
  [
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data", 2),
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor", 2),
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", "fsdp+tensor", 4),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", "data", 2),
    ("replica_groups=[2,4]<=[8]", "fsdp+tensor", 4),
    ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}", "fsdp", 2),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", "data+fsdp", 4),
    ("replica_groups={{0,1,2,3,4,5,6,7}}", "data+fsdp+tensor", 8),
    ("replica_groups={{0,3},{1,2},{4,7},{5,6}}", "other", 2),
  ],
)
def test_a_loop_counts_as_often_as_it_runs(groups, axes, size):
  costs = program_costs(TEXT.replace("GROUPS", groups), MESH)
  sent = 7 * KIB * 2 * (size - 1) / size
  assert costs.collectives == (Collective("all-reduce", axes, sent, 7),)
  assert costs.unknown_loops == 0
  assert costs.cycles == 700
  # A row is read, and written, by the fusion (the rest of its operand is not);
  # the all-reduce reads and writes; the copy reads; the update writes.
  index = 4  # of the row, which the fusion reads too
  assert costs.memory_bytes == 7 * (6 * KIB + index)


def test_a_group_of_one_device_sends_nothing():
  text = TEXT.replace("GROUPS", "replica_groups={{0},{1},{2},{3}}")
  assert program_costs(text, {"data": 4}).collectives == ()


def test_a_loop_whose_runs_are_not_known_is_reported():
  text = TEXT.replace("s32[] constant(7)", "s32[] parameter(1)")
  assert program_costs(text, MESH).unknown_loops == 1


@pytest.mark.parametrize("branch", ["while", "conditional"])
def test_what_the_program_calls_rare_counts_as_never_run(branch):
  def run(x, scope):
    def work(x):
      # The compilation cache would take programs for one if only names differ.
      x = len(scope) * x
      return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0]

    with jax.named_scope(scope):
      if branch == "while":
        return jax.lax.while_loop(lambda x: x[0, 0] > 7, work, x)
      return jax.lax.cond(x[0, 0] > 7, work, lambda x: x, x)

  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  often, rarely = (
    program_costs(
      jax.jit(run, static_argnums=1).lower(x, scope).compile().as_text(),
      {"data": 1},
    )
    for scope in ("often", RARELY)
  )
  matrix = 4 * 64 * 64
  assert often.memory_bytes >= 5 * 2 * matrix
  assert rarely.memory_bytes < 3 * matrix  # copies around it
  assert often.unknown_loops == (branch == "while")
  assert rarely.unknown_loops == 0


def test_collectives_of_one_channel_are_told_apart():
  # jax.shard_map gives all of its collectives the same channel.
  line = next(x for x in TEXT.splitlines() if "all-reduce(" in x)
  other = line.replace("%reduced", "%others").replace("f32[1,", "s32[1,")
  again = line.replace("%reduced", "%piece")  # of the same collective
  text = TEXT.replace(line, "\n".join([line, other, again]))
  text = text.replace("GROUPS", "replica_groups={{0,1,2,3,4,5,6,7}}")
  (found,) = program_costs(text, MESH).collectives
  assert found.num_runs == 2 * 7
  assert found.bytes_sent == 2 * 7 * KIB * 2 * 7 / 8


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    program_costs("HloModule nothing", MESH)


def test_the_weights_of_a_scan_are_read_once():
  dim = 128

  def bytes_moved(num_layers):
    def run(x, weights):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    lowered = jax.jit(run).lower(
      jax.ShapeDtypeStruct((dim, dim), jnp.float32),
      jax.ShapeDtypeStruct((num_layers, dim, dim), jnp.float32),
    )
    costs = program_costs(lowered.compile().as_text(), {"data": 1})
    assert costs.unknown_loops == 0
    return costs.memory_bytes

  per_layer = (bytes_moved(24) - bytes_moved(8)) / 16
  matrix = 4 * dim * dim
  # At least the weights, the input and the output; temporaries add some. Whole
  # stacks in every layer would be 24 matrices.
  assert 3 * matrix <= per_layer <= 9 * matrix
