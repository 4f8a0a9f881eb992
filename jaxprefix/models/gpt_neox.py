"""GPT-NeoX (arXiv:2204.06745) with a prefix of keys and values as an explicit input. Legend: `attention.py`."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprefix.config import Compute
from jaxprefix.data.batches import Packing
from jaxprefix.models.attention import (
    Cache,
    LayerCache,
    LayerPrefix,
    Prefix,
    attend,
    check_inputs,
    heads_first,
    own_slots,
    positions_of,
    write_cache,
)
from jaxprefix.models.config import ModelConfig
from jaxprefix.models.layers import MLP, CosSin, Embedding, FrozenLinear, LayerNorm, matmul, rotary_cos_sin, rotate
from jaxprefix.models.packing import on_texts
from jaxprefix.models.stack import run_layers


class Attention(nnx.Module):
    """Multi-head attention with rotary positions. The enclosing layer applies `out`."""

    def __init__(self, config: ModelConfig, compute: Compute):
        # [N·3·H, D]: q, k and v of each head in turn
        self.qkv = FrozenLinear(config.n_embd, 3 * config.n_embd, bias=config.attention_bias)
        self.out = FrozenLinear(config.n_embd, config.n_embd, bias=config.attention_bias)
        self.n_head = config.n_head
        self.method = compute.attention

    def heads(
        self,
        x: Float[Array, "B T D"],
        prefix: LayerPrefix | None,
        cache: LayerCache | None,
        cos_sin: CosSin,
        slots: Int[Array, "B T"] | None,
        packing: Packing | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Return the heads' outputs, concatenated, and the keys and values, written into the cache if there is one."""
        qkv = self.qkv(x)
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], self.n_head, -1), 3, axis=-1)  # [B, T, N, H] each
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        k, v = write_cache(cache, heads_first(k), heads_first(v), slots)
        attended = attend(q, k, v, prefix, slots, None, self.method, packing)
        return attended.reshape(x.shape), (k, v)


class Layer(nnx.Module):
    """Attention and MLP, in parallel on the same input or one after the other."""

    def __init__(self, config: ModelConfig, compute: Compute):
        self.attention_norm = LayerNorm(config.n_embd, config.layer_norm_eps)
        self.attention = Attention(config, compute)
        self.mlp_norm = LayerNorm(config.n_embd, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.parallel_residual = config.parallel_residual

    def __call__(
        self,
        x: Float[Array, "B T D"],
        prefix: LayerPrefix | None,
        cache: LayerCache | None,
        cos_sin: CosSin,
        slots: Int[Array, "B T"] | None,
        packing: Packing | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        out, down = self.attention.out, self.mlp.down
        heads, written = self.attention.heads(self.attention_norm(x), prefix, cache, cos_sin, slots, packing)
        if self.parallel_residual:  # biases come last: devices that share the weights add up one array for both
            both = out.without_bias(heads) + down.without_bias(self.mlp.activated(self.mlp_norm(x)))
            return x + down.with_bias(out.with_bias(both)), written
        x = x + out(heads)
        return x + down(self.mlp.activated(self.mlp_norm(x))), written


class GPTNeoX(nnx.Module):
    """A GPT-NeoX language model. Its parameters are data: nothing in here trains or changes them.

    It is made with shapes in place of weights; `load_model` fills them in.
    """

    def __init__(self, config: ModelConfig, compute: Compute = Compute()):
        self.config = config
        self.compute = compute
        self.embed = Embedding(config.vocab_size, config.n_embd)
        self.layers = nnx.List([Layer(config, compute) for _ in range(config.n_layer)])
        self.final_norm = LayerNorm(config.n_embd, config.layer_norm_eps)
        if not config.tied_head:
            self.head = Embedding(config.vocab_size, config.n_embd)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        slots: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Return float32 logits of the next token, and every layer's keys (after rotary) and values [B, N, S, H].

        `slots` is each token's index in its row, by default 0 … T−1; `positions` are by default P + slots. Rows are
        padded on the right. `packing`, without slots or a cache, says where the texts lie in rows that hold several:
        texts do not see each other, and positions restart at P.

        Keys and values returned without a cache have S = T and no room for more; `cache_of` makes a cache of them. With
        a cache, which needs `slots`, keys and values are written at these slots, and tokens see what the cache holds up
        to their own. If the prefix is in the cache, slots count from the prefix's first position, and `prefix` must be
        None, or it would be attended to twice.

        Raises InputError for a prefix or tokens of another shape or type.
        """
        hidden, written = self.hidden(tokens, prefix, cache, slots, positions, packing)
        return self.logits(hidden), written

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        slots: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the head's input, which is the last layer's output after the final norm, and the keys and values."""
        check_inputs(tokens, cache, slots)
        prefix_len = self.config.prefix_length(prefix)
        if positions is None:
            positions = positions_of(on_texts(own_slots, packing, tokens) if slots is None else slots, prefix_len)
        cos_sin = on_texts(partial(rotary_cos_sin, config=self.config), packing, positions)
        shared = (cos_sin, slots, packing)
        x, written = run_layers(self.layers, self.embed(tokens), prefix, cache, shared, self.compute.remat == "block")
        return self.final_norm(x), written

    def logits(self, hidden: Float[Array, "*rest D"]) -> Float[Array, "*rest V"]:
        """Return the float32 logits of hidden states."""
        return matmul(hidden, self.head_weight)

    @property
    def head_weight(self) -> Float[Array, "V D"]:
        """The head's weight, which is the embedding's if they are tied."""
        return (self.embed if self.config.tied_head else self.head).weight[...]
