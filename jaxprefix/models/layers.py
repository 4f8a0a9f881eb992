"""The layers that base models and the prefix encoder are made of. Legend: `attention.py`."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt16

from jaxprefix.machine.devices import alone_on_a_cpu, on_a_cpu
from jaxprefix.models.config import ModelConfig

Weight = Float[Array, "*out n_in"] | UInt16[Array, "*out n_in"]
"""A weight of a `FrozenLinear`, or its bits; see `scanned_dtype`."""
CosSin = tuple[Float[Array, "rows slots turning"], Float[Array, "rows slots turning"]]

FEW_ROWS = 64
"""Up to this many rows, a CPU computes W xᵀ faster than x Wᵀ, except in bfloat16."""


def unloaded(*shape: int) -> nnx.Param:
    """Return a placeholder for a base model's weight, which has only its shape."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


def drawn(numbers: np.ndarray) -> nnx.Param:
    """Return a weight of the prefix encoder from initial numbers; NumPy converts them, since JAX would compile."""
    return nnx.Param(jax.device_put(numbers.astype(np.float32)))


class Linear(nnx.Module):
    """y = x Wᵀ + b, stored as PyTorch stores it: weight [out, in], bias [out].

    Initialised as `torch.nn.Linear` is: both uniform in ±1/√in.
    """

    def __init__(self, n_in: int, n_out: int, rng: np.random.Generator):
        bound = 1 / math.sqrt(n_in)
        self.weight = drawn(rng.uniform(-bound, bound, (n_out, n_in)))
        self.bias = drawn(rng.uniform(-bound, bound, n_out))

    def __call__(self, x: Float[Array, "*rest n_in"]) -> Float[Array, "*rest n_out"]:
        return matmul(x, self.weight[...]).astype(x.dtype) + self.bias[...]


class FrozenLinear(nnx.Module):
    """A base model's linear layer, stored as `Linear` is, with one or more out axes. Only its input gets a gradient."""

    def __init__(self, n_in: int, *n_out: int, bias: bool = True):
        self.weight = unloaded(*n_out, n_in)
        if bias:
            self.bias = unloaded(*n_out)
        self.has_bias = bias

    def __call__(self, x: Float[Array, "*rest n_in"]) -> Float[Array, "*rest_out"]:
        return self.with_bias(self.without_bias(x))

    def without_bias(self, x: Float[Array, "*rest n_in"]) -> Float[Array, "*rest_out"]:
        """Multiply only."""
        return frozen_matmul(x, self.weight[...])

    def with_bias(self, y: Float[Array, "*rest_out"]) -> Float[Array, "*rest_out"]:
        """Add the bias, if there is one."""
        return y + _numbers(self.bias[...]) if self.has_bias else y


class Embedding(nnx.Module):
    """A table of vectors [rows, width]; with `rng`, initialised as `torch.nn.Embedding` is: N(0, 1)."""

    def __init__(self, n_rows: int, width: int, rng: np.random.Generator | None = None):
        shape = (n_rows, width)
        self.weight = unloaded(*shape) if rng is None else drawn(rng.standard_normal(shape))

    def __call__(self, ids: Int[Array, "*rest"]) -> Float[Array, "*rest width"]:
        weight = self.weight[...]
        if on_a_cpu():  # its compiler would make a float32 copy of a bfloat16 table before a loop
            weight, ids = jax.lax.optimization_barrier((weight, ids))
        return weight[ids]


class LayerNorm(nnx.Module):
    """Layer norm of a base model; see `layer_norm`."""

    def __init__(self, width: int, eps: float):
        self.weight = unloaded(width)
        self.bias = unloaded(width)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rest D"]) -> Float[Array, "*rest D"]:
        return layer_norm(x, self.weight[...], self.bias[...], self.eps)


