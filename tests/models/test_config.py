import json

import pytest
import transformers

from convert.errors import InputError
from jaxprefix.models.config import read_model_config
from tests.base_folders import TINY, TINY_GPT2

OLD = {"rotary_pct": 0.5, "rotary_emb_base": 500}
NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
GPT2 = {key: value for key, value in TINY_GPT2.items() if key != "n_inner"}
BARE = {key: value for key, value in TINY.items() if not key.startswith("rotary")}
LARGEST = {
    "num_hidden_layers": 2**7,
    "num_attention_heads": 2**12,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**24,
}


def read(folder, config):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return read_model_config(folder, name="base")


def test_old_and_new_spellings_agree(tmp_path):
    assert read(tmp_path, BARE | OLD) == read(tmp_path, BARE | NEW) == read(tmp_path, BARE | OLD | NEW)
    assert read(tmp_path, BARE | OLD) == read(tmp_path, BARE | {"rope_scaling": NEW["rope_parameters"]})


def test_gpt2s_sizes_have_two_spellings(tmp_path):
    spellings = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
    spellings |= {"n_positions": "max_position_embeddings"}
    assert read(tmp_path, {spellings.get(key, key): value for key, value in GPT2.items()}) == read(tmp_path, GPT2)


def test_absent_keys_are_transformers_defaults(tmp_path):
    bare = {key: value for key, value in BARE.items() if key != "use_parallel_residual"}
    config = read(tmp_path, bare)
    assert (config.rotary_fraction, config.rotary_base, config.parallel_residual) == (0.25, 10000.0, True)
    assert (config.head_dim, config.rotary_dim) == (16, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 4}},
            "contradiction: rope_scaling.factor = 2, rope_parameters.factor = 4",
        ),
        ({"rotary_pct": 0.25} | NEW, "contradiction: rotary_pct = 0.25, rope_parameters.partial_rotary_factor = 0.5"),
        ({"model_type": "llama"}, "model_type is 'llama'; supported: 'gpt_neox', 'gpt2'"),
        ({"model_type": "gpt_neox_japanese"}, "model_type is 'gpt_neox_japanese'"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not supported, only gelu, "),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type 'yarn' is not supported, only default, linear"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor must be a positive float, found 0.0"),
        (NEW | {"rope_scaling": {"type": "linear"}}, "rope_parameters.rope_type = default, rope_scaling.type = linear"),
        (NEW | {"rope_scaling": {"rope_theta": 500.0}}, "contradiction: rope_scaling and rope_parameters differ"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type 'llama3' is not supported, only "),
        ({"use_parallel_residual": 1}, "use_parallel_residual must be true or false, found 1"),
        ({"use_parallel_residual": None}, "use_parallel_residual must be true or false, found null"),
        ({"attention_bias": None}, "attention_bias must be true or false, found null"),
        (GPT2 | {"scale_attn_weights": None}, "scale_attn_weights must be true or false, found null"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, found 'linear'"),
        ({"rope_parameters": [NEW]}, "rope_parameters must be an object, found \\[{"),
        ({"head_dim": 32}, "head_dim 32 is not width 64 divided by 4 heads"),
        ({"rotary_pct": float("nan")}, "rotary_pct must be a positive float, found nan"),
        ({"rotary_pct": 0.2}, "3 of 16 dimensions rotate, which must be an even number"),
        ({"model_type": "gpt2", "num_hidden_layers": None}, "n_layer is missing"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        (GPT2 | {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu' is not supported"),
        (GPT2 | {"is_causal": False}, "is_causal False is not supported"),
        ({"is_causal": False}, "is_causal False is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive int, found '64'"),
        ({"num_attention_heads": 5}, "width 64 is not divisible by 5 heads"),
        ({"vocab_size": -1}, "vocab_size must be a positive int, found -1"),
        ({"vocab_size": 2**40}, "vocab_size 1099511627776 is more than 16,777,216, the largest supported"),
        ({"rotary_pct": 1.5}, "rotary_pct 1.5 is more than 1"),
        ({"rotary_emb_base": 10**400}, "rotary_emb_base must be a positive float, found 1000"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e-320}}, "rotary scaling factor 1e-320 is below 1"),
        (
            {"rotary_pct": 0.125, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "dynamic rotary scaling needs at least 4 dimensions that rotate, found 2",
        ),
        ({"model_type": ["gpt2"]}, "model_type is \\['gpt2'\\]; supported"),
        ({"model_type": {}}, "model_type is {}; supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, BARE | changes)
    problems = str(error.value).splitlines()
    assert len({*problems}) == len(problems)


def problems_of(folder, config):
    try:
        read(folder, config)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("key", "largest"), LARGEST.items())
def test_no_size_is_larger_than_any_models(tmp_path, key, largest):
    """Or a damaged config.json would cost minutes and gigabytes before it is refused."""
    assert "the largest supported" not in problems_of(tmp_path, BARE | {key: largest})
    told = f"{key} {largest + 1} is more than {largest:,}, the largest supported"
    assert told in problems_of(tmp_path, BARE | {key: largest + 1})


def test_no_positions_are_scaled_further_than_any_models(tmp_path):
    largest, larger = ({"rope_scaling": {"type": "linear", "factor": factor}} for factor in (1024, 1025))
    assert read(tmp_path, BARE | largest).rotary_factor == 1024
    assert "factor 1025.0 is more than 1,024, the largest supported" in problems_of(tmp_path, BARE | larger)


def test_no_scaling_has_several_spellings(tmp_path):
    assert read(tmp_path, BARE | {"rope_scaling": False}) == read(tmp_path, BARE | {"rope_scaling": None})


def test_the_same_base_elsewhere_needs_no_other_programs(tmp_path):
    """A model's configuration is a part of what JAX compiles for."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    here, there = read_model_config(tmp_path, "here"), read_model_config(tmp_path, "there", revision="v1")
    assert (here.name, there.name) == ("here", "there")
    assert (here, hash(here)) == (there, hash(there))


def test_null_inner_width_is_four_times_the_residual(tmp_path):
    assert read(tmp_path, GPT2).n_inner == read(tmp_path, GPT2 | {"n_inner": None}).n_inner == 256
    assert read(tmp_path, GPT2 | {"n_inner": 100, "intermediate_size": 200}).n_inner == 100
    assert read(tmp_path, GPT2 | {"intermediate_size": 200}).n_inner == 256, "another architecture's name"


def test_model_type_must_agree_if_it_is_given(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert read_model_config(tmp_path, model_type="gpt-neox").model_type == "gpt_neox"
    with pytest.raises(InputError, match="model_type is 'gpt_neox', which contradicts --model_type gpt"):
        read_model_config(tmp_path, model_type="gpt")


def test_a_runs_folder_in_the_place_of_its_base(tmp_path):
    with pytest.raises(InputError, match="is a run's folder; its base model was rinna/small"):
        read(tmp_path, {"data_sha256": "0", "pretrained_model_dir": "rinna/small", "model_type": "gpt-neox"})


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        read(tmp_path, {"model_type": "gpt_neox", "hidden_act": "swish"})
    assert str(error.value).count("\n  - ") == 7


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file"):
        read_model_config(tmp_path)
    for content, message in (("{", "not valid JSON"), ("[]", "expected a JSON object")):
        with pytest.raises(InputError, match=message):
            read(tmp_path, content)


def test_gpt2s_norms_have_their_own_key(tmp_path):
    assert read(tmp_path, GPT2 | {"layer_norm_epsilon": 1e-3}).layer_norm_eps == 1e-3
    assert read(tmp_path, TINY | {"layer_norm_eps": 1e-3}).layer_norm_eps == 1e-3


def test_what_gpt_neox_does_not_say_is_as_in_transformers(tmp_path):
    ours = read(tmp_path, {"model_type": "gpt_neox"} | {key: BARE[key] for key in LARGEST})
    theirs = transformers.GPTNeoXConfig()
    assert (ours.layer_norm_eps, ours.activation) == (theirs.layer_norm_eps, theirs.hidden_act)
    assert ours.tied_head == theirs.tie_word_embeddings
    rope = theirs.rope_parameters
    assert (ours.rotary_base, ours.rotary_fraction) == (rope["rope_theta"], rope["partial_rotary_factor"])
    assert (ours.parallel_residual, ours.attention_bias) == (theirs.use_parallel_residual, theirs.attention_bias)


def test_what_gpt2_does_not_say_is_as_in_transformers(tmp_path):
    sizes = {key: value for key, value in GPT2.items() if key.startswith(("n_", "vocab"))}
    ours, theirs = read(tmp_path, {"model_type": "gpt2"} | sizes), transformers.GPT2Config()
    assert (ours.layer_norm_eps, ours.activation) == (theirs.layer_norm_epsilon, theirs.activation_function)
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.scale_attention == theirs.scale_attn_weights
    assert ours.scale_by_layer == theirs.scale_attn_by_inverse_layer_idx


def test_positions_end_where_they_end(tmp_path):
    """Scaling reaches further, for a config.json tells how many positions there were before it."""
    plain = read(tmp_path, BARE)
    plain.check_fit(10, 246, "a row")
    plain.check_vocabulary(440)
    with pytest.raises(InputError, match="exceeds the base model's 256 positions"):
        plain.check_fit(10, 247, "a row")
    with pytest.raises(InputError, match="the tokenizer has 441 pieces"):
        plain.check_vocabulary(441)
    for scaling in ("linear", "dynamic"):
        scaled = read(tmp_path, BARE | {"rope_scaling": {"type": scaling, "factor": 2.0}})
        scaled.check_fit(10, 502, "a row")
        with pytest.raises(InputError, match="exceeds the base model's 512 positions"):
            scaled.check_fit(10, 503, "a row")


def test_dynamic_scaling_without_factor(tmp_path):
    with pytest.raises(InputError, match=r"rope_scaling.factor is missing"):
        read(tmp_path, BARE | {"rope_scaling": {"type": "dynamic"}})


def test_gpt2_is_gpt_by_the_originals_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_GPT2))
    assert read_model_config(tmp_path, model_type="gpt").model_type == "gpt2"
