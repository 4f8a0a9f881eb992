"""`jaxprefix evaluate`: what it measures, whose settings it takes, what it refuses."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError
from jaxprefix.cli import main
from jaxprefix.config import ConvertConfig
from jaxprefix.conversion import convert
from jaxprefix.evaluation import as_generated, evaluate
from jaxprefix.inference import as_trained
from jaxprefix.inference_config import DecodeConfig, EvaluateConfig
from jaxprefix.models import load_model
from jaxprefix.recipe import RECIPES
from jaxprefix.tokenizer import load_tokenizer
from tests.base_folders import GOLDEN, GOLDEN_BASE, make_bpe_folder
from tests.command_line import BASE, PREFIX, assert_fails
from tests.examples import data_file


def test_evaluate_with_and_without_prefix(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("朝の\n猫が\n")
    options = ["--data_filepath", str(GOLDEN / "documents.jsonl"), "--prompt_file", str(tmp_path / "prompts.txt")]
    options += ["--n_samples", "6", "--batch_size", "4", "--max_output_len", "30"]
    assert main(["evaluate", *BASE, *PREFIX, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"with_prefix", "without_prefix"}
    for values in report.values():
        assert values.keys() == {"loss", "ppl", "tokens", "sentences", "suffix_rate"}
        assert values["ppl"] == pytest.approx(np.exp(values["loss"]))
    assert report["with_prefix"]["loss"] != report["without_prefix"]["loss"]
    assert main(["evaluate", *BASE, *options, "--n_samples", "0"]) == 0
    assert capsys.readouterr().out.startswith("without_prefix:")


def test_evaluate_takes_the_runs_settings_and_its_suffix_as_generated_texts_have_it(capsys, tmp_path, monkeypatch):
    run = tmp_path / "prefix"  # a run may be called so
    convert(ConvertConfig(GOLDEN / "forward.weight", run / "prefix", str(GOLDEN_BASE)))
    settings = {"data_sha256": "", "suffix": "！", "max_seq_len": 20}
    (run / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("jaxprefix.evaluation.generate_ids", lambda *_: iter([[5]]))
    monkeypatch.setattr("jaxprefix.evaluation.continuation", lambda *_: "楽しい!寒い。")  # the tokenizer makes ！ that
    options = ["--data_filepath", str(GOLDEN / "documents.jsonl"), "--json"]

    def report(*more: str) -> dict:
        assert main(["evaluate", *BASE, *options, *more]) == 0
        return json.loads(capsys.readouterr().out)["with_prefix"]

    of_run, told = (
        report("--prefix_checkpoint_path", str(run)),
        report(*PREFIX, "--suffix", "！", "--max_seq_len", "20"),
    )
    assert of_run == told
    assert of_run["suffix_rate"] == 1 / 2
    for other in (["--suffix", "！"], ["--max_seq_len", "20"]):
        assert report(*PREFIX, *other)["loss"] != told["loss"]
    assert report("--prefix_checkpoint_path", str(run / "prefix")) == told
    strangers = shutil.copy(GOLDEN / "forward.weight", run)
    assert report("--prefix_checkpoint_path", strangers) == report(*PREFIX), "that it lies there says nothing"
    assert main(["evaluate", *BASE, "--prefix_checkpoint_path", str(run), "--n_samples", "2"]) == 0
    assert capsys.readouterr().err.startswith("suffix: '！', dtype: float32\n")
    (run / "config.json").write_text(json.dumps(settings | {"suffix": ""}))
    assert_fails(
        capsys, ["evaluate", *BASE, "--prefix_checkpoint_path", str(run)], "the suffix '' is nothing to the tokenizer"
    )


def test_evaluate_tells_of_unknown_tokens(capsys):
    """Of the suffix that a crab is nothing could be learnt, and anything unknown would count as it."""
    data = ["--data_filepath", str(GOLDEN / "documents.jsonl"), "--suffix", " 🦀"]
    assert_fails(
        capsys,
        ["evaluate", *BASE, *data],
        "the suffix ' 🦀' holds text unknown to the tokenizer; --n_samples 0 skips the",
    )
    assert main(["evaluate", *BASE, *data, "--n_samples", "0"]) == 0
    assert "unknown tokens: 53 (4.56%), in 26 examples" in capsys.readouterr().err


def test_evaluate_checks_positions_and_that_there_is_something_to_do(capsys, tmp_path):
    data = data_file(tmp_path, json.dumps({"prompt": "朝" * 600, "completion": "の"}) + "\n")
    assert_fails(
        capsys,
        ["evaluate", *BASE, "--data_filepath", str(data)],
        "line 1: a prefix of 0 plus 601 tokens (the longest row)",
        "512 positions",
    )
    data.write_text(data.read_text() + json.dumps({"prompt": "朝", "completion": "の"}), encoding="utf-8")
    assert main(["evaluate", *BASE, "--data_filepath", str(data), "--n_samples", "0", "--skip_bad_lines"]) == 0
    assert f"skipped 1 example(s) of {data} as too long, first: line 1" in capsys.readouterr().err
    assert_fails(capsys, ["evaluate", *BASE, "--n_samples", "0"], "nothing to measure")


def test_evaluate_without_samples_needs_no_room_for_them(capsys):
    options = ["--data_filepath", str(GOLDEN / "documents.jsonl"), "--n_samples", "0", "--max_output_len", "600"]
    assert main(["evaluate", *BASE, *options]) == 0
    assert capsys.readouterr().out.startswith("without_prefix: loss ")


def test_evaluate_refuses_a_loss_that_is_not_finite(capsys, monkeypatch):
    options = ["--data_filepath", str(GOLDEN / "documents.jsonl"), "--n_samples", "0", "--json"]
    monkeypatch.setattr("jaxprefix.evaluation.loss_and_ppl", lambda *_: {"loss": 800.0, "ppl": math.inf})
    assert main(["evaluate", *BASE, *options]) == 0
    assert json.loads(capsys.readouterr().out) == {"without_prefix": {"loss": 800.0, "ppl": None, "tokens": 2353}}
    monkeypatch.setattr("jaxprefix.evaluation.loss_and_ppl", lambda *_: {"loss": math.nan, "ppl": math.nan})
    assert main(["evaluate", *BASE, *options, "--dtype", "float16"]) == 1
    message = "error: the loss without prefix is nan: its numbers grow beyond float16; use --dtype bfloat16"
    assert message in capsys.readouterr().err


def test_the_type_is_that_of_the_prefixs_training_unless_given(capsys, tmp_path, monkeypatch):
    convert(ConvertConfig(GOLDEN / "forward.weight", tmp_path / "run" / "prefix", str(GOLDEN_BASE)))
    held = []
    monkeypatch.setattr("jaxprefix.inference.load_model", lambda *of: held.append(of[1]) or load_model(*of))
    prefix = ["--prefix_checkpoint_path", str(tmp_path / "run")]
    for trained, given in ("float16", []), ("bfloat16", ["--dtype", "float32"]), (None, []):
        (tmp_path / "run" / "config.json").write_text(json.dumps({"data_sha256": "", "dtype": trained}))
        assert main(["generate", *BASE, *prefix, "--prompt", "朝の", "--max_output_len", "2", *given]) == 0
        assert main(["evaluate", *BASE, *prefix, "--n_samples", "1", "--max_output_len", "2", *given]) == 0
    assert held == ["float16"] * 2 + ["float32"] * 4
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data_sha256": "", "dtype": "int8"}))
    assert_fails(capsys, ["generate", *BASE, *prefix, "--prompt", "朝の"], "config.json has an invalid dtype, 'int8'")


def test_evaluate_refuses_a_blank_suffix(capsys):
    assert_fails(capsys, ["evaluate", *BASE, "--suffix", " "], "--suffix is blank")


def test_a_suffix_that_is_blank_in_texts_is_refused(tmp_path):
    """A run may have been trained so."""
    with pytest.raises(InputError, match="the suffix ' ' is blank in generated texts; --n_samples 0 skips the"):
        as_generated(" ", load_tokenizer(make_bpe_folder(tmp_path / "base")))


@pytest.mark.parametrize("found", [0, -1, True, "64"])
def test_a_run_that_tells_no_length_a_run_can_have(tmp_path, found):
    (tmp_path / "config.json").write_text(json.dumps({"data_sha256": "", "max_seq_len": found}))
    with pytest.raises(InputError, match=f"config.json has an invalid max_seq_len, {found!r}"):
        as_trained(EvaluateConfig("base", prefix_checkpoint_path=tmp_path), "max_seq_len")


def test_evaluate_refuses_a_suffix_over_two_lines(capsys, tmp_path):
    base = ["evaluate", "--pretrained_model_dir", str(make_bpe_folder(tmp_path / "base")), "--n_samples", "2"]
    assert_fails(capsys, [*base, "--suffix", "\n😃\n🎉"], r"the suffix '\n😃\n🎉' spans several lines")
    assert main([*base, "--suffix", "\n😃\n", "--max_output_len", "8"]) == 0


@pytest.mark.parametrize(("keeps_newlines", "n_sentences"), [(True, 2), (False, 4)])
def test_a_sentence_is_what_it_is_in_training(monkeypatch, tmp_path, keeps_newlines, n_sentences):
    """The first text is cut off by the limit; the second ended by itself, which ends its line."""
    base = make_bpe_folder(tmp_path / "base") if keeps_newlines else GOLDEN_BASE
    texts = iter(["He saw Dr. Smith. 😃\nAnd", "He left. She did"])
    monkeypatch.setattr("jaxprefix.evaluation.generate_ids", lambda *_: iter([[5] * 9, [5]]))
    monkeypatch.setattr("jaxprefix.evaluation.continuation", lambda *_: next(texts))
    decode = DecodeConfig(max_output_len=9)
    found = evaluate(EvaluateConfig(str(base), suffix=" 😃", n_samples=2, decode=decode))["without_prefix"]
    assert found == {"sentences": n_sentences, "suffix_rate": 1 / n_sentences}


def test_evaluate_measures_what_it_is_told_in_the_way_it_is_told(monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("朝の\n猫が")
    seen = {}

    def fake_loss(model, prefix, batches, mesh, recipe):
        seen.update(recipe=recipe, dtype=model.embed.weight.dtype.name)
        return {"loss": 1.0 if prefix is None else 0.5, "ppl": 1.0}

    def fake_ids(model, tokenizer, prompts, prefix, seed, *rest):
        seen.update(prompts=[tokenizer.decode(prompt) for prompt in prompts], seed=seed)
        return iter([[5], [5, 5]] if prefix is None else [[6]])

    texts = {(5,): "晴れ。", (5, 5): "雨。雪。", (6,): "晴れ。 😃"}
    monkeypatch.setattr("jaxprefix.evaluation.loss_and_ppl", fake_loss)
    monkeypatch.setattr("jaxprefix.evaluation.generate_ids", fake_ids)
    monkeypatch.setattr("jaxprefix.evaluation.continuation", lambda _, prompt, made: texts[tuple(made)])
    places = {"prompt_file": tmp_path / "prompts.txt", "data_filepath": GOLDEN / "documents.jsonl"}
    settings = {
        "seed": 7,
        "dtype": "bfloat16",
        "n_samples": 3,
        "decode": DecodeConfig(recipe="rinna", max_output_len=2),
    }
    report = evaluate(EvaluateConfig(str(GOLDEN_BASE), GOLDEN / "forward.weight", **places, **settings))
    assert (report["with_prefix"]["loss"], report["without_prefix"]["loss"]) == (0.5, 1.0)
    assert (report["with_prefix"]["suffix_rate"], report["without_prefix"]["suffix_rate"]) == (1, 0)
    assert report["without_prefix"]["sentences"] == 2, "behind 雪。, the limit cut off what might have been the suffix"
    assert seen == {"recipe": RECIPES["rinna"], "dtype": "bfloat16", "prompts": ["朝の", "猫が", "朝の"], "seed": 7}


def test_the_longest_row_needs_room_after_the_prefix(capsys, tmp_path):
    data = data_file(tmp_path, json.dumps({"prompt": "朝" * 505, "completion": "の"}) + "\n")
    options = ["--data_filepath", str(data), "--n_samples", "0"]
    assert main(["evaluate", *BASE, *options]) == 0
    assert_fails(capsys, ["evaluate", *BASE, *PREFIX, *options], "a prefix of 10 plus 50", "512 positions")


def test_evaluate_samples_so_many_prompts_at_a_time(monkeypatch):
    seen = []

    def fake_ids(model, tokenizer, prompts, prefix, seed, batch_size, decode):
        seen.append((len(prompts), batch_size, decode.max_output_len))
        return iter([[5]] * len(prompts))

    monkeypatch.setattr("jaxprefix.evaluation.generate_ids", fake_ids)
    evaluate(EvaluateConfig(str(GOLDEN_BASE), n_samples=3, batch_size=2))
    assert seen == [(3, 2, 60)]


def test_evaluate_chunks_as_its_recipe_and_flags_say(monkeypatch):
    seen = {}

    def load(path, chunking):
        seen.update(chunking._asdict())
        raise InputError("enough")

    monkeypatch.setattr("jaxprefix.inputs.load_examples", load)
    settings = {"n_samples": 0, "suffix": "!", "max_seq_len": 9, "skip_bad_lines": True}
    config = EvaluateConfig(str(GOLDEN_BASE), data_filepath=Path("a"), decode=DecodeConfig(recipe="rinna"), **settings)
    with pytest.raises(InputError, match="enough"):
        evaluate(config)
    del seen["tokenizer"]
    assert seen == {"suffix": "!", "max_seq_len": 9, "recipe": RECIPES["rinna"], "skip_bad_lines": True}


@pytest.mark.parametrize(("recipe", "packed", "n_batches"), [("default", True, 10), ("rinna", False, 7)])
def test_evaluate_goes_through_data_as_its_recipe_does(monkeypatch, recipe, packed, n_batches):
    """The original's mean is over batches: which examples each one holds is a part of it."""
    seen = []

    def fake_loss(model, prefix, batches, *_):
        seen.extend(batches)
        return {"loss": 1.0, "ppl": 1.0}

    monkeypatch.setattr("jaxprefix.evaluation.loss_and_ppl", fake_loss)
    settings = {"n_samples": 0, "batch_size": 2, "decode": DecodeConfig(recipe=recipe)}
    evaluate(EvaluateConfig(str(GOLDEN_BASE), data_filepath=GOLDEN / "documents.jsonl", **settings))
    assert {batch.packing is not None for batch in seen} == {packed}
    assert len(seen) == n_batches