class MLP(nnx.Module):
    """Two linear layers with an activation between them. The enclosing layer applies the second, `down`."""

    def __init__(self, config: ModelConfig):
        self.up = FrozenLinear(config.n_embd, config.n_inner)
        self.down = FrozenLinear(config.n_inner, config.n_embd)
        self.activation = config.activation

    def activated(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Return the activations between the layers; the backward pass keeps only their input."""
        return jax.checkpoint(activate, static_argnums=1)(self.up(x), self.activation)


def activate(x: Float[Array, "*rest"], activation: str) -> Float[Array, "*rest"]:
    """Apply an activation by transformers' name, in float32; three of the names are GELU's tanh form."""
    wide = x.astype(jnp.float32)
    match activation:
        case "gelu":  # by erf: jax.nn.gelu uses erfc, which takes longer on a CPU
            wide = 0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
        case "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh":
            wide = jax.nn.gelu(wide, approximate=True)
        case "relu":
            wide = jax.nn.relu(wide)
        case "silu":
            wide = jax.nn.silu(wide)
        case _:
            raise ValueError(f"unknown activation {activation}")
    return wide.astype(x.dtype)


def einsum(
    subscripts: str, left: Float[Array, "*left"], right: Float[Array, "*right"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*out"]:
    """Compute an einsum of two arrays, accumulated in float32, in `dtype`; GPUs must not round float32 to TF32."""
    precision = jax.lax.Precision.HIGHEST if jnp.float32 in (left.dtype, right.dtype) else None
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=dtype)


def vecdot(left: Float[Array, "*rest n"], right: Float[Array, "*rest n"]) -> Float[Array, "*rest"]:
    """Compute inner products along the last axis, in float32; (left * right).sum(-1) takes a CPU 20 times as long."""
    return einsum("...n,...n->...", left, right)


def matmul(x: Float[Array, "*rest n_in"], weight: Float[Array, "*out n_in"]) -> Float[Array, "*rest_out"]:
    """Compute x Wᵀ, accumulated in float32. Result axes: x's without the last, then the weight's without the last."""
    if not alone_on_a_cpu():
        out = _out(weight)
        return einsum(f"...i,{out}i->...{out}", x, weight)
    n_rows, flat = math.prod(x.shape[:-1]), weight.reshape(-1, weight.shape[-1])  # with more axes, decoding copies it
    if n_rows > FEW_ROWS:
        product = einsum("...i,oi->...o", x, flat)
    else:
        product = _few_rows_matmul(x.reshape(n_rows, x.shape[-1]), flat)
    return product.reshape(*x.shape[:-1], *weight.shape[:-1])


def _out(weight: Float[Array, "*out n_in"]) -> str:
    """Return an einsum letter for each axis of a weight but the last."""
    return "opq"[: weight.ndim - 1]


def _few_rows_matmul(x: Float[Array, "rows n_in"], weight: Float[Array, "n_out n_in"]) -> Float[Array, "rows n_out"]:
    """Compute x Wᵀ for few rows, in the form that is fastest on a CPU.

    XLA's CPU matmul repacks its right operand on every call, which for few rows costs more than the product. So x goes
    on the right, and a barrier keeps the compiler from swapping them back. bfloat16 x Wᵀ is fast from two rows on, so a
    single row is doubled.
    """
    if x.dtype != jnp.bfloat16:
        return jax.lax.optimization_barrier(einsum("oi,ri->or", weight, x)).T
    rows = x if len(x) != 1 else jnp.broadcast_to(x, (2, x.shape[1]))
    return einsum("ri,oi->ro", rows, weight)[: len(x)]


def _unfused(x: Float[Array, "*rest"]) -> Float[Array, "*rest"]:
    """Return x rounded to its own type, which changes nothing, but which XLA's CPU compiler does not fuse.

    Elementwise work that is fused into a product expands its constants (GELU's, say) to the product's shape; thousands
    of rows then take a fifth longer.
    """
    own = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, own.nexp, own.nmant)


def scanned_dtype(array: Array | jax.ShapeDtypeStruct) -> np.dtype:
    """Return the type in which a loop over layers takes or keeps this array of each layer: on a CPU, bfloat16's bits.

    XLA's CPU compiler does not slice bfloat16: it would convert the weights of all layers to float32, and keep those.
    Vectors, such as biases, keep their type; all other arrays of a layer are weights of `FrozenLinear`, which turns the
    bits back into numbers.
    """
    as_bits = on_a_cpu() and array.dtype == jnp.bfloat16 and array.ndim > 1
    return np.dtype(jnp.uint16 if as_bits else array.dtype)


def _numbers(array: Weight) -> Float[Array, "*out n_in"]:
    """Return a weight's numbers: uint16 holds bfloat16's bits, see `scanned_dtype`."""
    return array.view(jnp.bfloat16) if array.dtype == jnp.uint16 else array


@jax.custom_vjp
def frozen_matmul(x: Float[Array, "*rest n_in"], weight: Weight) -> Float[Array, "*rest_out"]:
    """Compute x Wᵀ in x's type, accumulated in float32, without a gradient with respect to the weight.

    Its backward pass multiplies in that type, too: by default, the float32 accumulation would make the incoming
    gradient float32, and a half-precision product would run at float32's speed or worse.
    """
    weight = _numbers(weight)
    if on_a_cpu():
        return _unfused(matmul(x, weight).astype(x.dtype))
    out = _out(weight)
    return einsum(f"...i,{out}i->...{out}", x, weight, x.dtype)  # devices that share a weight add up in this type


def _frozen_forward(x: Array, weight: Weight) -> tuple[Array, Array]:
    return frozen_matmul(x, weight), weight


def _frozen_backward(weight: Weight, gradient: Array) -> tuple[Array, None]:
    weight = _numbers(weight)
    out = _out(weight)
    dtype = jnp.float32 if on_a_cpu() else gradient.dtype
    towards_x = einsum(f"...{out},{out}i->...i", gradient, weight, dtype).astype(gradient.dtype)
    return _unfused(towards_x) if on_a_cpu() else towards_x, None


frozen_matmul.defvjp(_frozen_forward, _frozen_backward)


def after(gradient: Float[Array, "*rest"], x: Float[Array, "*rest"]) -> Float[Array, "*rest"]:
    """Return x, available only once `gradient` is: for values that the backward pass recomputes.

    A barrier expresses this, but XLA's CPU compiler drops barriers and would compute such values early and keep them.
    So on a CPU, x is made to depend on the gradient; where the gradient is not finite, the result is not either.
    """
    if on_a_cpu():
        return x + 0 * gradient.astype(x.dtype)
    return jax.lax.optimization_barrier((gradient, x))[1]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*rest D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*rest D"]:
    """Normalise the last axis (arXiv:1607.06450), in float32.

    Only x gets a gradient, for which the backward pass keeps x and recomputes the rest.
    """
    normed, _ = _normalised(x, eps)
    return (normed * weight + bias).astype(x.dtype)


def _normalised(x: Float[Array, "*rest D"], eps: float) -> tuple[Float[Array, "*rest D"], Float[Array, "*rest 1"]]:
    """Return x with mean 0 and variance 1, and the factor that made it so."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return centred * factor, factor


def _layer_norm_forward(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return layer_norm(x, weight, bias, eps), (x, weight)


def _layer_norm_backward(eps: float, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    x, weight = residuals
    normed, factor = _normalised(after(gradient, x), eps)
    towards_normed = gradient.astype(jnp.float32) * weight
    along = vecdot(normed, towards_normed)[..., None] / x.shape[-1]
    towards_x = (towards_normed - towards_normed.mean(axis=-1, keepdims=True) - normed * along) * factor
    return towards_x.astype(x.dtype), None, None


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def rotary_cos_sin(positions: Int[Array, "rows slots"], config: ModelConfig) -> CosSin:
    """Return cosines and signed sines of the rotary angles at every position (RoFormer, arXiv:2104.09864).

    Linear scaling divides positions by its factor. Dynamic scaling ("NTK") raises the base of each row whose last
    position is beyond those that the model was trained on, as transformers does for a single row.
    """
    dim, frequency_factor = config.rotary_dim, 1.0
    base: float | Float[Array, "rows 1 1"] = config.rotary_base
    if config.rotary_scaling == "linear":
        frequency_factor = 1 / config.rotary_factor
    elif config.rotary_scaling == "dynamic":
        n_positions = jnp.maximum(positions.max(axis=-1)[:, None, None] + 1, config.n_positions)
        stretch = config.rotary_factor * n_positions / config.n_positions - (config.rotary_factor - 1)
        base *= stretch ** (dim / (dim - 2))
    frequencies = frequency_factor * base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


@jax.custom_vjp
def rotate(x: Float[Array, "rows slots N H"], cos_sin: CosSin) -> Float[Array, "rows slots N H"]:
    """Turn the leading dimensions of each head, pairing the first half of them with the second (GPT-NeoX's layout)."""
    cos, sin = (part[:, :, None] for part in cos_sin)
    turning, rest = jnp.split(x, [cos.shape[-1]], axis=-1)
    turned = turning * cos + jnp.roll(turning, cos.shape[-1] // 2, axis=-1) * sin
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)


def _rotate_forward(x: Array, cos_sin: CosSin) -> tuple[Array, CosSin]:
    return rotate(x, cos_sin), cos_sin


def _rotate_backward(cos_sin: CosSin, gradient: Array) -> tuple[Array, None]:
    """Rotate back; in half precision, the gradient that JAX derives takes a CPU four times as long."""
    cos, sin = cos_sin
    return rotate(gradient, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)
