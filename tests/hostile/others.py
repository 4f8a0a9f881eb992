"""Training states, base models, tokenizers and data files made to do harm."""

import contextlib
import gzip
import io
import json

import numpy as np
import torch

from convert.errors import InputError
from jaxprefix import load_model, load_tokenizer
from jaxprefix.base_folder import open_base
from jaxprefix.cli import main
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.data.examples import Chunking, read_examples
from jaxprefix.models import copy_base_model
from tests.base_folders import GOLDEN_BASE, changed_weights, make_base_folder
from tests.hostile.prefixes import CreatesAFile
from tests.hostile.registry import DEEP, hostile


@hostile(r"asks for (builtins|_?io)\.open")
def a_training_state_with_code(folder):
    torch.save({"encoder": CreatesAFile()}, folder / "state.pt")
    return lambda: convert(ConvertConfig(folder / "state.pt", folder / "run"))


@hostile(r"asks for (builtins|_?io)\.open")
def a_base_model_with_code(folder):
    make_base_folder(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    torch.save({"gpt_neox.embed_in.weight": CreatesAFile()}, folder / "base" / "pytorch_model.bin")
    return lambda: load_model(folder / "base")


@hostile("points outside its folder, to .*secret")
def a_base_model_with_a_link_to_its_weights(folder):
    weights = make_base_folder(folder / "base") / "model.safetensors"
    weights.rename(folder / "secret")
    weights.symlink_to(folder / "secret")
    return lambda: load_model(folder / "base")


@hostile("points outside its folder, to .*secret")
def a_base_model_that_smuggles_a_file_into_its_copy(folder):
    (folder / "secret").write_text("{}")
    (make_base_folder(folder / "base") / "extra.json").symlink_to(folder / "secret")
    return lambda: copy_base_model(folder / "base", folder / "copy")


def base_with(folder, name, content):
    base = make_base_folder(folder / "base")
    if name.endswith("index.json"):
        (base / "model.safetensors").unlink()
    (base / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return lambda: load_model(open_base(str(base)).path)


def base_config(**changes):
    return json.loads((GOLDEN_BASE / "config.json").read_text()) | changes


@hostile(r"config.json: needs its own code \(auto_map\), which is never run")
def a_config_with_code(folder):
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "evil/code--configuration.Config"}
    config = base_config(auto_map=auto_map, trust_remote_code=True)
    read = base_with(folder, "config.json", config)
    (folder / "base" / "modeling_evil.py").write_text("open('created-by-auto-map', 'w')")
    return read


@hostile(r"not valid JSON \(maximum recursion")
def a_deep_config(folder):
    return base_with(folder, "config.json", DEEP)


@hostile(r"not valid JSON \(maximum recursion")
def a_deep_tokenizer_config(folder):
    return base_with(folder, "tokenizer_config.json", DEEP)


@hostile("is longer than 8,388,608 bytes")
def a_config_of_ten_megabytes(folder):
    return base_with(folder, "config.json", base_config(note="x" * 10**7))


@hostile("duplicate key 'hidden_size'")
def a_config_with_two_answers(folder):
    return base_with(folder, "config.json", b'{"hidden_size": 8, "hidden_size": 64}')


@hostile("num_hidden_layers 1000000000 is more than 128")
def a_config_of_a_billion_layers(folder):
    return base_with(folder, "config.json", base_config(num_hidden_layers=10**9))


@hostile("config.json asks for 128 layers, the weights have no layer 127")
def a_config_deeper_than_its_weights(folder):
    return base_with(folder, "config.json", base_config(num_hidden_layers=128))


@hostile("names files outside its folder")
def an_index_that_climbs_out(folder):
    shards = {"weight_map": {"a": "../../secret.safetensors", "b": "/etc/passwd"}}
    return base_with(folder, "model.safetensors.index.json", shards)


@hostile("cannot be resolved|names files that are missing")
def an_index_with_a_name_that_ends_early(folder):
    return base_with(folder, "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors\0.txt"}})


@hostile("points outside its folder, to .*secret")
def an_index_whose_shard_is_a_link(folder):
    (folder / "secret").write_bytes(b"")
    read = base_with(folder, "model.safetensors.index.json", {"weight_map": {"a": "shard.safetensors"}})
    (folder / "base" / "shard.safetensors").symlink_to("../secret")
    return read


def base_with_weights(folder, change):
    with changed_weights(make_base_folder(folder / "base")) as weights:
        change(weights)
    return lambda: load_model(folder / "base")


@hostile("embed_in.weight: holds numbers of type int8; supported: float64, float32, float16, bfloat16")
def a_base_model_of_whole_numbers(folder):
    name = "gpt_neox.embed_in.weight"
    return base_with_weights(folder, lambda weights: weights.update({name: weights[name].astype(np.int8)}))


@hostile("the tokenizer has 440 pieces, more than the model's vocab_size 400")
def a_tokenizer_larger_than_the_embedding(folder):
    base = make_base_folder(folder / "base", vocab_size=400)
    return lambda: run_command("generate", "--pretrained_model_dir", str(base), "--prompt", "a")


def run_command(*arguments):
    """Run the command line, and raise what it printed as an error."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(list(arguments)) == 2
    raise InputError(printed.getvalue())


@hostile("not a SentencePiece model")
def a_tokenizer_of_garbage(folder):
    return base_with(folder, "spiece.model", np.random.default_rng(0).bytes(100_000))


@hostile("not a tokenizer.json")
def a_deep_tokenizer_json(folder):
    (folder / "tokenizer.json").write_bytes(DEEP)
    return lambda: load_tokenizer(folder)


@hostile("added tokens without a proper id")
def an_added_token_without_a_number(folder):
    return base_with(folder, "added_tokens.json", {"<a>": [[]]})


@hostile("unpacks to more than 100 times its size")
def a_gzip_bomb_of_one_line(folder):
    write_gzip(folder / "d.jsonl.gz", bytes(2**25), 8)
    return lambda: read_examples(folder / "d.jsonl.gz", Chunking(FakeTokenizer(), skip_bad_lines=True))


def write_gzip(path, content, times):
    """A gzip file may hold several streams, end to end."""
    path.write_bytes(gzip.compress(content, compresslevel=1) * times)


class FakeTokenizer:
    """Fast: the bombs are about lines."""

    def encode(self, text):
        return []
