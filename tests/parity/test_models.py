"""Every row of the README's table of base models against transformers' PyTorch model, prefix and gradients included.

Each model has the row's configuration as its config.json spells it, shrunk in width and depth only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from convert.prefix import to_folded
from jaxprefix import load_model, load_prefix, save_prefix
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.decode import generate_ids
from jaxprefix.inference_config import DecodeConfig
from tests.arrays import normals, random_prefix
from tests.base_folders import make_base_folder, with_config
from tests.tolerances import MODEL
from torch_ref import generate
from torch_ref.config import generate_parser
from torch_ref.models import load_base

NEOX = {"model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
NEOX |= {"rotary_emb_base": 10000, "tie_word_embeddings": False, "max_position_embeddings": 2048}
SEQUENTIAL = NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0}
PARALLEL = NEOX | {"use_parallel_residual": True, "rotary_pct": 0.25}
ABSENT = {key: value for key, value in PARALLEL.items() if key != "use_parallel_residual"}
# What a config of transformers 5 has instead of rotary_pct and rotary_emb_base.
NEW_ROTARY = {"rotary_pct": None, "rotary_emb_base": None}
NEW_ROTARY |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "activation_function": "gelu_new", "n_inner": None, "n_positions": 1024}
GPT2 |= {"n_ctx": 1024, "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "attn_pdrop": 0.1}


def heads(n_head: int, head_dim: int) -> dict:
    width = n_head * head_dim
    return {"num_attention_heads": n_head, "hidden_size": width, "intermediate_size": 2 * width}


def gpt2_heads(n_head: int, head_dim: int) -> dict:
    return {"n_head": n_head, "n_embd": n_head * head_dim}


ROWS = {
    "rinna/japanese-gpt-neox-small": SEQUENTIAL | heads(2, 64) | {"vocab_size": 44416},
    "rinna/japanese-gpt-neox-3.6b": SEQUENTIAL | heads(2, 128) | {"vocab_size": 32000, "torch_dtype": "float16"},
    "rinna/bilingual-gpt-neox-4b": SEQUENTIAL
    | heads(2, 128)
    | {"vocab_size": 65536, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "rinna/bilingual-gpt-neox-4b-8k": SEQUENTIAL
    | heads(2, 128)
    | {"vocab_size": 65536, "max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "cyberagent/open-calm": SEQUENTIAL | heads(2, 64) | {"vocab_size": 52096, "bos_token_id": 0, "eos_token_id": 0},
    "line-corporation/japanese-large-lm-3.6b": SEQUENTIAL
    | heads(2, 96)
    | {"vocab_size": 51200, "tie_word_embeddings": True},
    "stabilityai/stablelm-base-alpha": PARALLEL | heads(2, 64) | {"vocab_size": 50688, "max_position_embeddings": 4096},
    "EleutherAI/pythia": ABSENT | heads(2, 64) | {"vocab_size": 50304},
    "databricks/dolly-v2": PARALLEL | heads(2, 80) | {"vocab_size": 50280},
    "EleutherAI/gpt-neox-20b": PARALLEL
    | heads(2, 96)
    | {"vocab_size": 50432, "hidden_act": "gelu_fast", "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "RedPajama-INCITE-3B": SEQUENTIAL | heads(2, 80) | {"vocab_size": 50432},
    "EleutherAI/polyglot-ko": PARALLEL
    | heads(2, 64)
    | {"vocab_size": 30080, "rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rotary": True},
    "rinna/japanese-gpt2": GPT2 | gpt2_heads(2, 64) | {"vocab_size": 32000},
    "rinna/japanese-gpt-1b": GPT2
    | gpt2_heads(2, 64)
    | {"vocab_size": 44928, "activation_function": "gelu_fast", "n_inner": 512},
    "line-corporation/japanese-large-lm-1.7b": GPT2
    | gpt2_heads(2, 96)
    | {"vocab_size": 51200, "activation_function": "gelu", "n_positions": 2048, "n_ctx": 2048},
    "llm-jp-13b-v1": GPT2
    | gpt2_heads(2, 128)
    | {"vocab_size": 50688, "activation_function": "gelu", "n_positions": 2048, "n_ctx": 2048},
}
# Settings that a config may have, beyond those rows.
SETTINGS = {
    "spelled by transformers 5": PARALLEL | heads(2, 64) | NEW_ROTARY,
    "an epsilon that shows": PARALLEL | heads(2, 16) | {"layer_norm_eps": 0.3},
    "gpt2, an epsilon that shows": GPT2 | gpt2_heads(2, 16) | {"layer_norm_epsilon": 0.3},
    "no attention bias": PARALLEL | heads(2, 64) | {"attention_bias": False},
    "dynamic scaling, beyond its positions": PARALLEL
    | heads(2, 64)
    | {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "linear scaling by transformers 5": SEQUENTIAL
    | heads(2, 64)
    | NEW_ROTARY
    | {"rope_parameters": NEW_ROTARY["rope_parameters"] | {"rope_type": "linear", "factor": 4.0}},
    **{
        act: SEQUENTIAL | heads(2, 64) | {"hidden_act": act}
        for act in ("gelu_new", "gelu_pytorch_tanh", "relu", "silu")
    },
    "gpt2 by layer": GPT2 | gpt2_heads(2, 64) | {"scale_attn_by_inverse_layer_idx": True},
    "gpt2 unscaled": GPT2 | gpt2_heads(2, 16) | {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
    "gpt2 untied": GPT2 | gpt2_heads(2, 64) | {"tie_word_embeddings": False},
}
TOKENS = np.random.default_rng(5).integers(4, 440, (2, 20))


def folder_of(tmp_path, name, **changes):
    """A base model folder of a row; weights as wide as keep the activations' size independent of the width."""
    config = {"vocab_size": 440} | (ROWS | SETTINGS)[name] | changes
    width = config.get("hidden_size") or config["n_embd"]
    return make_base_folder(tmp_path / "base", std=0.2 * (64 / width) ** 0.5, **config)


