"""Latency in batches: what is timed, what is kept, and what a report makes of it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from planted_run import plant_batch
from tiny_model import MODEL, RANK

from lora_jax import batch_latency, latency, lora
from lora_jax.bank_kernel import BankKernel
from lora_jax.batch import Batch, batches
from lora_jax.config import LoraConfig
from lora_jax.errors import UserError
from lora_jax.head import head_kernel
from lora_jax.records import RunDirectory
from lora_jax.report import batches as tables
from lora_jax.report.document import markdown
from lora_jax.report.page import render
from lora_jax.transformer import KeyValues
from lora_jax.versions import processor

ROOT = Path(__file__).resolve().parent.parent


def sets(*names, **changes):
  params = tiny_model.params()
  config = LoraConfig(rank=RANK, **changes)
  return {name: (lora.resolve(name, params), config) for name in names}


def test_batches_have_at_least_a_row_an_adapter():
  assert batches([8, 1], [8, 1]) == [Batch(1, 1), Batch(8, 1), Batch(8, 8)]
  assert Batch(8, 1).label == '8 rows, 1 adapter'
  for rows, adapters in (([0], [1]), ([1], [0]), ([], [1])):
    with pytest.raises(UserError, match='at least 1'):
      batches(rows, adapters)
  with pytest.raises(UserError, match='--rows=4'):
    batches([1, 2], [4])


@pytest.mark.parametrize('batch', [Batch(2, 1), Batch(3, 2)])
def test_base_merged_and_target_sets_take_turns(batch):
  found = batch_latency.measure(
    MODEL, tiny_model.params(), sets('o_proj', 'qkv_proj'), batch, turns=2, prompt=5
  )
  assert list(found) == ['base', 'merged', 'o_proj', 'qkv_proj']
  for times in found.values():
    for work in ('prefill', 'decode'):
      assert times[f'{work}_ms'] > 0
      assert times[f'{work}_ratio_low'] <= times[f'{work}_ratio'] <= times[f'{work}_ratio_high']
  assert found['base']['prefill_ratio'] == found['base']['decode_ratio_high'] == 1


def test_rows_of_different_adapters_run_through_a_bank(monkeypatch):
  seen = {}

  def entrants(model, base, variants, turns, rows, prompt, label):
    seen.update(variants)
    return dict.fromkeys((None, *variants))

  monkeypatch.setattr(batch_latency, 'interleaved', entrants)
  base = tiny_model.params()
  pissa = sets('fc2', init='pissa')
  batch_latency.measure(MODEL, base, sets('o_proj') | pissa, Batch(5, 2), 1, 5)
  kernel = seen['o_proj']['layers']['attn']['o_proj']['kernel']
  assert isinstance(kernel, BankKernel)
  assert kernel.slots[0].tolist() == [1, 2, 1, 2, 1]
  assert kernel.bank.a.shape[-1] == RANK
  # Such an adapter is served with what it began as.
  assert seen['fc2']['layers']['mlp']['down_proj']['kernel'].bank.a.shape[-1] == 2 * RANK
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), seen['merged'], base)


def test_every_row_is_decoded_after_its_whole_prompt():
  rows, prompt = 3, 6
  params, config = tiny_model.params(), MODEL.config
  head = head_kernel(MODEL, params, rows)
  kv = KeyValues.empty(config, rows, prompt + latency._DECODE_STEPS, MODEL.dtype)
  key = jax.random.key(0)
  kv = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape, leaf.dtype), kv)
  ours = latency._decode(MODEL, params, head, kv, prompt)
  alone = [
    latency._decode(
      MODEL, params, head, jax.tree.map(lambda leaf, row=row: leaf[:, row : row + 1], kv), prompt
    )
    for row in range(rows)
  ]
  assert jnp.array_equal(ours, jnp.concatenate(alone))


def test_a_report_has_a_table_and_drawings_of_each_batch(tmp_path):
  run = RunDirectory(tmp_path)
  assert tables.sections(run.batches()) == []
  plant_batch(run, 8, 4, **{'o_proj': 1.1, 'o_proj,fc2': 1.5})
  made = tables.document(run.batches())
  said = markdown(made)
  assert '8 rows, 4 adapters' in said
  assert '| `o_proj,fc2` |' in said
  # 8 rows, a token each in 18.75 ms.
  assert '427' in said
  assert '1.50 (1.49 to 1.52)' in tables.text(run.batches())
  assert render(made).count('role="img"') == 2


def launch(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.latency', *arguments],
    capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
  )  # fmt: skip


SMALL = ('--base=tiny', '--turns=1', '--prompt_tokens=4', '--targets=o_proj', '--adapters=1,2')


def test_batches_that_were_timed_are_not_timed_again(tmp_path):
  out = tmp_path / 'out'
  first = launch(*SMALL, '--rows=1,2', f'--out={out}')
  assert first.returncode == 0, first.stderr
  assert str(out / 'latency.html') in first.stdout.splitlines()[-1]
  held = json.loads((out / 'batches.json').read_text())
  assert [(b['rows'], b['adapters']) for b in held['batches']] == [(1, 1), (2, 1), (2, 2)]
  # As an earlier version left it: what is timed beside it does not name its processor.
  assert held['about'].pop('processor') == processor()
  (out / 'batches.json').write_text(json.dumps(held))
  again = launch(*SMALL, '--rows=1,2,3', f'--out={out}')
  assert again.returncode == 0, again.stderr
  more = json.loads((out / 'batches.json').read_text())
  assert more['batches'][:3] == held['batches']
  assert len(more['batches']) == 5
  assert more['about'] == held['about']
  more['about']['processor'] = 'another, 3 cores'
  (out / 'batches.json').write_text(json.dumps(more))
  other = launch(*SMALL, '--rows=1,2', f'--out={out}')
  assert (other.returncode, other.stderr.count('\n')) == (2, 2)
  assert 'processor=another, 3 cores, not' in other.stderr
  other = launch(*SMALL, '--rows=1,2', '--rank=3', f'--out={out}')
  assert (other.returncode, other.stderr.count('\n')) == (2, 2)
  assert 'rank=16, not 3' in other.stderr


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (('--rows=x',), '--rows=x: give whole numbers'),
    (('--rows=2', '--adapters=4'), 'add --rows=4'),
    (('--turns=0',), '--turns=0'),
    (('--targets=banana',), 'banana'),
  ],
)
def test_a_mistake_is_one_line(arguments, says, tmp_path):
  done = launch(*arguments, f'--out={tmp_path / "out"}')
  assert done.returncode == 2
  assert says in done.stderr
  assert done.stderr.count('\n') == 1
  assert not (tmp_path / 'out').exists()
