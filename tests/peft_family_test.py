"""Adapters against PEFT itself: made there and read here, trained here and read there."""

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import tiny_model
from family import KINDS, PLAIN
from flax.traverse_util import flatten_dict
from train_test import toy_batches

from lora_jax import lora, lora_family
from lora_jax.config import OptimConfig, TrainConfig
from lora_jax.hub import huggingface
from lora_jax.hub import peft as ours
from lora_jax.train import TrainJob, train
from lora_jax.transformer import Transformer

transformers = pytest.importorskip('transformers', reason='installs on Python 3.11')
peft = pytest.importorskip('peft')
torch = pytest.importorskip('torch')

# Biases everywhere, so that those have something to train.
CONFIG = dataclasses.replace(
  tiny_model.CONFIG, qkv_bias=True, output_bias=True, mlp_bias=True, num_layers=2
)
MODEL = Transformer(CONFIG)


@pytest.fixture(scope='module')
def base_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('base')
  huggingface.save(directory, CONFIG, params())
  return directory


def params():
  return tiny_model.params(CONFIG)


def quietly(work):
  with warnings.catch_warnings():
    # PEFT reads a name that transformers is about to drop, and warns that biases stay trained.
    warnings.simplefilter('ignore')
    return work()


def load_base(directory):
  return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype='float32').eval()


def load_theirs(base_directory, directory):
  base = load_base(base_directory)
  return quietly(lambda: peft.PeftModel.from_pretrained(base, directory)).eval()


def their_logits(model, tokens_BT):
  with torch.no_grad():
    return model(torch.from_numpy(np.array(tokens_BT, np.int64))).logits.numpy()


def our_logits(adapters, scales, tokens_BT):
  return tiny_model.logits(MODEL, lora.attach(params(), adapters, scales), tokens_BT)


def made_by_peft(base_directory, **settings):
  """A PEFT model in which all that trains is random."""
  options = {'r': 4, 'lora_alpha': 10, 'init_lora_weights': False, 'task_type': 'CAUSAL_LM'}
  config = peft.LoraConfig(**options | settings)
  torch.manual_seed(0)
  tuned = quietly(lambda: peft.get_peft_model(load_base(base_directory), config))
  with torch.no_grad():
    for name, parameter in tuned.named_parameters():
      if parameter.requires_grad and 'lora_A' not in name and 'lora_B' not in name:
        parameter.mul_(1 + 0.3 * torch.rand_like(parameter)).add_(0.02)
  return tuned.eval()


VARIANTS = {
  'plain': {'target_modules': ['o_proj', 'down_proj']},
  'all': {'target_modules': 'all-linear'},
  'regex': {'target_modules': r'.*\.[1-9]\.self_attn\.(q|k)_proj'},
  'one layer': {'target_modules': ['gate_proj', 'v_proj'], 'layers_to_transform': [1]},
  'patterns': {
    'target_modules': ['q_proj', 'o_proj', 'up_proj'],
    'rank_pattern': {'o_proj': 2, r'layers\.1\.mlp\.up_proj': 7},
    'alpha_pattern': {r'.*\.0\.self_attn\.q_proj': 31, 'up_proj': 3.5},
  },
  'patterns, rank stabilised': {
    'target_modules': ['q_proj', 'o_proj'],
    'rank_pattern': {'layers.1.self_attn.q_proj': 8},
    'alpha_pattern': {'o_proj': 5},
    'use_rslora': True,
  },
  'dora': {'target_modules': 'all-linear', 'use_dora': True},
  'dora, rank stabilised, patterns': {
    'target_modules': ['q_proj', 'o_proj'],
    'use_dora': True,
    'use_rslora': True,
    'rank_pattern': {'layers.1.self_attn.q_proj': 7},
    'alpha_pattern': {r'.*\.0\.self_attn\.o_proj': 3},
  },
  'exclude': {
    'target_modules': 'all-linear',
    'exclude_modules': ['k_proj', 'layers.0.mlp.up_proj'],
  },
  'exclude by regex': {
    'target_modules': ['q_proj', 'up_proj'],
    'exclude_modules': r'.*\.0\.mlp\..*',
  },
  'layers pattern': {
    'target_modules': ['v_proj'],
    'layers_to_transform': [1],
    'layers_pattern': 'layers',
  },
  'bias all': {'target_modules': ['q_proj', 'down_proj'], 'bias': 'all'},
  'bias of adapted': {'target_modules': ['k_proj'], 'bias': 'lora_only', 'use_dora': True},
  'norms': {'target_modules': ['o_proj'], 'modules_to_save': ['input_layernorm', 'model.norm']},
  'all norms': {'target_modules': r'.*\.1\.mlp\.(up|down)_proj', 'modules_to_save': ['norm']},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_pefts_adapters_say_the_same_here(base_directory, tmp_path, variant):
  tuned = made_by_peft(base_directory, **VARIANTS[variant])
  quietly(lambda: tuned.save_pretrained(tmp_path / 'theirs'))
  adapter = ours.load(tmp_path / 'theirs', params())
  tokens_BT = tiny_model.tokens(2, 13)
  expected = their_logits(tuned, tokens_BT)
  np.testing.assert_allclose(
    our_logits(adapter.params, adapter.scales(), tokens_BT), expected, atol=5e-4
  )
  assert np.abs(expected - tiny_model.logits(MODEL, params(), tokens_BT)).max() > 0.05
  # And back: the tensors bit by bit, and the same function under our configuration.
  ours.save(tmp_path / 'ours', adapter)
  theirs, back = (
    safetensors.flax.load_file(str(tmp_path / which / ours.WEIGHTS)) for which in ('theirs', 'ours')
  )
  assert theirs.keys() == back.keys()
  assert all(np.array_equal(theirs[name], back[name]) for name in theirs)
  again = load_theirs(base_directory, tmp_path / 'ours')
  np.testing.assert_allclose(their_logits(again, tokens_BT), expected, atol=1e-5)


def test_biases_of_some_layers_leave_the_others_as_they_are(base_directory, tmp_path):
  tuned = made_by_peft(
    base_directory, target_modules=['q_proj'], layers_to_transform=[1], bias='lora_only'
  )
  quietly(lambda: tuned.save_pretrained(tmp_path))
  adapter, tokens_BT = ours.load(tmp_path, params()), tiny_model.tokens(2, 13)
  np.testing.assert_allclose(
    our_logits(adapter.params, adapter.scales(), tokens_BT),
    their_logits(tuned, tokens_BT),
    atol=5e-4,
  )


def test_biases_that_a_file_lacks_are_said(base_directory, tmp_path, capsys):
  tuned = made_by_peft(base_directory, target_modules=['q_proj'])
  quietly(lambda: tuned.save_pretrained(tmp_path))
  file = tmp_path / ours.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | {'bias': 'lora_only'}))
  ours.load(tmp_path, params())
  assert 'has no biases' in capsys.readouterr().err


