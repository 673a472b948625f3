from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import tiny_gguf
from gguf import GGMLQuantizationType

from lora_jax.config import CACHE
from lora_jax.errors import UserError
from lora_jax.hub import bases, gguf, gguf_config, gguf_weights

HF_MODULES = {
  'attn': ('self_attn', ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
  'mlp': ('mlp', ('gate_proj', 'up_proj', 'down_proj')),
}


def load(path):
  file = gguf.open_file(path)
  config = gguf_config.model_config(file)
  return config, gguf_weights.load_params(file, config)


def from_hugging_face(weights, num_layers):
  """Our parameter tree, built the other way: from Hugging Face's names and layout."""
  stack = lambda name: np.stack(
    [weights[f'model.layers.{i}.{name}.weight'].T for i in range(num_layers)]
  )
  layers = {
    norm: {'scale': stack(norm)} for norm in ('input_layernorm', 'post_attention_layernorm')
  }
  for block, (hf_block, modules) in HF_MODULES.items():
    layers[block] = {name: {'kernel': stack(f'{hf_block}.{name}')} for name in modules}
  return {
    'embed_tokens': {'embedding': weights['model.embed_tokens.weight']},
    'layers': layers,
    'norm': {'scale': weights['model.norm.weight']},
  }


def flatten(tree, path=''):
  if not isinstance(tree, dict):
    return {path: tree}
  return {k: v for name, sub in tree.items() for k, v in flatten(sub, f'{path}/{name}').items()}


def assert_same_tree(found, expected):
  found, expected = flatten(found), flatten(expected)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == np.float32, name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def one_line(error):
  text = str(error.value)
  assert '\n' not in text
  return text


# Weights.


def test_float32_round_trip_undoes_layout_and_permutation(tmp_path):
  weights = tiny_gguf.hugging_face_weights()
  path = tiny_gguf.write(tmp_path / 'a.gguf', tiny_gguf.llama_cpp_weights(weights))
  config, params = load(path)
  assert config.tie_embeddings
  assert config.rope_theta == 50_000
  assert_same_tree(params, from_hugging_face(weights, tiny_gguf.LAYERS))


def test_unpermute_inverts_interleaving():
  rng = np.random.default_rng(0)
  for heads, head_dim in [(1, 2), (3, 4), (9, 64)]:
    weight = rng.standard_normal((heads * head_dim, 5))
    back = gguf_weights.unpermute(tiny_gguf.interleave(weight, heads), heads)
    np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize(
  ('kind', 'bits'),
  [
    ('F16', 10),
    ('BF16', 7),
    ('Q8_0', 6),
    ('Q5_1', 4),
    ('Q5_0', 4),
    ('Q4_1', 3),
    ('Q4_0', 3),
  ],
)
def test_stored_precision_bounds_the_error(tmp_path, kind, bits):
  weights = tiny_gguf.hugging_face_weights()
  path = tiny_gguf.write(
    tmp_path / 'a.gguf', tiny_gguf.llama_cpp_weights(weights), GGMLQuantizationType[kind]
  )
  _, params = load(path)
  exact = flatten(from_hugging_face(weights, tiny_gguf.LAYERS))
  for name, value in flatten(params).items():
    # Half a step at the largest magnitude of a block, which is below 8 here.
    assert np.abs(value - exact[name]).max() <= 8 * 2.0**-bits, name
    if name.endswith('kernel'):
      assert np.abs(value - exact[name]).max() > 0, name
  expected = kind if kind.endswith('F16') else f'dequantised {kind}'
  assert gguf_weights.weights_kind(gguf.open_file(path)) == expected


def test_untied_head_is_transposed(tmp_path):
  weights = tiny_gguf.llama_cpp_weights(tiny_gguf.hugging_face_weights())
  head = np.random.default_rng(1).standard_normal((len(tiny_gguf.TOKENS), 32), np.float32)
  config, params = load(tiny_gguf.write(tmp_path / 'a.gguf', weights | {'output.weight': head}))
  assert not config.tie_embeddings
  np.testing.assert_array_equal(params['lm_head']['kernel'], head.T)


def test_blocks_follow_their_definition(tmp_path):
  rng = np.random.default_rng(2)
  rows, blocks = 3, 2
  scales = rng.standard_normal((rows, blocks, 2)).astype('<f2')
  bytes_q8 = rng.integers(-128, 128, (rows, blocks, 32)).astype(np.int8)
  bytes_q4 = rng.integers(0, 256, (rows, blocks, 16)).astype(np.uint8)
  q8 = np.concatenate([scales[..., :1].view(np.uint8), bytes_q8.view(np.uint8)], axis=-1)
  q4 = np.concatenate([scales.view(np.uint8), bytes_q4], axis=-1)
  file = written(
    tmp_path / 'a.gguf',
    q8=(q8.reshape(rows, -1), GGMLQuantizationType.Q8_0),
    q4=(q4.reshape(rows, -1), GGMLQuantizationType.Q4_1),
  )
  found_q8, found_q4 = file.read('q8'), file.read('q4')
  assert found_q8.shape == found_q4.shape == (rows, 32 * blocks)
  for row in range(rows):
    for block in range(blocks):
      d, m = (np.float32(x) for x in scales[row, block])
      for i in range(32):
        byte = int(bytes_q4[row, block, i % 16])
        nibble = byte & 15 if i < 16 else byte >> 4
        assert found_q8[row, 32 * block + i] == d * np.float32(bytes_q8[row, block, i])
        np.testing.assert_allclose(
          found_q4[row, 32 * block + i], d * np.float32(nibble) + m, rtol=1e-6, atol=1e-6
        )


def written(path, **tensors):
  """A file of raw blocks: name=(bytes (rows, n), kind)."""
  writer = gguf_package.GGUFWriter(path, 'llama')
  for name, (stored, kind) in tensors.items():
    writer.add_tensor(name, stored, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return gguf.open_file(path)


def k_scales(packed, j):
  """Six-bit scale and minimum of group j of 8, packed in 12 bytes (ggml, q4_K and q5_K)."""
  if j < 4:
    return packed[j] & 63, packed[j + 4] & 63
  return (
    (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4),
    (packed[j + 4] >> 4) | (packed[j] >> 6 << 4),
  )


def textbook_k_block(kind, block):
  """The 256 numbers of a block, one after the other, from ggml's definition."""
  half = lambda start: np.frombuffer(block[start : start + 2].tobytes(), '<f2')[0].astype(
    np.float32
  )
  b = block.astype(int)
  out = []
  for i in range(256):
    if kind == 'Q6_K':
      part, at = divmod(i, 128)
      quarter, at = divmod(at, 32)
      low = b[64 * part + at + 32 * (quarter % 2)]
      low = low & 15 if quarter < 2 else low >> 4
      high = b[128 + 32 * part + at] >> (2 * quarter) & 3
      scale = np.int8(block[192 + 8 * part + 2 * quarter + at // 16])
      out.append(half(208) * np.float32(scale) * np.float32((low | high << 4) - 32))
      continue
    group, at = divmod(i, 32)
    scale, minimum = k_scales(b[4:16], group)
    qs = 16 if kind == 'Q4_K' else 48
    value = b[qs + 32 * (group // 2) + at] >> (4 * (group % 2)) & 15
    if kind == 'Q5_K':
      value += (b[16 + at] >> group & 1) << 4
    out.append(half(0) * np.float32(scale) * np.float32(value) - half(2) * np.float32(minimum))
  return out


@pytest.mark.parametrize(('kind', 'halves'), [('Q4_K', (0, 2)), ('Q5_K', (0, 2)), ('Q6_K', (208,))])
def test_k_blocks_follow_their_definition(tmp_path, kind, halves):
  rng = np.random.default_rng(3)
  rows, blocks = 2, 2
  _, size = gguf_package.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
  stored = rng.integers(0, 256, (rows, blocks, size)).astype(np.uint8)
  for at in halves:
    scale = rng.standard_normal((rows, blocks, 1)).astype('<f2')
    stored[..., at : at + 2] = scale.view(np.uint8)
  file = written(tmp_path / 'a.gguf', x=(stored.reshape(rows, -1), GGMLQuantizationType[kind]))
  expected = [[x for block in row for x in textbook_k_block(kind, block)] for row in stored]
  np.testing.assert_allclose(file.read('x'), expected, rtol=1e-6, atol=1e-5)


# The header, against the package's own reader.


def assert_reads_as_the_package_does(path):
  reader = gguf_package.GGUFReader(path)
  file = gguf.open_file(path)
  expected = {
    name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')
  }
  assert dict(file.metadata) == expected
  assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
  for tensor in reader.tensors:
    place = file.tensors[tensor.name]
    assert place.shape == tuple(reversed(tensor.shape.tolist()))
    assert (place.kind, place.start) == (tensor.tensor_type, tensor.data_offset)
    assert place.num_bytes == tensor.n_bytes


@pytest.mark.parametrize('alignment', [None, 64])
def test_header_as_the_package_reads_it(tmp_path, alignment):
  path = tiny_gguf.write(tmp_path / 'a.gguf', general__alignment=alignment)
  assert_reads_as_the_package_does(path)


@pytest.mark.base
def test_base_header_as_the_package_reads_it(base_path):
  assert_reads_as_the_package_does(base_path)


@pytest.fixture(scope='module')
def base_path():
  bases.load('smollm2-135m-instruct')
  return Path(CACHE).expanduser() / 'SmolLM2-135M-Instruct.Q4_1.gguf'


@pytest.mark.base
@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_base_equals_transformers(base_path):
  transformers = pytest.importorskip('transformers')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    base_path.parent, gguf_file=base_path.name
  )
  weights = {name: value.float().numpy() for name, value in model.state_dict().items()}
  config, params = load(base_path)
  assert_same_tree(params, from_hugging_face(weights, config.num_layers))
  theirs = model.config
  assert config.tie_embeddings == theirs.tie_word_embeddings
  assert config.rope_theta == theirs.rope_parameters['rope_theta']
  assert config.norm_eps == theirs.rms_norm_eps
  assert config.max_length == theirs.max_position_embeddings
  assert config.head_dim == theirs.head_dim
  assert (config.num_heads, config.num_kv_heads) == (
    theirs.num_attention_heads,
    theirs.num_key_value_heads,
  )


# Mistakes.


def test_every_truncation_is_named(tmp_path):
  whole = tiny_gguf.write(tmp_path / 'a.gguf').read_bytes()
  cut = tmp_path / 'cut.gguf'
  for size in [*range(4, 600), *range(600, len(whole), 997), len(whole) - 1]:
    cut.write_bytes(whole[:size])
    with pytest.raises(UserError, match='cut short') as error:
      gguf.open_file(cut)
    assert str(cut) in one_line(error)


def test_random_damage_in_the_header_is_never_a_crash(tmp_path):
  whole = bytearray(tiny_gguf.write(tmp_path / 'a.gguf').read_bytes())
  header = min(tensor.start for tensor in gguf.open_file(tmp_path / 'a.gguf').tensors.values())
  rng = np.random.default_rng(3)
  damaged_path = tmp_path / 'damaged.gguf'
  messages = []
  for _ in range(300):
    damaged = whole.copy()
    for position in rng.integers(4, header, 3):
      damaged[position] = rng.integers(256)
    damaged_path.write_bytes(damaged)
    try:
      gguf.open_file(damaged_path)
    except UserError as error:
      messages.append(str(error))
  assert len(messages) > 30
  assert all(str(damaged_path) in message for message in messages)


@pytest.mark.parametrize('content', [b'', b'GG', b'PK\x03\x04 a zip file', b'{"json": true}'])
def test_other_files_are_not_gguf(tmp_path, content):
  path = tmp_path / 'a.gguf'
  path.write_bytes(content)
  with pytest.raises(UserError, match='is not a GGUF file') as error:
    gguf.open_file(path)
  assert str(path) in one_line(error)


def test_missing_file_and_directory(tmp_path):
  for path in (tmp_path / 'none.gguf', tmp_path):
    with pytest.raises(UserError, match='cannot be read') as error:
      gguf.open_file(path)
    assert str(path) in one_line(error)


def test_unknown_tensor_type(tmp_path):
  path = tiny_gguf.write(tmp_path / 'a.gguf')
  content = bytearray(path.read_bytes())
  name = b'blk.0.attn_q.weight'
  at = content.index(name) + len(name) + 4 + 2 * 8
  content[at : at + 4] = (99).to_bytes(4, 'little')
  path.write_bytes(content)
  with pytest.raises(
    UserError, match=r'unknown type 99 for tensor blk\.0\.attn_q\.weight'
  ) as error:
    gguf.open_file(path)
  one_line(error)


def test_type_that_cannot_be_dequantised(tmp_path):
  writer = gguf_package.GGUFWriter(tmp_path / 'a.gguf', 'llama')
  writer.add_tensor('counts', np.arange(6, dtype=np.int32).reshape(2, 3))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(UserError, match='counts has type I32') as error:
    gguf.open_file(tmp_path / 'a.gguf').read('counts')
  one_line(error)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'architecture': 'gemma'}, "architecture 'gemma' is not .* one of llama, qwen2, qwen3"),
    ({'llama__block_count': None}, 'llama.block_count'),
    ({'llama__block_count': 4}, r'no tensor blk\.3\.'),
    ({'llama__block_count': 2}, r'the tensor blk\.2\..* and 8 more'),
    ({'llama__feed_forward_length': 96}, r'is \(64, 32\), but .* \(96, 32\)'),
    ({'llama__expert_count': 8}, 'mixture of experts'),
    ({'llama__rope__scaling__type': 'yarn'}, r'llama\.rope\.scaling\.factor'),
    (
      {'llama__rope__scaling__type': 'longrope', 'llama__rope__scaling__factor': 4.0},
      "positions stretched by 'longrope'",
    ),
    (
      {'llama__rope__scaling__type': 'yarn', 'llama__rope__scaling__factor': 0.0},
      r'positions stretched 0\.0 times',
    ),
    ({'split__count': 3}, 'is one of 3 parts; join them'),
    ({'llama__rope__dimension_count': 4}, 'part of each head'),
    ({'llama__attention__head_count': [4, 4, 4]}, 'for each layer'),
    ({'llama__attention__head_count_kv': 3}, '4 query heads over 3'),
  ],
)
def test_models_that_the_transformer_cannot_be_are_refused(tmp_path, changes, message):
  path = tiny_gguf.write(tmp_path / 'a.gguf', **changes)
  with pytest.raises(UserError, match=message) as error:
    load(path)
  assert str(path) in one_line(error)


def test_a_file_that_was_joined_from_parts_is_a_whole_one(tmp_path):
  joined = tiny_gguf.write(tmp_path / 'joined.gguf', split__count=0)
  assert_same_tree(load(joined)[1], load(tiny_gguf.write(tmp_path / 'a.gguf'))[1])


@pytest.mark.parametrize('name', ['token_embd.weight', 'output_norm.weight', 'blk.1.ffn_up.weight'])
def test_missing_tensor_is_named(tmp_path, name):
  weights = tiny_gguf.llama_cpp_weights(tiny_gguf.hugging_face_weights())
  del weights[name]
  with pytest.raises(UserError, match=f'no tensor {name}'):
    load(tiny_gguf.write(tmp_path / 'a.gguf', weights))


def test_tensor_without_a_place_is_named(tmp_path):
  weights = tiny_gguf.llama_cpp_weights(tiny_gguf.hugging_face_weights())
  weights['blk.1.attn_q.bias'] = np.zeros(32, np.float32)
  with pytest.raises(UserError, match=r'the tensor blk\.1\.attn_q\.bias, which'):
    load(tiny_gguf.write(tmp_path / 'a.gguf', weights))
