import dataclasses
import inspect
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprefix.decode
from convert.errors import InputError, RunError
from jaxprefix import generate, load_model
from jaxprefix.config import Compute
from jaxprefix.decode import GPU_STEPS, Generated, _decode, bucket, generate_ids, overflow_hint
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.sampling import Sampling
from tests.arrays import random_prefix
from tests.base_folders import GOLDEN_BASE, changed_weights, make_base_folder, with_config

PROMPTS = [[30], [40, 41, 42, 43, 44], [50, 51, 52], list(range(60, 80))]
GREEDY = DecodeConfig(decode_method="greedy", max_output_len=12)


def ids_of(*arguments, **options):
    return list(generate_ids(*arguments, **options))


def slow_greedy(model, prompt, prefix, n_tokens, eos_id):
    """Greedy decoding by running the whole text again for every token."""
    forward = jax.jit(lambda ids: model(ids, prefix)[0])
    ids = list(prompt)
    for _ in range(n_tokens):
        padded = jnp.asarray([ids + [eos_id] * (40 - len(ids))])
        token = int(forward(padded)[0, len(ids) - 1].argmax())
        if token == eos_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("with_prefix", [True, False])
def test_a_batch_of_different_lengths_equals_full_forwards(model, tokenizer, with_prefix):
    prefix = random_prefix(model.config) if with_prefix else None
    made = ids_of(model, tokenizer, PROMPTS, prefix, decode=GREEDY)
    assert made == [slow_greedy(model, prompt, prefix, 12, tokenizer.eos_id) for prompt in PROMPTS]


def test_one_text_is_no_list_of_prompts(model, tokenizer):
    with pytest.raises(InputError, match="prompts must be a list of texts"):
        generate(model, tokenizer, "朝の")


unchecked_generate = inspect.unwrap(generate)
"""Without beartype, as users have it."""


def test_prompts_may_come_from_an_iterator(golden_model, tokenizer):
    texts, settings = ["朝の", "昨日"], {"decode_method": "greedy", "max_output_len": 3}
    found = unchecked_generate(golden_model, tokenizer, iter(texts), **settings)
    assert found == generate(golden_model, tokenizer, texts, **settings)


def test_a_prompt_that_is_no_text_is_named(golden_model, tokenizer):
    with pytest.raises(InputError, match=r"^prompts\[1\] must be a text, is of type NoneType$"):
        unchecked_generate(golden_model, tokenizer, ["朝の", None])


def test_a_prefix_that_is_not_finite_is_to_blame(golden_model, tokenizer):
    prefix = random_prefix(golden_model.config).at[2, 1, 0].set(jnp.nan)
    with pytest.raises(RunError, match="logits are not finite: the prefix holds numbers that are not"):
        ids_of(golden_model, tokenizer, PROMPTS[:1], prefix)


def test_order_of_prompts_does_not_matter(model, tokenizer):
    forward = ids_of(model, tokenizer, PROMPTS, decode=GREEDY)
    assert ids_of(model, tokenizer, PROMPTS[::-1], decode=GREEDY) == forward[::-1]


