"""Attention of tokens over a prefix and over themselves: the one place where prefix meets tokens.

Legend, used in types, einsum strings and comments of the whole package:
    B batch · T tokens · P prefix length · S keys of tokens (T, or the cache length) · L layers
    N heads · H head dim · D embed · F mlp · V vocab

A prefix is `Float[Array, "L 2 P N H"]`: for every layer the P keys (index 0) and values (index 1) that
stand in front of the tokens. It has no batch axis; attention puts it in front of every row.
Attention takes its keys as they are. Tokens sit at positions P, P+1, …, see `positions_of`.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from convert.errors import InputError
from jaxprefix.config import AttentionMethod
from jaxprefix.data.batches import Packing
from jaxprefix.machine.devices import FIRST_WITH_BFLOAT16, alone_on_a_cpu, cuda_generation, own_device
from jaxprefix.models.blocked import attend_in_blocks
from jaxprefix.models.layers import einsum, vecdot
from jaxprefix.models.packing import on_texts

Prefix = Float[Array, "L 2 P N H"]
LayerPrefix = Float[Array, "2 P N H"]
LayerCache = tuple[Float[Array, "rows N S H"], Float[Array, "rows N S H"]]
Cache = tuple[LayerCache, ...]

LONG_ROW = 512
"""Rows of at least this many tokens are computed by cuDNN or in blocks; the scores of shorter ones fit into memory."""
CUDNN_MULTIPLE = 128
"""cuDNN's tile: rows are padded to a multiple of this many slots, which JAX does not require."""


def positions_of(slots: Int[Array, "B T"], prefix_len: int) -> Int[Array, "B T"]:
    """Turn each token's index in its text into its position after the prefix."""
    return slots + prefix_len


def own_slots(rows: Shaped[Array, "B T *rest"]) -> Int[Array, "B T"]:
    """Number each row's tokens from 0."""
    return jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape[:2])


def cache_of(
    keys_values: tuple[tuple[Float[Array, "rows N T H"], ...], ...],
    prefix: Prefix | None,
    n_free: int,
    dtype: DTypeLike,
) -> Cache:
    """Lay out a cache: the prefix, every row's keys and values, and room for n_free more tokens.

    Its slots count from the prefix's first position, and attention over it takes no separate prefix.
    """

    def laid_out(x: Float[Array, "B N T H"], front: Float[Array, "P N H"] | None) -> Float[Array, "B N S H"]:
        x = x if front is None else _behind(front, x)
        return jnp.pad(x.astype(dtype), ((0, 0), (0, 0), (0, n_free), (0, 0)))

    fronts = [(None, None)] * len(keys_values) if prefix is None else prefix
    return tuple(
        (laid_out(k, front[0]), laid_out(v, front[1])) for (k, v), front in zip(keys_values, fronts, strict=True)
    )


def heads_first(x: Float[Array, "*rest T N H"]) -> Float[Array, "*rest N T H"]:
    """Swap the axes of tokens and heads: attention multiplies in the order N, T. Its own inverse."""
    return jnp.swapaxes(x, -3, -2)


