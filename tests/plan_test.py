import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import lora, quantize, sharding
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.hub import huggingface
from lora_jax.plan import advice, hlo, program
from lora_jax.plan.flops import matmul_flops
from lora_jax.plan.hlo import Moved, moved
from lora_jax.plan.program import Planned, Work
from lora_jax.plan.shapes import SHAPES
from lora_jax.train import TrainJob, prepare
from lora_jax.transformer import Transformer, abstract_params

MIXED = 'data=2,fsdp=2,tensor=2'
SMALL = LoraConfig(rank=4, alpha=8.0)
WORK = Work(rows=8, length=16, lora=SMALL)


def mesh(text=MIXED):
  return sharding.make_mesh(text, jax.devices('cpu')[:8])


def flops(f, *args):
  return matmul_flops(jax.jit(f).trace(*args).jaxpr)


# Operations.

X, W = np.ones((3, 5), np.float32), np.ones((5, 5), np.float32)


def test_a_loop_counts_as_often_as_it_runs():
  assert flops(lambda x, w: x @ w, X, W) == 2 * 3 * 5 * 5
  scanned = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]
  assert flops(scanned, X, W) == 7 * 2 * 3 * 5 * 5
  twice = lambda x, w: jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=2)[0]
  assert flops(twice, X, W) == 14 * 2 * 3 * 5 * 5


def test_of_branches_the_dearest_counts():
  branches = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x)
  assert flops(branches, X, W) == 2 * 2 * 3 * 5 * 5


def test_what_is_computed_again_counts_again():
  loss = lambda x, w: jnp.sin(jnp.sin(x @ w) @ w).sum()
  once = flops(jax.grad(loss), X, W)
  assert flops(jax.grad(jax.checkpoint(loss)), X, W) > once


def test_what_each_device_runs_counts_for_each():
  local = jax.shard_map(
    lambda x, w: x @ w, mesh=mesh(), in_specs=(P('data'), P()), out_specs=P('data')
  )
  # Two rows for each place along data, on all eight devices.
  assert flops(local, np.ones((4, 5), np.float32), W) == 8 * 2 * 2 * 5 * 5


def test_a_loop_that_ends_by_its_data_is_an_error():
  endless = lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)
  with pytest.raises(ValueError, match='as often as'):
    flops(endless, X, W)


@pytest.mark.parametrize('changes', [{'mlp_dim': 80}, {'num_layers': 6}, {'vocab_size': 112}])
def test_the_forward_pass_has_the_products_of_its_kernels(changes):
  def of(config):
    model, shapes = Transformer(config), abstract_params(config)
    tokens_BT = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def forward(params, tokens_BT):
      hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
      return model.apply({'params': params}, hidden_BTD, method='head')

    kernels = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim == 3]
    table = shapes['embed_tokens']['embedding'].size
    needed = 2 * 2 * 16 * (sum(leaf.size for leaf in kernels) + table)
    return flops(forward, shapes, tokens_BT) - needed

  # What is left is attention, which changes with none of these but the layers.
  c = tiny_model.CONFIG
  layers = changes.get('num_layers', c.num_layers) // c.num_layers
  assert of(dataclasses.replace(c, **changes)) == layers * of(c) > 0


# Bytes.


def compiled(f, *args):
  return jax.jit(f).lower(*args).compile().as_text()


def test_an_operation_reads_its_operands_and_writes_what_it_gives():
  x = np.ones((256, 256), np.float32)
  assert moved(compiled(lambda x, y: x + y, x, x)) == Moved(3 * x.nbytes, {})


def test_a_loop_over_layers_reads_each_once():
  layers, size = 9, 64
  w_LDD = np.ones((layers, size, size), np.float32)
  x = np.ones((size, size), np.float32)
  run = lambda x, w_LDD: jax.lax.scan(lambda x, w: (x + jnp.sin(w), None), x, w_LDD)[0]
  found = moved(compiled(run, x, w_LDD)).memory
  # Each layer's part, and x read and written.
  needed = layers * 3 * x.nbytes
  assert needed <= found < 1.5 * needed


def test_gathers_in_a_loop_count_as_often_as_it_runs():
  on = mesh('fsdp=8')
  lie = lambda *axes: NamedSharding(on, P(*axes))
  w_LDD = jax.device_put(np.ones((6, 64, 64), np.float32), lie(None, 'fsdp', None))
  x = jax.device_put(np.ones((8, 64), np.float32), lie('fsdp', None))
  run = lambda x, w_LDD: jax.lax.scan(
    lambda x, w: (jax.lax.with_sharding_constraint(x @ w, lie('fsdp', None)), None), x, w_LDD
  )[0]
  with jax.set_mesh(on):
    found = moved(compiled(run, x, w_LDD))
  # The weights of a layer each time, or what is multiplied by their parts.
  assert found.links > 0
  assert sum(times for times, _ in found.collectives.values()) % 6 == 0


def test_a_loop_whose_end_is_not_said_is_an_error():
  text = compiled(lambda x: jax.lax.while_loop(lambda x: x[0] < 9, lambda x: x * 2, x), X[0])
  with pytest.raises(ValueError, match='how often'):
    moved(text)


def test_arrays_on_the_chip_are_not_in_memory():
  sizes = lambda type_: [*hlo._sizes(type_)]
  assert sizes('bf16[256,4096]{1,0:T(8,128)(2,1)}') == [2 * 256 * 4096]
  assert sizes('bf16[256,4096]{1,0:T(8,128)(2,1)S(1)}') == []
  assert sizes('(s32[], f32[2,3]{1,0}, u8[5]{0})') == [4, 24, 5]
  with pytest.raises(ValueError, match='c128'):
    sizes('c128[3]')