def test_dynamic_rotary_scaling_goes_by_each_prompt(golden_model, tokenizer):
    """The longest prompt goes beyond the 16 positions: beside it, others go on as they do alone."""
    model = with_config(golden_model, n_positions=16, rotary_scaling="dynamic", rotary_factor=4.0)
    together = ids_of(model, tokenizer, PROMPTS, decode=GREEDY)
    assert together == [ids_of(model, tokenizer, [prompt], decode=GREEDY)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_batch_size_does_not_matter(golden_model, tokenizer, generator):
    """Samples depend on the seed and the place in the list, also when the last batch is not full.

    "rbg", which some set in JAX for its speed, would draw for a row what depends on the rows beside it.
    """
    _decode.clear_cache()  # a program stays for every generator
    with jax.default_prng_impl(generator):
        for decode in (GREEDY, DecodeConfig(decode_method="sample", max_output_len=6)):
            whole = ids_of(golden_model, tokenizer, PROMPTS[:3], decode=decode)
            assert ids_of(golden_model, tokenizer, PROMPTS[:3], batch_size=2, decode=decode) == whole
        assert ids_of(golden_model, tokenizer, []) == []


def test_batch_sizes_and_seeds_that_cannot_be_meant(golden_model, tokenizer):
    with pytest.raises(InputError, match="batch_size must be at least 1, is 0"):
        ids_of(golden_model, tokenizer, [], batch_size=0)
    with pytest.raises(InputError, match="a prefix of this model is an array"):
        ids_of(golden_model, tokenizer, [], random_prefix(golden_model.config)[:1])
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=f"seed must be at least 0 and below 4294967296, is {seed}"):
            ids_of(golden_model, tokenizer, [], seed=seed)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer, tmp_path):
    small = load_model(make_base_folder(tmp_path / "small", vocab_size=100))
    with pytest.raises(InputError, match="the tokenizer has 440 pieces, more than the model's vocab_size 100"):
        ids_of(small, tokenizer, PROMPTS)


def with_norm_weights_of(weight, tmp_path):
    base = shutil.copytree(GOLDEN_BASE, tmp_path / "base")
    with changed_weights(base) as weights:
        weights["gpt_neox.final_layer_norm.weight"][:] = weight
    return base


def test_weights_beyond_float16_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"layer_norm.weight: holds numbers beyond 65504.0, .* use --dtype bfloat16"):
        load_model(with_norm_weights_of(-1e5, tmp_path), "float16")


@pytest.mark.parametrize("method", ["greedy", "sample", "nucleus"])
def test_numbers_that_grow_beyond_float16_are_told(tokenizer, tmp_path, method):
    model = load_model(with_norm_weights_of(6e4, tmp_path), "float16")
    decode = DecodeConfig(decode_method=method, max_output_len=4)
    with pytest.raises(RunError, match=r"the model's logits are not finite.* beyond float16; use --dtype bfloat16"):
        ids_of(model, tokenizer, PROMPTS[:1], decode=decode)


def test_another_type_helps_float16_alone():
    assert overflow_hint("float16") == "its numbers grow beyond float16; use --dtype bfloat16"
    assert [overflow_hint(dtype)[-8:] for dtype in ("bfloat16", "float32")] == ["bfloat16", " float32"]


def test_rows_stop_at_eos_each_for_itself(model, tokenizer):
    made = ids_of(model, tokenizer, PROMPTS, decode=GREEDY)
    stop = made[0][3]
    stopping = dataclasses.replace(tokenizer, eos_id=stop)
    cut = [row[: row.index(stop)] if stop in row else row for row in made]
    assert ids_of(model, stopping, PROMPTS, decode=GREEDY) == cut
    assert len({len(row) for row in cut}) > 1


