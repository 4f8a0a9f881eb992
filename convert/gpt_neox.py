"""GPT-NeoX: every weight of a hub folder, and where it lives in `jaxprefix.models.gpt_neox`.

Linear weights are [out, in] on both sides, so no rule transposes anything.
`query_key_value` packs its rows per head as [q | k | v], i.e. [N, 3, H].
"""

from convert.table import Rule

OPTIONAL_PREFIX = "gpt_neox."
HEAD = "embed_out.weight"

TABLE: dict[str, Rule] = {
    "gpt_neox.embed_in.weight": "embed.weight",
    "gpt_neox.layers.{layer}.input_layernorm.weight": "layers.{layer}.attention_norm.weight",
    "gpt_neox.layers.{layer}.input_layernorm.bias": "layers.{layer}.attention_norm.bias",
    "gpt_neox.layers.{layer}.attention.query_key_value.weight": "layers.{layer}.attention.qkv.weight",
    "gpt_neox.layers.{layer}.attention.query_key_value.bias": "layers.{layer}.attention.qkv.bias",
    "gpt_neox.layers.{layer}.attention.dense.weight": "layers.{layer}.attention.out.weight",
    "gpt_neox.layers.{layer}.attention.dense.bias": "layers.{layer}.attention.out.bias",
    "gpt_neox.layers.{layer}.post_attention_layernorm.weight": "layers.{layer}.mlp_norm.weight",
    "gpt_neox.layers.{layer}.post_attention_layernorm.bias": "layers.{layer}.mlp_norm.bias",
    "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight": "layers.{layer}.mlp.up.weight",
    "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias": "layers.{layer}.mlp.up.bias",
    "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight": "layers.{layer}.mlp.down.weight",
    "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias": "layers.{layer}.mlp.down.bias",
    "gpt_neox.final_layer_norm.weight": "final_norm.weight",
    "gpt_neox.final_layer_norm.bias": "final_norm.bias",
    HEAD: "head.weight",
    # Buffers that old versions of transformers wrote; we compute them.
    "gpt_neox.layers.{layer}.attention.bias": None,
    "gpt_neox.layers.{layer}.attention.masked_bias": None,
    "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq": None,
}