# Plans.


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['none', 'int4'])
def test_what_a_plan_says_is_held_is_what_training_holds(kind):
  work = dataclasses.replace(WORK, quantize=kind)
  planned = program.training(tiny_model.CONFIG, 'o_proj,fc2', mesh(), work, 'cpu')
  params = jax.tree.map(np.asarray, tiny_model.params())
  with jax.set_mesh(mesh()):
    base = quantize.store(params, jnp.bfloat16, kind)
    paths = lora.resolve('o_proj,fc2', base)
    job = TrainJob(paths, SMALL, program.OptimConfig(), 0, lambda: iter(()))
    wave = prepare(base, [job], program._STEPS)
  held = sharding.resident_bytes(base) + sharding.resident_bytes(wave.states)
  batch = 5 * 4 * work.rows * work.length // 4
  assert planned.arguments == pytest.approx(held + batch, abs=1024)
  assert planned.adapters == sum(leaf.size for leaf in jax.tree.leaves(wave.states.adapters))
  assert planned.flops > 0
  assert planned.temporaries > 0
  assert planned.moved.links > 0


@pytest.mark.slow
def test_parts_take_less_and_do_the_same():
  whole, cut = (
    program.training(
      tiny_model.CONFIG, 'all', mesh('fsdp=8'), dataclasses.replace(WORK, rows=64, parts=n), 'cpu'
    )
    for n in (1, 8)
  )
  assert cut.temporaries < whole.temporaries
  assert cut.flops == pytest.approx(whole.flops, rel=0.2)


@pytest.mark.slow
def test_decoding_holds_its_cache():
  plans = [
    program.decoding(
      tiny_model.CONFIG, 'o_proj', mesh(), dataclasses.replace(WORK, length=length), 'cpu'
    )
    for length in (64, 128)
  ]
  c = tiny_model.CONFIG
  # Keys and values in bfloat16, their rows over four devices and heads over two; positions.
  token = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim / 2 + 4
  assert plans[1].arguments - plans[0].arguments == 8 / 4 * 64 * token


def test_rows_that_cannot_be_spread_are_an_error():
  with pytest.raises(UserError, match='--rows=6: give a multiple of 4'):
    program.training(tiny_model.CONFIG, 'all', mesh(), dataclasses.replace(WORK, rows=6), 'cpu')


def test_known_shapes_have_the_weights_that_they_are_named_for():
  count = lambda name: sum(leaf.size for leaf in jax.tree.leaves(abstract_params(SHAPES[name])))
  assert count('smollm2-135m') == 134_515_008
  assert count('llama-3-8b') == 8_030_261_248
  assert count('llama-3-70b') == 70_553_706_496
  assert count('qwen2.5-1.5b') == 1_543_714_304


# Advice.


def planned(arguments, temporaries):
  return Planned(arguments, temporaries, 1, Moved(0, {}), 1, 1.0)


@pytest.mark.parametrize(
  ('plan', 'work', 'sizes', 'says'),
  [
    (planned(6, 3), WORK, (1, 8, 1), ''),
    (planned(9, 3), WORK, (4, 2, 1), '--mesh=fsdp=8'),
    (planned(2, 13), dataclasses.replace(WORK, remat=False), (1, 8, 1), '--remat'),
    (planned(2, 13), dataclasses.replace(WORK, rows=16), (1, 8, 1), '--parts=2'),
    (planned(2, 13), WORK, (1, 8, 1), '--mesh=data=1,fsdp=4,tensor=2'),
    (planned(9, 3), dataclasses.replace(WORK, rows=1), (1, 1, 8), '--quantize=int4'),
    (planned(2, 13), dataclasses.replace(WORK, rows=1), (1, 1, 8), 'more devices'),
  ],
)
def test_what_does_not_fit_is_given_a_remedy(plan, work, sizes, says):
  found = advice.remedy(plan, work, dict(zip(sharding.AXES, sizes, strict=True)), 10)
  assert found.startswith(says)
  assert bool(found) == bool(says)


def test_a_base_that_is_small_for_a_device_is_not_cut():
  assert advice.first_mesh(10, 100) == 'data=-1'
  assert advice.first_mesh(60, 100) == 'fsdp=-1'
  assert advice.first_mesh(60, None) == 'fsdp=-1'


# The command.


def run(*args):
  command = [sys.executable, '-m', 'experiments.plan', *args]
  env = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_the_command_plans_for_the_devices_that_are_here(tmp_path):
  params = jax.tree.map(np.asarray, tiny_model.params())
  huggingface.save(tmp_path, tiny_model.CONFIG, params)
  base = f'--base={tmp_path}/config.json'
  done = run(base, '--targets=o_proj,fc2', '--targets=all', '--length=16', f'--mesh={MIXED}')
  assert done.returncode == 0, done.stderr
  assert '8 x cpu, mesh data=2,fsdp=2,tensor=2' in done.stdout
  assert 'a training step of 4 rows of 16 tokens, remat; rank 16' in done.stdout
  for said in ('trained parameters', 'a chip holds', 'all-reduce, a chip', 'compiled in'):
    assert said in done.stdout


@pytest.mark.parametrize(
  ('args', 'says'),
  [
    (['--base=banana'], '--base=banana: give smollm2-135m'),
    (['--targets=banana'], 'banana'),
    (['--tpu=v9:2x2'], '--tpu=v9:2x2: give one of v4'),
    (['--mesh=model=2'], "--mesh=model=2: no axis 'model'"),
    (['--mesh=data=3'], 'there are 8 devices'),
    (['--rows=0'], '--rows=0: give a number above zero'),
  ],
)
def test_a_mistake_is_one_line(args, says):
  done = run(*args)
  assert done.returncode == 2
  assert says in done.stderr
  assert done.stderr.count('\n') == 1
