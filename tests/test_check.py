import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

import jaxprefix.check as check_module
from benchmarks.shapes import SMALL_BASE
from jaxprefix.check import abstract_batch, compiled_memory, compiled_update, training_memory
from jaxprefix.cli import main
from jaxprefix.config import CheckConfig, Compute, TrainConfig
from jaxprefix.data.batches import lay_out
from jaxprefix.data.shapes import PackedShape, PaddedShape
from jaxprefix.inputs import batch_shapes, read_inputs, update_batches
from jaxprefix.models.config import read_model_config
from jaxprefix.sharding import make_mesh
from jaxprefix.tokenizer import load_tokenizer
from tests.base_folders import GOLDEN, GOLDEN_BASE, make_bpe_folder
from tests.examples import PROMPTED, write_lines
from tests.runs import run_config


def report(capsys, base, *flags):
    code = main(["check", "--pretrained_model_dir", str(base), *map(str, flags)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_report_on_the_small_base(capsys):
    sizes = ("--train_data_size", 400, "--dev_data_size", 20)
    code, lines, _ = report(capsys, SMALL_BASE, "--data_filepath", SMALL_BASE.parent / "sample_data.jsonl", *sizes)
    assert code == 0
    assert lines[:2] == [
        "base model: gpt_neox, 4 layers × 192, 6 heads of 32, gelu, sequential, rotary 1 base 10000, untied head",
        "parameters: 3,315,840",
    ]
    assert lines[2] == "tokenizer: SentencePiece, 4,000 pieces; bos 1, eos 2, pad 3, unknown 0"
    assert lines[3].startswith("data: 674 examples, 66,152 tokens with a loss; lengths from 11, median 50, ")
    assert lines[4] == "unknown tokens: 32 (0.10%), in 24 examples"
    assert lines[5] == "suffix ' 😃': 1 token(s)"
    assert lines[6] == "positions: prefix 10 + longest row 65 of 512"
    update = "memory for an update of 4 × 1 examples, packed to 1 rows × 520 tokens, in float32"
    assert lines[7].startswith(f"{update}, on each of 1 device(s): 0.01 GiB")


def test_report_on_a_bpe_folder(capsys, tmp_path):
    folder = make_bpe_folder(tmp_path / "bpe")
    code, lines, _ = report(capsys, folder)
    assert code == 0
    assert lines[0] == "base model: gpt2, 2 layers × 64, 4 heads of 16, gelu_new, tied head"
    assert f"{load_tokenizer(folder).vocab_size} pieces, padded to 512; bos 0, eos 0, pad 0, unknown none" in lines[2]
    assert lines[3] == "suffix ' 😃': 5 token(s)"
    assert "of 4 × 1 examples, padded to 8 rows × 65 tokens" in lines[-1], "without data, of two texts an example"


def test_a_suffix_that_cannot_be_learnt(capsys):
    lines = report(capsys, GOLDEN_BASE, "--suffix", " 鬱")[1]
    assert "suffix ' 鬱': holds text unknown to the tokenizer; it CANNOT BE LEARNT" in lines


def test_no_suffix(capsys):
    assert "suffix: none" in report(capsys, GOLDEN_BASE, "--suffix", "")[1]


def test_a_blank_suffix(capsys):
    lines = report(capsys, GOLDEN_BASE, "--suffix", "　")[1]
    assert "suffix '\\u3000': is nothing to the tokenizer; it CANNOT BE LEARNT" in lines


def test_a_special_token_as_suffix(capsys, tmp_path):
    lines = report(capsys, make_bpe_folder(tmp_path / "base"), "--suffix", "<|endoftext|>")[1]
    assert "suffix '<|endoftext|>': is a special token, which no text shows; it CANNOT BE LEARNT" in lines


def test_weights_that_are_missing_and_a_run_that_is_nowhere_end_the_check(capsys, tmp_path):
    base = shutil.copytree(GOLDEN_BASE, tmp_path / "base")
    (base / "model.safetensors").unlink()
    code, lines, err = report(capsys, base)
    assert (code, lines) == (2, [])
    assert "no weights; expected" in err
    code, _, err = report(capsys, GOLDEN_BASE, "--checkpoint_path", str(tmp_path / "nowhere"))
    assert (code, err) == (2, f"error: {tmp_path / 'nowhere'}: no such file or folder\n")


def test_what_training_cannot_start_from_ends_the_check(capsys, finished):
    sizes = ("--prefix_seq_len", finished.prefix_seq_len, "--prefix_input_dim", finished.prefix_input_dim)
    sizes += ("--prefix_hidden_dim", finished.prefix_hidden_dim)
    for path, flags, message in (
        (finished.run_dir, (*sizes, "--scan_layers"), None),
        (finished.run_dir, (*sizes, "--prefix_seq_len", 7), "encoder.prefix_wte.weight: expected shape (7, "),
        (finished.run_dir / "prefix", sizes, "is a prefix, without its encoder"),
        (finished.run_dir / "prefix", (*sizes, "--prefix_hidden_dim", 0), None),
        (finished.run_dir / "prefix", ("--prefix_hidden_dim", 0, "--prefix_seq_len", 7), "not --prefix_seq_len 7"),
    ):
        code, _, err = report(capsys, GOLDEN_BASE, "--checkpoint_path", path, *flags)
        assert code == (2 if message else 0), err
        assert (message or "") in err


def test_what_would_stop_a_run_ends_the_check(capsys):
    code, lines, err = report(capsys, GOLDEN_BASE, "--prefix_seq_len", "500")
    assert (code, len(lines)) == (2, 4)
    assert "a prefix of 500 plus 65 tokens (the longest row) exceeds the base model's 512 positions" in err


@pytest.mark.parametrize("packing", [True, False])
def test_memory_is_that_of_the_largest_batch_of_the_run(monkeypatch, tmp_path, packing):
    accounts, batches = [], []
    monkeypatch.setattr(
        check_module, "compiled_update", lambda *given: accounts.append(given) or compiled_update(*given)
    )
    flags = {**vars(run_config(tmp_path, packing=packing, n_accum_steps=2))}
    list(check_module.check(CheckConfig(**flags)))
    inputs = read_inputs(config := TrainConfig(**flags))
    for batch in update_batches(config, inputs, batch_shapes(config, inputs, make_mesh()), 0):
        batches.append(jax.tree.map(np.shape, tuple(batch)))
    (_, _, shape), *_ = accounts
    expected = jax.tree.map(lambda array: array.shape, tuple(abstract_batch(config, make_mesh(), shape)))
    assert expected == max(batches)


@pytest.mark.parametrize("packing", ["--packing", "--no_packing"])
def test_memory_of_a_dev_set_that_needs_more_than_an_update_is_told(capsys, tmp_path, packing):
    pairs = [{"prompt": "朝の", "completion": "川" * (300 if n >= 16 else 3)} for n in range(32)]
    data = write_lines(tmp_path / "pairs.jsonl", *pairs)
    sizes = ("--train_data_size", 16, "--batch_size", 16, packing)
    *_, with_long = report(capsys, GOLDEN_BASE, "--data_filepath", data, *sizes, "--dev_data_size", 16)[1]
    told = re.fullmatch(r"memory for the dev set, (\d+) rows × (\d+) tokens at a time: \d\.\d\d GiB work", with_long)
    assert int(told[1]) * int(told[2]) >= 16 * 300
    *_, with_short = report(
        capsys, GOLDEN_BASE, "--data_filepath", data, "--train_data_size", 31, *sizes[2:], "--dev_data_size", 1
    )[1]
    assert with_short.startswith("memory for an update of ")


@pytest.mark.parametrize("shape", [PaddedShape(4, 20, 9), PackedShape(2, 40, ((2, 20),), 16)], ids=str)
def test_memory_is_that_of_labelled_columns_where_those_are_few(tokenizer, tmp_path, shape):
    abstract = abstract_batch(run_config(tmp_path), make_mesh(), shape)
    assert abstract.labelled is not None
    made = lay_out(PROMPTED, tokenizer, shape)
    assert jax.tree.map(lambda array: array.shape, abstract) == jax.tree.map(lambda array: (1, *array.shape), made)


def test_memory_of_several_hosts_is_not_told(capsys):
    several = ("--num_processes", 2, "--process_id", 0, "--coordinator_address", "a:1", "--mesh", "data=2,fsdp=8")
    code, lines, _ = report(capsys, GOLDEN_BASE, *several)
    assert code == 0
    assert lines[-1] == "memory: not estimated for several hosts, since one does not see the others' devices"


@pytest.mark.parametrize("scan_layers", [False, True])
def test_memory_of_deep_models_is_extrapolated_from_shallow_ones(scan_layers):
    config = CheckConfig(str(GOLDEN_BASE), bf16=True, n_accum_steps=2, compute=Compute(scan_layers=scan_layers))
    model = dataclasses.replace(read_model_config(GOLDEN_BASE), n_layer=6)
    guessed = training_memory(config, model, PaddedShape(8, 65))
    whole = compiled_memory(config, model, PaddedShape(8, 65))
    assert guessed[0] == pytest.approx(whole[0], rel=0.01)
    assert guessed[1] == pytest.approx(whole[1], rel=0.05)


def test_too_few_examples_end_the_check(capsys):
    code, lines, err = report(
        capsys, GOLDEN_BASE, "--data_filepath", GOLDEN / "documents.jsonl", "--train_data_size", "99"
    )
    assert code == 2
    assert "fewer than --train_data_size 99 + --dev_data_size 10; lower one, or both" in err
    assert lines[-1].startswith("suffix "), "what needs no training set is told all the same"


def test_data_that_the_tokenizer_hardly_knows_is_warned_of(capsys, tmp_path):
    (tmp_path / "crabs.jsonl").write_text('{"text": "🦀🦀🦀"}\n' * 20)
    _, lines, _ = report(capsys, GOLDEN_BASE, "--data_filepath", tmp_path / "crabs.jsonl", "--train_data_size", "10")
    [told] = [line for line in lines if "unknown tokens" in line]
    assert re.fullmatch(r"WARNING: unknown tokens: \d+ \(\d\d\.\d\d%\), in 20 examples; this base .* other text", told)
