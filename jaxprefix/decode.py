"""Continue prompts: prefill and decoding loop in one compiled program, with a cache of static size.

Rows of different lengths are padded on the right. A row's next token goes into the slot after its own
last one, so the padding's keys are overwritten before a query could see them.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from convert.errors import InputError, RunError
from jaxprefix.config import SEED_LIMIT
from jaxprefix.data.shapes import round_up
from jaxprefix.inference_config import DecodeConfig
from jaxprefix.machine.devices import on_a_cpu
from jaxprefix.models import BaseModel
from jaxprefix.models.attention import Cache, cache_of, own_slots, positions_of
from jaxprefix.models.config import ModelConfig
from jaxprefix.prefix import Prefix
from jaxprefix.recipe import RECIPES
from jaxprefix.sampling import Sampling, are_finite, choose_tokens
from jaxprefix.sharding import decoded_rows
from jaxprefix.tokenizer import Tokenizer

PROMPT_STEP, ROOM_STEP = 16, 64
"""Prompts and the room for output have at least this many tokens, see `bucket`; room costs less than prompts do."""
GPU_STEPS = 8
"""Tokens between two checks of whether all rows have stopped: at each check, a GPU waits for the host."""


class BatchTiming(NamedTuple):
    """How long a batch of prompts took, compilation included."""

    n_rows: int
    n_tokens: int
    seconds: float


class Generated(NamedTuple):
    """What the decoding loop has generated so far."""

    n: Int[Array, ""]
    """New tokens in every row."""
    ids: Int[Array, "B room"]
    """The tokens, filled up with eos."""
    stopped: Bool[Array, "B"]
    """Whether a row has generated eos or as many tokens as it may, or had no prompt."""
    finite: Bool[Array, ""]
    """Whether all logits were finite, except those of rows that had already stopped."""

    def followed_by(
        self, tokens: Int[Array, "B"], finite: Bool[Array, "B"], eos_id: int, limit: Int[Array, ""] | int
    ) -> "Generated":
        """Add a token to every row, eos to those that have stopped; `finite` says whether a row's logits were finite.

        A row stops at `limit` tokens at the latest.
        """
        stopped = self.stopped | (tokens == eos_id)
        ids = self.ids.at[:, self.n].set(jnp.where(stopped, eos_id, tokens))
        n = self.n + 1
        return Generated(n, ids, stopped | (n >= limit), self.finite & (finite | self.stopped).all())


DecodeState = tuple[Generated, Int[Array, "B"], Cache]
"""What the decoding loop carries. The tokens are each row's last: their keys and values are not in the cache yet."""


def generate(
    model: BaseModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    prefix: Prefix | None = None,
    seed: int = 42,
    batch_size: int = 16,
    **decode: Any,
) -> list[str]:
    """Return one continuation per prompt, without the prompt.

    `decode` takes the fields of DecodeConfig: decode_method ("nucleus"), max_output_len (128 tokens), top_p (0.95),
    top_k (50), temperature (1.0), recipe ("default"). An empty prompt starts from bos. Generation stops before eos.
    Sampling depends on the seed and on a prompt's place in the list; on the batch only through the logits' last digits,
    which now and then change a token, most often with `sample`.
    One program is compiled, and kept, for each combination of the base model's shapes and type, the prefix length (or
    none), the number of prompts up to batch_size, the length of the longest prompt, max_output_len (these three rounded
    up, see `bucket`), and the other fields but top_p and temperature. Raises InputError when prefix, prompt and output
    together exceed the model's positions, and RunError when logits are not finite.
    """
    if isinstance(prompts, str):
        raise InputError("prompts must be a list of texts, not one text")
    prompts = list(prompts)  # an iterator gives them once
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompts[{index}] must be a text, is of type {type(prompt).__name__}")
    return list(stream(model, tokenizer, prompts, prefix, seed, batch_size, DecodeConfig(**decode)))


