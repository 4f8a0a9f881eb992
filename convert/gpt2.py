"""GPT-2: every weight of a hub folder, and where it lives in `jaxprefix.models.gpt2`.

GPT-2 stores its linear weights [in, out] ("Conv1D"); ours are [out, in]. `c_attn` packs its outputs as
[all q | all k | all v]; in ours, q, k and v are an axis of their own, so that heads can be split over devices.
"""

from convert.table import Rule

OPTIONAL_PREFIX = "transformer."
HEAD = "lm_head.weight"

TABLE: dict[str, Rule] = {
    "transformer.wte.weight": "embed.weight",
    "transformer.wpe.weight": "embed_positions.weight",
    "transformer.h.{layer}.ln_1.weight": "layers.{layer}.attention_norm.weight",
    "transformer.h.{layer}.ln_1.bias": "layers.{layer}.attention_norm.bias",
    "transformer.h.{layer}.attn.c_attn.weight": ("layers.{layer}.attention.qkv.weight", "transpose", "split"),
    "transformer.h.{layer}.attn.c_attn.bias": ("layers.{layer}.attention.qkv.bias", "split"),
    "transformer.h.{layer}.attn.c_proj.weight": ("layers.{layer}.attention.out.weight", "transpose"),
    "transformer.h.{layer}.attn.c_proj.bias": "layers.{layer}.attention.out.bias",
    "transformer.h.{layer}.ln_2.weight": "layers.{layer}.mlp_norm.weight",
    "transformer.h.{layer}.ln_2.bias": "layers.{layer}.mlp_norm.bias",
    "transformer.h.{layer}.mlp.c_fc.weight": ("layers.{layer}.mlp.up.weight", "transpose"),
    "transformer.h.{layer}.mlp.c_fc.bias": "layers.{layer}.mlp.up.bias",
    "transformer.h.{layer}.mlp.c_proj.weight": ("layers.{layer}.mlp.down.weight", "transpose"),
    "transformer.h.{layer}.mlp.c_proj.bias": "layers.{layer}.mlp.down.bias",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
    HEAD: "head.weight",
    # Buffers that old versions of transformers wrote; we compute them.
    "transformer.h.{layer}.attn.bias": None,
    "transformer.h.{layer}.attn.masked_bias": None,
}
