import collections
import re

import jax
import pytest
import tiny_model
from planted_run import plant, plant_batch, plant_latency, start, written
from report_test import section
from tiny_model import MODEL, RANK

from lora_jax import latency, lora
from lora_jax.config import LoraConfig
from lora_jax.kernels import LoraKernel
from lora_jax.report import batches, timings

RANKS = {('o_proj', 'equal_rank'): RANK, ('o_proj', 'equal_parameters'): 3 * RANK}


def sets(ranks, **changes):
  params = tiny_model.params()
  return {
    of: (lora.resolve(of[0], params), LoraConfig(rank=rank, **changes))
    for of, rank in ranks.items()
  }


def test_the_base_and_each_target_set_are_timed_against_the_base():
  held = latency.measure(MODEL, tiny_model.params(), sets(RANKS, dora=True), turns=3)
  assert latency.timed(held) == [*RANKS]
  times, others = held['targets'], held['arms']['equal_parameters']
  assert list(times) == list(others) == ['base', 'o_proj']
  assert times['base'] == others['base']
  for work in ('prefill', 'decode'):
    for name, numbers in [*times.items(), *others.items()]:
      turns = numbers[f'{work}_turns_ms']
      assert len(turns) == 3
      assert numbers[f'{work}_ms'] == pytest.approx(sorted(turns)[1])
      low, middle, high = (numbers[f'{work}_ratio{end}'] for end in ('_low', '', '_high'))
      assert low <= middle <= high
      assert name != 'base' or (low, middle, high) == (1, 1, 1)
      of_base = times['base'][f'{work}_turns_ms']
      ratios = [own / other for own, other in zip(turns, of_base, strict=True)]
      assert middle == pytest.approx(sorted(ratios)[1])


def adapted(params):
  """The rank of each module that is adapted."""
  is_kernel = lambda leaf: isinstance(leaf, LoraKernel)
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_kernel)
  found = {'/'.join(key.key for key in path[:-1]): leaf for path, leaf in leaves}
  return frozenset((path, leaf.a.shape[-1]) for path, leaf in found.items() if is_kernel(leaf))


@pytest.mark.parametrize('work', ['_prefill', '_decode'])
def test_what_is_timed_has_its_adapters_and_the_base_has_none(monkeypatch, work):
  seen = collections.Counter()

  def run(model, params, *others):
    seen[adapted(params)] += 1

  monkeypatch.setattr(latency, '_prefill', lambda *_: None)
  monkeypatch.setattr(latency, '_decode', lambda *_: None)
  monkeypatch.setattr(latency, work, run)
  asked = sets({**RANKS, ('qkv,fc2', 'equal_rank'): RANK})
  latency.measure(MODEL, tiny_model.params(), asked, turns=2)
  wanted = [frozenset((path, config.rank) for path in paths) for paths, config in asked.values()]
  # Two turns, and one before them.
  assert seen == dict.fromkeys([frozenset(), *wanted], 3)


def test_no_row_contradicts_another_where_a_machine_changes_its_speed(tmp_path):
  """Slow in most of the base's turns and fast in most of the other's, 1.04 times within each."""
  run = start(tmp_path)
  plant(run, 'medmcqa', 'base', [0, 1])
  plant_latency(run, o_proj=1.04)
  # A record without turns has no range.
  assert section(written(run)[0], 'Latency')['`base`']['decoded token ms'] == '12.5'
  held = run.latency()
  held['targets']['base'] |= {'decode_ms': 126.0, 'decode_turns_ms': [75.0, 126.0, 130.0]}
  held['targets']['o_proj'] |= {'decode_ms': 78.7, 'decode_turns_ms': [78.0, 131.0, 78.7]}
  run.write_latency(held)
  text = written(run)[0]
  table = section(text, 'Latency')
  assert table['`base`']['decoded token ms'] == '126 (75.0 to 130)'
  assert table['`base`']['prefill ms'] == '250'
  assert table['`o_proj`']['decoded token ms'] == '131'
  assert 'of the others that median times their ratio' in text


def test_tokens_a_second_in_batches_follow_from_the_same_milliseconds(tmp_path):
  run = start(tmp_path)
  plant_batch(run, 8, 4, o_proj=1.25)
  held = run.batches()
  held['batches'][0]['times']['o_proj']['decode_ms'] = 7.0
  assert timings.milliseconds(held['batches'][0]['times'], 'o_proj', 'decode') == 12.5 * 1.25
  # 8 rows, a token each in 15.6 ms.
  assert re.search(r'o_proj .* 512 \|', batches.text(held))