def test_gradients_of_dora_equal_pefts(base_directory, tmp_path):
  tuned = made_by_peft(base_directory, target_modules='all-linear', use_dora=True)
  quietly(lambda: tuned.save_pretrained(tmp_path))
  adapter, tokens_BT = ours.load(tmp_path, params()), tiny_model.tokens(2, 13)
  loss = lambda ad: jnp.mean(jnp.sin(our_logits(ad, adapter.scales(), tokens_BT)))
  grads = flatten_dict(jax.jit(jax.grad(loss))(adapter.params), sep='/')
  torch.mean(torch.sin(tuned(torch.from_numpy(np.array(tokens_BT, np.int64))).logits)).backward()
  names = {'a': 'lora_A.default.weight', 'b': 'lora_B.default.weight'}
  names['m'] = 'lora_magnitude_vector.default.weight'
  for path, grad in grads.items():
    module, leaf = path.rsplit('/', 1)
    block, name = module.split('/')[1:]
    block = {'attn': 'self_attn'}.get(block, block)
    for layer in range(CONFIG.num_layers):
      theirs = tuned.get_parameter(
        f'base_model.model.model.layers.{layer}.{block}.{name}.{names[leaf]}'
      ).grad.numpy()
      assert np.abs(theirs).max() > 1e-6
      np.testing.assert_allclose(grad[layer], theirs.T, atol=1e-5, rtol=1e-3)


# Trained here.

HERE = {
  **{kind: KINDS[kind] for kind in ('dora', 'pissa and dora', 'fused pissa', 'ragged pissa')},
  'fused dora': KINDS['fused dora'],
  'ragged': (
    'q_proj,o_proj,fc2',
    {
      'rank_pattern': (('layers/1/mlp/.*', 5), ('fc2', 2)),
      'alpha_pattern': (('layers/0/.*', 3.0), ('o_proj', 17.0)),
    },
  ),
  'rslora, ragged': ('all', {'rslora': True, 'rank_pattern': (('o_proj', 2),), 'layers': '1'}),
  'rslora, pissa': ('o_proj,fc2', {'rslora': True, 'init': 'pissa'}),
  'norms and biases': (
    'o_proj',
    {'train_also': ('norm', 'post_attention_layernorm', 'layers/attn/[qo]_proj/bias')},
  ),
}
HERE['ragged pissa'] = ('qkv,fc1', {'init': 'pissa', 'rank_pattern': (('qkv', 3),), 'layers': '0'})


@pytest.mark.parametrize('bake', [False, True])
@pytest.mark.parametrize('kind', HERE)
def test_our_adapters_say_the_same_in_peft(base_directory, tmp_path, kind, bake):
  targets, config, adapters = _trained_here(kind)
  ours.save(tmp_path, ours.of(adapters, config, base_sha256='a' * 64, targets=targets), bake)
  assert json.loads((tmp_path / ours.ORIGIN).read_text())['targets'] == targets
  tokens_BT = tiny_model.tokens(2, 13)
  found = our_logits(adapters, lora_family.plan(config, adapters).scales(), tokens_BT)
  assert np.abs(found - tiny_model.logits(MODEL, params(), tokens_BT)).max() > 0.05
  tuned = load_theirs(base_directory, tmp_path)
  np.testing.assert_allclose(their_logits(tuned, tokens_BT), found, atol=2e-4)
  # And here again, from the file: bit by bit when it is written anew.
  back = ours.load(tmp_path, params())
  np.testing.assert_allclose(our_logits(back.params, back.scales(), tokens_BT), found, atol=2e-4)
  ours.save(tmp_path / 'again', back)
  for file in (ours.WEIGHTS, ours.CONFIG):
    assert (tmp_path / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()


@functools.cache
def _trained_here(kind):
  targets, changes = HERE[kind]
  config = dataclasses.replace(PLAIN, dropout=0.1, **changes)
  return targets, config, _after_two_steps(targets, config)


def _after_two_steps(targets, config):
  optim = OptimConfig(learning_rate=5e-2, lr_ratio=2.0)
  job = TrainJob(lora.resolve(targets, params()), config, optim, 0, toy_batches)
  return train(MODEL, params(), job, TrainConfig(steps=2, dtype='float32')).adapters


def test_the_base_is_there_after_training_its_norms():
  config = dataclasses.replace(PLAIN, train_also=('norm', 'bias'))
  before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params())]
  adapters = _after_two_steps('o_proj', config)
  assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params())] == before
  moved = adapters['norm']['scale'] != params()['norm']['scale']
  assert moved.all()