def torch_model(folder):
    """transformers' model in float64: what is left of a difference is ours."""
    classes = (transformers.GPTNeoXForCausalLM, transformers.GPT2LMHeadModel)
    which = classes["n_embd" in (folder / "config.json").read_text()]
    reference, info = which.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return reference.eval()


def torch_logits(reference, prefix: torch.Tensor | None) -> torch.Tensor:
    """Logits of transformers' model, the prefix handed over as a filled cache."""
    cache = None
    if prefix is not None:
        cache = transformers.DynamicCache()
        for index, layer in enumerate(prefix):
            k, v = layer.permute(0, 2, 1, 3)[:, None].expand(-1, len(TOKENS), -1, -1, -1)
            cache.update(k, v, index)
    return reference(torch.from_numpy(TOKENS), past_key_values=cache).logits


@jax.jit
def logits_of(model, tokens):
    return model(tokens)[0]


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def gradient_and_logits(prefix, model, tokens):
    logits, _ = model(tokens, prefix)
    return jax.nn.logsumexp(logits, axis=-1).mean(), logits


@pytest.mark.parametrize("name", [*ROWS, *SETTINGS])
def test_logits_and_gradients_are_those_of_transformers(tmp_path, name):
    folder = folder_of(tmp_path, name)
    model, reference = load_model(folder), torch_model(folder)
    expected = torch_logits(reference, None).detach().numpy()
    np.testing.assert_allclose(logits_of(model, TOKENS), expected, rtol=0, atol=MODEL)

    prefix = random_prefix(model.config)
    torch_prefix = torch.from_numpy(np.array(prefix)).double().requires_grad_()
    expected = torch_logits(reference, torch_prefix)
    expected.logsumexp(-1).mean().backward()

    gradient, logits = gradient_and_logits(prefix, model, TOKENS)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=MODEL)
    reference_gradient = torch_prefix.grad.numpy()
    np.testing.assert_allclose(gradient, reference_gradient, rtol=0, atol=MODEL * np.abs(reference_gradient).max())


