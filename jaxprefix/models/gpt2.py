"""GPT-2 (Radford et al., 2019) with a prefix of keys and values as an explicit input. Legend: `attention.py`."""

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
from jaxprefix.models.layers import MLP, Embedding, FrozenLinear, LayerNorm, matmul
from jaxprefix.models.packing import on_texts
from jaxprefix.models.stack import run_layers


class Attention(nnx.Module):
    """Multi-head attention, which does not use positions. The enclosing layer applies `out`."""

    def __init__(self, config: ModelConfig, compute: Compute, layer: int):
        self.qkv = FrozenLinear(config.n_embd, 3, config.n_embd)  # [3, N·H, D]: all q, all k, all v
        self.out = FrozenLinear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.method = compute.attention
        self.scale = config.head_dim**-0.5 if config.scale_attention else 1.0
        if config.scale_by_layer:
            self.scale /= layer + 1

    def heads(
        self,
        x: Float[Array, "B T D"],
        prefix: LayerPrefix | None,
        cache: LayerCache | None,
        slots: Int[Array, "B T"] | None,
        packing: Packing | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Return the heads' outputs, concatenated, and the keys and values, written into the cache if there is one."""
        qkv = self.qkv(x)  # [B, T, 3, N·H]
        q, k, v = (qkv[:, :, i].reshape(*qkv.shape[:2], self.n_head, -1) for i in range(3))
        k, v = write_cache(cache, heads_first(k), heads_first(v), slots)
        attended = attend(q, k, v, prefix, slots, self.scale, self.method, packing)
        return attended.reshape(x.shape), (k, v)


class Layer(nnx.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, compute: Compute, layer: int):
        self.attention_norm = LayerNorm(config.n_embd, config.layer_norm_eps)
        self.attention = Attention(config, compute, layer)
        self.mlp_norm = LayerNorm(config.n_embd, config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        prefix: LayerPrefix | None,
        cache: LayerCache | None,
        slots: Int[Array, "B T"] | None,
        packing: Packing | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        heads, written = self.attention.heads(self.attention_norm(x), prefix, cache, slots, packing)
        x = x + self.attention.out(heads)
        return x + self.mlp.down(self.mlp.activated(self.mlp_norm(x))), written


class GPT2(nnx.Module):
    """A GPT-2 language model. Its parameters are data: nothing in here trains or changes them.

    It is made with shapes in place of weights; `load_model` fills them in.
    """

    def __init__(self, config: ModelConfig, compute: Compute = Compute()):
        self.config = config
        self.compute = compute
        self.embed = Embedding(config.vocab_size, config.n_embd)
        self.embed_positions = Embedding(config.n_positions, config.n_embd)
        self.layers = nnx.List([Layer(config, compute, layer) for layer in range(config.n_layer)])
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
        """Return float32 logits of the next token, and the keys and values [B, N, S, H] of every layer.

        The arguments are those of `GPTNeoX`.
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
        x = self.embed(tokens) + self.embed_positions(positions)
        x, written = run_layers(self.layers, x, prefix, cache, (slots, packing), self.compute.remat == "block")
        return self.final_norm(x), written

    def logits(self, hidden: Float[Array, "*rest D"]) -> Float[Array, "*rest V"]:
        """Return the float32 logits of hidden states."""
        return matmul(hidden, self.head_weight)

    @property
    def head_weight(self) -> Float[Array, "V D"]:
        """The head's weight, which is the embedding's if they are tied."""
        return (self.embed if self.config.tied_head else self.head).weight[...]