def test_a_gpus_steps_beyond_the_last_token_change_nothing(model, tokenizer, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(jaxprefix.decode, "ROOM_STEP", 1)  # no more room than tokens
    prefix, n_tokens = random_prefix(model.config), GPU_STEPS + 4
    decode = DecodeConfig("greedy", max_output_len=n_tokens)
    expected = [slow_greedy(model, prompt, prefix, n_tokens, tokenizer.eos_id) for prompt in PROMPTS]
    assert ids_of(model, tokenizer, PROMPTS, prefix, decode=decode) == expected
    [first, *_] = expected
    stopping = dataclasses.replace(tokenizer, eos_id=first[2])
    assert ids_of(model, stopping, PROMPTS[:1], prefix, decode=decode) == [first[: first.index(first[2])]]


def test_what_follows_eos_in_a_row_is_nobodys_fault(tokenizer, golden_model):
    made = ids_of(golden_model, tokenizer, PROMPTS, decode=GREEDY)
    stopping = dataclasses.replace(tokenizer, eos_id=made[0][3])
    expected = ids_of(golden_model, stopping, PROMPTS, decode=GREEDY)
    assert any(len(row) == 12 for row in expected), "some go on"
    broken = nnx.clone(golden_model)
    broken.embed.weight[...] = broken.embed.weight[...].at[stopping.eos_id].set(jnp.nan)
    assert ids_of(broken, stopping, PROMPTS, decode=GREEDY) == expected


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about the cache on a CPU")
@pytest.mark.parametrize(
    ("dtype", "cached"), [("float32", jnp.float32), ("bfloat16", jnp.float32), ("float16", jnp.float16)]
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_cache_has_the_base_models_type_but_for_bfloat16(
    traced_anew, tokenizer, monkeypatch, dtype, cached, scan_layers
):
    caches, make = [], jaxprefix.decode.cache_of
    monkeypatch.setattr(jaxprefix.decode, "cache_of", lambda *parts: caches.append(make(*parts)) or caches[-1])
    model = load_model(GOLDEN_BASE, dtype, compute=Compute(scan_layers=scan_layers))
    made = ids_of(model, tokenizer, PROMPTS, random_prefix(model.config), decode=GREEDY)
    assert {array.dtype for array in jax.tree.leaves(caches)} == {jnp.dtype(cached)}
    assert all(made)


def test_seed_decides_the_sample(golden_model, tokenizer):
    options = {"decode_method": "sample", "max_output_len": 20}
    first, again, other = (generate(golden_model, tokenizer, ["朝の"], seed=s, **options) for s in (1, 1, 2))
    assert first == again != other


def test_empty_prompt_starts_from_bos(golden_model, tokenizer):
    greedy = {"decode_method": "greedy", "max_output_len": 5}
    made = ids_of(golden_model, tokenizer, [[tokenizer.bos_id]], decode=DecodeConfig(**greedy))
    assert generate(golden_model, tokenizer, [""], **greedy) == [tokenizer.decode(made[0])]


def test_too_long_a_text_is_refused(model, tokenizer):
    with pytest.raises(
        InputError, match=r"prefix of 0 plus 300 tokens \(--max_output_len and the longest prompt of 200\)"
    ):
        ids_of(model, tokenizer, [[5] * 200], decode=DecodeConfig(max_output_len=100))


def test_other_temperatures_and_top_ps_compile_nothing(golden_model, tokenizer):
    def made(**sampling):
        return ids_of(golden_model, tokenizer, [[5, 6]] * 4, decode=DecodeConfig(max_output_len=8, **sampling))

    first = made()
    n_compiled = _decode._cache_size()
    assert made(temperature=3.0) != first
    object.__setattr__(whole := DecodeConfig(max_output_len=8), "temperature", 1)
    assert ids_of(golden_model, tokenizer, [[5, 6]] * 4, decode=whole) == first
    assert made(top_p=1e-6) == made(decode_method="greedy") != first
    assert _decode._cache_size() == n_compiled + 1, "greedy is another program"
    assert made(decode_method="greedy", top_k=3) == made(decode_method="greedy")
    assert _decode._cache_size() == n_compiled + 1, "which reads no top_k"


def test_numbers_of_prompts_near_each_other_share_a_program(golden_model, tokenizer):
    def made(n_prompts, batch_size=16):
        prompts = [[token] for token in range(30, 30 + n_prompts)]
        return ids_of(golden_model, tokenizer, prompts, batch_size=batch_size, decode=GREEDY)

    twelve = made(12)
    n_compiled = _decode._cache_size()
    assert made(11) == twelve[:11]
    assert _decode._cache_size() == n_compiled
    assert made(11, batch_size=11) == twelve[:11]
    assert _decode._cache_size() == n_compiled + 1, "more rows than asked for might exceed the memory"


def test_lengths_near_each_other_share_a_program(golden_model, tokenizer):
    def made(n_tokens, prompt_len=3):
        prompt = list(range(30, 30 + prompt_len))
        return ids_of(golden_model, tokenizer, [prompt], decode=DecodeConfig("greedy", max_output_len=n_tokens))[0]

    longest = made(64)
    n_compiled = _decode._cache_size()
    assert len(longest) == 64
    assert [made(n_tokens) for n_tokens in (1, 16, 63)] == [longest[:1], longest[:16], longest[:63]]
    assert len(made(64, prompt_len=16)) == 64
    assert _decode._cache_size() == n_compiled
    assert made(65)[:64] == longest
    assert _decode._cache_size() == n_compiled + 1


@pytest.mark.parametrize(
    ("step", "buckets"),
    [
        (1, [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32]),
        (16, [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]),
        (64, [64, 128, 192, 256, 320, 384, 448, 512, 640]),
    ],
)
def test_sizes_are_rounded_up_to_few(step, buckets):
    assert sorted({bucket(number, step) for number in range(1, buckets[-1] + 1)}) == buckets
    assert all(number <= bucket(number, step) < number + max(step, number / 4) for number in range(1, 5000))


def test_an_empty_prompt_takes_a_position(golden_model, tokenizer):
    decode = DecodeConfig(max_output_len=golden_model.config.max_positions)
    with pytest.raises(InputError, match="the longest prompt of 1"):
        ids_of(golden_model, tokenizer, [[]], decode=decode)


def test_every_step_draws_anew(golden_model, tokenizer):
    """Of a head of zeros all tokens are as likely: twelve that are alike would come of one random key."""
    model = nnx.clone(golden_model)
    model.head.weight[...] = jnp.zeros_like(model.head.weight[...])
    [made] = ids_of(model, tokenizer, [[5, 6]], decode=DecodeConfig("sample", max_output_len=12))
    assert len(set(made)) > 6


def test_a_row_that_was_not_finite_as_it_ended_is_remembered():
    """What follows an end does not count, what led to it does."""
    made = Generated(jnp.int32(0), jnp.zeros((2, 4), jnp.int32), jnp.array([False, False]), jnp.array(True))
    assert made.followed_by(jnp.array([7, 2]), jnp.array([True, True]), eos_id=2, limit=4).finite
    made = made.followed_by(jnp.array([7, 2]), jnp.array([True, False]), eos_id=2, limit=4)
    assert not made.finite
    assert not made.followed_by(jnp.array([7, 2]), jnp.array([True, True]), eos_id=2, limit=4).finite
    ended = made._replace(finite=jnp.array(True)).followed_by(jnp.array([7, 5]), jnp.array([True, False]), 2, limit=4)
    assert ended.finite
    np.testing.assert_array_equal(ended.ids, [[7, 7, 0, 0], [2, 2, 0, 0]])


def test_nothing_follows_where_there_is_no_prompt(golden_model, tokenizer):
    """A row that fills up a batch: what it would make, would keep the others waiting."""
    tokens, lengths = jnp.asarray([[5, 6, 7], [tokenizer.pad_id] * 3]), jnp.asarray([3, 0])
    sampling = Sampling(1.0, 1.0, np.uint32(0), 0)
    made, finite = _decode(golden_model, None, tokens, lengths, sampling, 12, tokenizer.eos_id, GREEDY)
    assert finite
    assert (made != tokenizer.eos_id).any(axis=1).tolist() == [True, False]


def test_timings_count_tokens_before_the_end(golden_model, tokenizer):
    nine = DecodeConfig("greedy", max_output_len=9)
    [made] = ids_of(golden_model, tokenizer, [[5, 6]], decode=nine)
    timings = []
    stopping = dataclasses.replace(tokenizer, eos_id=made[4])
    [shorter] = ids_of(golden_model, stopping, [[5, 6]], decode=nine, timings=timings)
    assert [timing.n_tokens for timing in timings] == [len(shorter)]
    assert len(shorter) < 9


def test_a_space_between_prompt_and_continuation_is_kept(golden_model, tokenizer, monkeypatch):
    made = tokenizer.encode("朝の 市場")[len(tokenizer.encode("朝の")) :]
    monkeypatch.setattr(jaxprefix.decode, "generate_ids", lambda *_: iter([made]))
    assert generate(golden_model, tokenizer, ["朝の"]) == [" 市場"]