WRONG = {
    "rotary fraction": ("EleutherAI/pythia", {"rotary_fraction": 1.0}),
    "rotary base": ("EleutherAI/pythia", {"rotary_base": 5000.0}),
    "rotary scaling": ("rinna/bilingual-gpt-neox-4b-8k", {"rotary_scaling": "default"}),
    "residual form": ("EleutherAI/pythia", {"parallel_residual": False}),
    "activation": ("EleutherAI/gpt-neox-20b", {"activation": "gelu"}),
    "activation of gpt2": ("rinna/japanese-gpt2", {"activation": "gelu"}),
    "scale by layer": ("rinna/japanese-gpt2", {"scale_by_layer": True}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_setting_is_noticed(tmp_path, fault):
    name, change = WRONG[fault]
    folder = folder_of(tmp_path, name, vocab_size=440)
    model = load_model(folder)
    wrong = with_config(model, **change)
    expected = torch_logits(torch_model(folder), None).detach().numpy()
    assert np.abs(logits_of(wrong, TOKENS) - expected).max() > 3 * MODEL


def test_dynamic_scaling_decodes_as_transformers_does(tmp_path, tokenizer):
    """A prompt of 5 tokens, all that there are positions for; our batch pads it to 16, which must not count."""
    rope = {"max_position_embeddings": 5, "rope_scaling": {"rope_type": "dynamic", "factor": 16.0}}
    folder = folder_of(tmp_path, "dynamic scaling, beyond its positions", **rope)
    prompt = torch.from_numpy(TOKENS[1:2, :5])
    expected = torch_model(folder).generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=439)[0, 5:]
    greedy = DecodeConfig(decode_method="greedy", max_output_len=20)
    (made,) = generate_ids(
        load_model(folder), dataclasses.replace(tokenizer, eos_id=439), prompt.tolist(), decode=greedy
    )
    assert made == expected.tolist()


def test_a_wrong_head_is_noticed(tmp_path):
    folder = folder_of(tmp_path, "line-corporation/japanese-large-lm-3.6b", vocab_size=440)
    model = load_model(folder)
    hidden, _ = model.hidden(jnp.asarray(TOKENS))
    (random,) = normals(model.embed.weight.shape)
    other = random * model.embed.weight[...].std()
    expected = torch_logits(torch_model(folder), None).detach().numpy()
    np.testing.assert_allclose(hidden @ model.head_weight.T, expected, rtol=0, atol=MODEL)
    assert np.abs(hidden @ other.T - expected).max() > 100 * MODEL


@pytest.mark.parametrize(("base", "flag"), [({}, "gpt-neox"), ({"model_type": "gpt2"}, "gpt")])
def test_a_file_of_either_side_generates_the_same_on_both_under_rinna(tmp_path, tokenizer, base, flag):
    """Of GPT-2 at the original's positions, too."""
    folder = make_base_folder(tmp_path / "base", **base)
    model = load_model(folder)
    save_prefix(tmp_path / "adapter", random_prefix(model.config), model.config, tokenizer)
    convert(ConvertConfig(tmp_path / "adapter", ours := tmp_path / "ours.weight"))
    folded = np.array(to_folded(random_prefix(model.config)))
    torch.save(torch.from_numpy(folded).requires_grad_(), theirs := tmp_path / "theirs.best.checkpoint")

    flags = ["--pretrained_model_dir", str(folder), "--model_type", flag, "--decode_method", "greedy"]
    flags = generate_parser().parse_args([*flags, "--max_output_len", "12"])
    reference, prompts = load_base(flags), [[30], [40, 41, 42, 43, 44], [50, 51, 52]]
    decode, made = DecodeConfig("greedy", max_output_len=12, recipe="rinna"), []
    for path in (ours, theirs):
        prefix = generate.load_prefix(path, reference)
        made.append([generate.generate_ids(reference, prompt, prefix, tokenizer.eos_id, flags) for prompt in prompts])
        prefix = load_prefix(path, model.config)
        made.append(list(generate_ids(model, tokenizer, prompts, prefix, decode=decode)))
    assert all(ids == made[0] for ids in made)