def write_cache(
    cache: LayerCache | None, k: Float[Array, "B N T H"], v: Float[Array, "B N T H"], slots: Int[Array, "B T"] | None
) -> LayerCache:
    """Write new keys and values into a cache at their rows' slots; without a cache, return them.

    JAX drops writes beyond the cache's end.
    """
    if cache is None:
        return k, v
    assert slots is not None, "see check_inputs"
    if alone_on_a_cpu():  # its compiler writes one row in place only if heads are indexed, too
        places = jnp.arange(len(k))[:, None, None], jnp.arange(k.shape[1])[:, None], slots[:, None]
        return cache[0].at[places].set(k), cache[1].at[places].set(v)
    put = jax.vmap(lambda cached, new, slots: cached.at[:, slots].set(new))  # heads stay on their devices
    return put(cache[0], k, slots), put(cache[1], v, slots)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B N S H"],
    v: Float[Array, "B N S H"],
    prefix: LayerPrefix | None,
    slots: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    method: AttentionMethod = "auto",
    packing: Packing | None = None,
) -> Float[Array, "B T N H"]:
    """Compute softmax attention over the whole prefix and over the keys at slots up to the query's own.

    Slots (by default 0 … T−1) after the query's own (later tokens, padding on the right, unused cache) are
    invisible. Scores, multiplied by `scale` (a number; by default 1/√H), and softmax are float32 whatever the
    inputs are; the result has q's type, k and v may have another. With `packing`, each text is a row of its own.
    `method` says how whole rows are computed; "dense" stands for both forms other than cuDNN's, chosen by row length.
    """
    if packing is not None:

        def attend_texts(q: Array, k: Array, v: Array) -> Array:
            return attend(q, heads_first(k), heads_first(v), prefix, None, scale, method)

        return on_texts(attend_texts, packing, q, heads_first(k), heads_first(v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    whole_rows = slots is None and q.shape[1] == k.shape[2]
    if whole_rows and (method == "cudnn" or (method == "auto" and _cudnn_pays(q))):
        return square_causal(q, heads_first(k), heads_first(v), prefix, scale, "cudnn")
    n_prefix = 0
    if prefix is not None:  # a copy costs a CPU less than separate scores, weights and sums for the prefix
        n_prefix = prefix.shape[1]
        k, v = (_behind(front, x) for front, x in zip(prefix, (k, v), strict=True))
    if whole_rows and q.shape[1] >= LONG_ROW:
        attended = attend_in_blocks(heads_first(q), k, v, scale)
    else:
        last = (own_slots(q) if slots is None else slots) + n_prefix
        visible = jnp.arange(k.shape[2]) <= last[:, None, :, None]
        attended = _masked(heads_first(q), k, v, visible, scale)
    return heads_first(attended.astype(q.dtype))


def _cudnn_pays(q: Float[Array, "B T N H"]) -> bool:
    """Tell whether cuDNN's flash attention runs here and is worth its dummy queries."""
    in_half = q.dtype in (jnp.bfloat16, jnp.float16)
    return in_half and q.shape[1] >= LONG_ROW and cudnn_takes(q.shape[3])


def cudnn_takes(head_dim: int) -> bool:
    """Tell whether cuDNN's flash attention runs on this machine's GPU (Ampere or later) with heads of this width."""
    generation = cuda_generation() or 0
    return generation >= FIRST_WITH_BFLOAT16 and head_dim % 8 == 0 and head_dim <= (256 if generation >= 9 else 128)


def check_attention(method: AttentionMethod, head_dim: int) -> None:
    """Raise InputError for a method that cannot run here."""
    if method == "cudnn" and not cudnn_takes(head_dim):
        device = own_device().device_kind
        raise InputError(
            f"--attention cudnn needs an NVIDIA GPU, Ampere or later, and a head size that is a multiple of 8, at "
            f"most 128 (256 from Hopper on); found {device} and head size {head_dim}"
        )


def check_inputs(tokens: Any, cache: Cache | None, slots: Any) -> None:
    """Raise InputError for tokens that are not an integer array [rows, tokens], and for a cache without slots."""
    is_array = isinstance(tokens, np.ndarray | jax.Array)
    if not is_array or tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        found = f"{tokens.dtype} {list(tokens.shape)}" if is_array else type(tokens).__name__
        raise InputError(f"tokens must be an integer array [rows, tokens], neither of them 0; found {found}")
    if cache is not None and slots is None:
        raise InputError("a cache needs the slots that the tokens' keys and values are written at")


def square_causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    prefix: LayerPrefix | None,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B T N H"]:
    """Compute attention of whole rows as a square causal problem, the only kind that flash kernels are fast at.

    P dummy queries in front of the tokens' own put the causal diagonal in its place (with fewer queries than keys, it
    would be aligned at the top left), and zeros fill the end up to a multiple of CUDNN_MULTIPLE slots; both are cut
    off afterwards. The result is exact, gradients included.
    """
    _, n_tokens, *heads = q.shape
    n_prefix = 0 if prefix is None else prefix.shape[1]
    n_behind = -(n_prefix + n_tokens) % CUDNN_MULTIPLE

    def laid_out(x: Float[Array, "B T N H"], front: Float[Array, "P N H"]) -> Float[Array, "B padded N H"]:
        return jnp.pad(heads_first(_behind(front, heads_first(x))), ((0, 0), (0, n_behind), (0, 0), (0, 0)))

    dummies = jnp.zeros((n_prefix, *heads))
    keys, values = (dummies, dummies) if prefix is None else prefix
    attended = jax.nn.dot_product_attention(
        laid_out(q, dummies),
        laid_out(k, keys),
        laid_out(v, values),
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )
    return attended[:, n_prefix : n_prefix + n_tokens]


def _behind(front: Float[Array, "P N H"], x: Float[Array, "B N S H"]) -> Float[Array, "B N P+S H"]:
    """Put a prefix's keys or values, in the rows' type, in front of every row's."""
    rows = jnp.broadcast_to(heads_first(front), (len(x), x.shape[1], len(front), x.shape[3]))
    # Cast after broadcasting, so that the backward pass sums over the rows in the prefix's own float32.
    return jnp.concatenate([rows.astype(x.dtype), x], axis=2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _masked(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N keys H"],
    v: Float[Array, "B N keys H"],
    visible: Bool[Array, "#B 1 T keys"],
    scale: float,
) -> Float[Array, "B N T H"]:
    """Compute attention over the visible keys, with all scores in memory.

    The backward pass keeps one T × keys array, the weights, in v's type; it also multiplies in that type, as that of
    `frozen_matmul` does. All operands are head-major [B, N, T, H]: other layouts cost a CPU up to five times as much.
    """
    return _masked_forward(q, k, v, visible, scale)[0]


def _masked_forward(
    q: Array, k: Array, v: Array, visible: Array, scale: float
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    scores = einsum("bnth,bnsh->bnts", q, k) * scale
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return einsum("bnts,bnsh->bnth", weights, v).astype(v.dtype), (q, k, v, weights)


def _masked_backward(
    scale: float, residuals: tuple[Array, Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, weights = residuals
    towards_weights, wide = einsum("bnth,bnsh->bnts", gradient, v), weights.astype(jnp.float32)
    # Rounded weights do not sum to 1: without the division, the values' mean would leak into the gradients of q and k.
    along = vecdot(wide, towards_weights) / wide.sum(axis=-1)
    towards_scores = (wide * (towards_weights - along[..., None])).astype(q.dtype)
    towards_q = einsum("bnts,bnsh->bnth", towards_scores, k) * scale
    towards_k = einsum("bnts,bnth->bnsh", towards_scores, q) * scale
    towards_v = einsum("bnts,bnth->bnsh", weights, gradient)
    return towards_q.astype(q.dtype), towards_k.astype(k.dtype), towards_v.astype(v.dtype), None


_masked.defvjp(_masked_forward, _masked_backward)