def stream(
    model: BaseModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    prefix: Prefix | None,
    seed: int,
    batch_size: int,
    decode: DecodeConfig,
    timings: list[BatchTiming] | None = None,
    first_index: int = 0,
) -> Iterator[str]:
    """Yield what `generate` returns, a batch of prompts at a time; append each batch's timing to `timings`.

    `first_index` is the first prompt's index in the whole list, of which `prompts` may be only a part.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    made_ids = generate_ids(model, tokenizer, ids, prefix, seed, batch_size, decode, timings, first_index)
    for prompt, made in zip(ids, made_ids, strict=True):
        yield continuation(tokenizer, prompt, made)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], made: Sequence[int]) -> str:
    """Return the text of the new ids: decoded together with the prompt, so that a space between them is kept."""
    return tokenizer.decode([*prompt, *made])[len(tokenizer.decode([*prompt])) :]


def generate_ids(
    model: BaseModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    prefix: Prefix | None = None,
    seed: int = 42,
    batch_size: int = 16,
    decode: DecodeConfig = DecodeConfig(),
    timings: list[BatchTiming] | None = None,
    first_index: int = 0,
) -> Iterator[list[int]]:
    """Do as `stream` does, from token ids to token ids; check all prompts before continuing the first."""
    check_prompts(model.config, tokenizer, prompts, prefix, decode)
    rows = [list(prompt) or [tokenizer.bos_id] for prompt in prompts]
    if operator.index(batch_size) < 1:
        raise InputError(f"batch_size must be at least 1, is {batch_size}")
    if not 0 <= operator.index(seed) < SEED_LIMIT:
        raise InputError(f"seed must be at least 0 and below {SEED_LIMIT}, is {seed}")
    if not rows:
        return
    sharding, n_parts = decoded_rows(model)
    batch_size = round_up(min(batch_size, bucket(len(rows))), n_parts)
    # The program is compiled for these settings; those that it does not read, or takes as inputs, get fixed values.
    unread: dict[str, Any] = {} if decode.decode_method == "nucleus" else {"top_k": 0}
    room = bucket(decode.max_output_len, ROOM_STEP)
    compiled_for = dataclasses.replace(decode, temperature=1.0, top_p=1.0, max_output_len=room, **unread)
    for first in range(0, len(rows), batch_size):
        group = rows[first : first + batch_size]
        started = time.perf_counter()
        sampling = Sampling(float(decode.temperature), float(decode.top_p), np.uint32(seed), first_index + first)
        spread = jax.device_put(padded_prompts(group, batch_size, tokenizer.pad_id), sharding)
        inputs = (model, prefix, *spread, sampling, decode.max_output_len)
        made, finite = jax.device_get(_decode(*inputs, tokenizer.eos_id, compiled_for))
        if not finite:
            sound = prefix is None or np.isfinite(np.asarray(prefix, np.float32)).all()
            why = overflow_hint(model.embed.weight.dtype.name) if sound else "the prefix holds numbers that are not"
            raise RunError(f"the model's logits are not finite: {why}")
        lengths_made = (np.cumsum(made == tokenizer.eos_id, axis=1) == 0).sum(axis=1)[: len(group)]
        if timings is not None:
            timings.append(BatchTiming(len(group), int(lengths_made.sum()), time.perf_counter() - started))
        for row, length in zip(made, lengths_made, strict=False):
            yield row[:length].tolist()


def padded_prompts(prompts: Sequence[list[int]], n_rows: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 token ids [n_rows, tokens], padded on the right, and each row's length, 0 without a prompt."""
    tokens = np.full((n_rows, bucket(max(map(len, prompts)), PROMPT_STEP)), pad_id, np.int32)
    lengths = np.zeros(n_rows, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def bucket(number: int, step: int = 1) -> int:
    """Round up, by less than `step` or a quarter, to one of a few numbers, so that few programs are compiled.

    These are multiples of `step` and of an eighth of the next power of two: with step 1, 1 to 8, 10, 12, 14, 16, 20,
    24, ….
    """
    return round_up(number, max(step, 2 ** (number - 1).bit_length() // 8))


def check_prompts(
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Iterable[Sequence[int]],
    prefix: Prefix | None,
    decode: DecodeConfig,
) -> None:
    """Raise InputError if prefix, longest prompt (an empty one becomes bos) and output exceed the model's positions.

    The same if the tokenizer has more pieces than the model.
    """
    config.check_vocabulary(tokenizer.vocab_size)
    prefix_len = config.prefix_length(prefix)
    if (longest := max(prompts, key=len, default=None)) is not None:
        n_tokens, begins = len(longest) or 1, tokenizer.decode([*longest[:40]])
        what = f"--max_output_len and the longest prompt of {n_tokens}"
        config.check_fit(prefix_len, n_tokens + decode.max_output_len, what, begins)


def overflow_hint(dtype: str) -> str:
    """Say why a model's numbers became infinite, and what helps."""
    return f"its numbers grow beyond {dtype}" + ("; use --dtype bfloat16" if dtype == "float16" else "")


@functools.partial(jax.jit, static_argnames=("eos_id", "decode"))
def _decode(
    model: BaseModel,
    prefix: Prefix | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    sampling: Sampling,
    limit: Int[Array, ""] | int,
    eos_id: int,
    decode: DecodeConfig,
) -> tuple[Int[Array, "B room"], Bool[Array, ""]]:
    """Prefill, then loop until every row has made eos or `limit` tokens.

    Returns the new tokens, filled up with eos, and whether all logits on the way were finite. `decode.max_output_len`
    is the room for the tokens. The temperature and top_p of `decode` are not read: `sampling` holds them as traced
    inputs. Up to GPU_STEPS − 1 steps run after the last token, without effect: all rows have stopped, and JAX drops
    writes that are out of bounds.
    """
    config, n_rows = model.config, tokens.shape[0]
    prefix_len = config.prefix_length(prefix)
    restarts = RECIPES[decode.recipe].restart_gpt2_positions and config.model_type == "gpt2"
    indices = sampling.first_index + jnp.arange(n_rows)
    # With JAX's other generators, a row's numbers depend on its neighbours.
    key = jax.random.key(sampling.seed, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)

    def choose(generated: Generated, hidden: Float[Array, "B D"]) -> tuple[Generated, Int[Array, "B"]]:
        """Choose what follows every row's last token, from its hidden state."""
        logits = model.logits(hidden)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, generated.n)
        tokens = choose_tokens(logits, step_keys, decode, sampling)
        return generated.followed_by(tokens, are_finite(logits), eos_id, limit), tokens

    def going_on(state: DecodeState) -> Bool[Array, ""]:
        return ~state[0].stopped.all()

    def step(state: DecodeState) -> DecodeState:
        generated, tokens, cache = state
        slots = (prefix_len + lengths + generated.n - 1)[:, None]  # of each row's last token
        positions = slots - prefix_len + 1 if restarts else None
        hidden, cache = model.hidden(tokens[:, None], None, cache, slots, positions)
        return *choose(generated, hidden[:, 0]), cache

    def steps(state: DecodeState) -> DecodeState:
        return jax.lax.fori_loop(0, 1 if on_a_cpu() else GPU_STEPS, lambda _, state: step(state), state)

    ends = jnp.maximum(lengths - 1, 0)[:, None]
    slots = jnp.minimum(own_slots(tokens), ends)  # padding gets the last token's
    positions = positions_of(slots, 0 if restarts else prefix_len)
    hidden, keys_values = model.hidden(tokens, prefix, positions=positions)
    last = jnp.take_along_axis(hidden, ends[:, None], axis=1)[:, 0]
    nothing, no_prompt = jnp.full((n_rows, decode.max_output_len), eos_id), lengths == 0
    generated, first = choose(Generated(jnp.int32(0), nothing, no_prompt, jnp.bool_(True)), last)
    cache = cache_of(keys_values, prefix, decode.max_output_len, cache_dtype(model))
    generated, *_ = jax.lax.while_loop(going_on, steps, (generated, first, cache))
    return generated.ids, generated.finite


def cache_dtype(model: BaseModel) -> DTypeLike:
    """Return the type of a cache: the base model's, except for bfloat16 on a CPU.

    The CPU's compiler would convert a bfloat16 cache to float32 and back for every token. float32 takes twice the
    memory.
    """
    dtype = model.embed.weight.dtype
    return jnp.float32 if dtype == jnp.bfloat16 and on_a_cpu() else dtype
