"""The benchmark programs run, and count what they say they do."""

import importlib
import json
import math
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers

from benchmarks import processes, report
from benchmarks.decode import bytes_per_token, rows_of_table
from benchmarks.memory import largest_array
from benchmarks.processes import descendants_memory, peak_memory
from benchmarks.scaling import line_through
from benchmarks.shapes import SAMPLE, SHAPES, attention_flops, make_folder
from benchmarks.train import strung_together, torch_batches
from jaxprefix.config import TrainConfig
from jaxprefix.data.rows import IGNORED
from jaxprefix.inputs import batch_shapes, read_inputs, update_batches
from jaxprefix.sharding import make_mesh
from tests import ways
from tests.markers import needs_cuda_plugin


@pytest.fixture
def run_benchmark(tmp_path, monkeypatch, capsys):
    """A function that runs a program, and returns what it prints and what it writes."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        importlib.import_module(f"benchmarks.{name}").main()
        (written,) = (tmp_path / "results").iterdir()
        return capsys.readouterr().out, json.loads(written.read_text())["results"]

    return run


@pytest.mark.slow
def test_decode(run_benchmark):
    flags = ("--shape", "1m", "--rows", 2, "--new_tokens", 5, "--times", 1)
    printed, results = run_benchmark("decode", *flags)
    assert results["jaxprefix:2"][0]["ids"] == results["peft:2"][0]["ids"]
    assert "| peft | 2 |" in printed


@pytest.mark.parametrize(("n_rounds", "whole"), [(0, [1, 2, 3]), (2, [1, 2, 3, 1, 2, 3])])
def test_a_way_that_breaks_off_keeps_its_turns(capsys, n_rounds, whole):
    results = processes.take_turns({"fine": [None], "lost": [2], "failed": [0]}, ways.breaks_off_in, 3, n_rounds)
    turns = {way: [turn["count"] for turn in of_way] for way, of_way in results.items()}
    assert turns == {"fine": whole, "lost": [1] * max(n_rounds, 1), "failed": []}
    assert "lost ended with 3 in turn 2" in capsys.readouterr().err
    assert math.isnan(report.ratio(results["fine"], results["failed"], "count"))
    assert report.ratio(results["fine"], results["lost"], "count") == 1, "of the same rounds"


def test_all_ways_train_on_the_same_labels_in_rows_of_the_wanted_length(tmp_path):
    folder = make_folder(tmp_path / "base", SHAPES["1m"])
    data = strung_together(SAMPLE, folder, 100, 14)
    sizes = {"max_seq_len": 100, "train_data_size": 4, "batch_size": 2, "n_epochs": 1}
    config = TrainConfig(str(folder), data, "benchmark", **sizes)
    batches, n_useful, lengths = torch_batches(config)
    assert all(80 < tokens.shape[1] <= 101 for tokens, _ in batches)
    assert [of_batch.sum() for of_batch in lengths] == n_useful  # without a prompt, each token has a label
    inputs = read_inputs(config)
    ours = [*update_batches(config, inputs, batch_shapes(config, inputs, make_mesh()), 0)]
    assert n_useful == [(batch.labels != IGNORED).sum() for batch in ours]

    def learnt(tokens, labels):
        return sorted(zip(tokens[labels != IGNORED].tolist(), labels[labels != IGNORED].tolist(), strict=True))

    assert [learnt(*batch) for batch in batches] == [learnt(batch.tokens, batch.labels) for batch in ours]


def test_a_decoding_step_reads_all_weights_but_the_embeddings_unless_one_is_the_head():
    layers = 12 * (12 * 768**2 + 13 * 768)
    assert bytes_per_token("gpt2", "bfloat16") == 2 * (layers + 2 * 768 + 32000 * 768)
    assert bytes_per_token("110m", "float32") == 4 * (layers + 2 * 768 + 44416 * 768)


def test_the_limit_of_decoding_is_of_a_step_of_all_rows():
    turn = {"ids": "a", "peak_bytes": 2**30, "device_peak_bytes": 0, "turn": 1}
    results = {way: [turn | {"tokens_per_s": speed}] for way, speed in (("jaxprefix:2", 20.0), ("peft:2", 10.0))}
    assert [row[4] for row in rows_of_table(results, 50.0)] == ["0.20", "0.10"]


def test_what_measures_pytorch_has_no_jax_in_memory():
    imports = "import sys, benchmarks.decode, benchmarks.train, torch_ref.train"
    subprocess.run([sys.executable, "-c", f"{imports}; assert not {{'jax', 'flax'}} & {{*sys.modules}}"], check=True)


def test_train(run_benchmark):
    printed, results = run_benchmark("train", "--shape", "1m", "--updates", 2, "--ways", "jaxprefix:float32")
    n_matrix = 2 * 12 * 64**2 + 4000 * 64
    for turn in results["jaxprefix:float32"]:  # 4 operations a weight, and attention's
        assert 4 * n_matrix < turn["of_limit"] * turn["rate"] / turn["tokens_per_s"] < 4.5 * n_matrix
        assert 0.7 < turn["useful"] < 1
    assert "| jaxprefix:float32 |" in printed


def test_data(run_benchmark):
    printed, (first, again) = run_benchmark("data", "--gigabytes", 0.005)
    assert again["examples"] == first["examples"] > 1000
    assert again["seconds"] < first["seconds"]
    assert "| from the cache |" in printed


def test_load(run_benchmark):
    printed, results = run_benchmark("load", "--shape", "1m", "--rounds", 1)
    assert all(run["file_bytes"] > 10**6 for runs in results.values() for run in runs)
    assert "| transformers |" in printed


@pytest.mark.slow
def test_startup(run_benchmark):
    printed, results = run_benchmark("startup", "--shape", "1m", "--rounds", 1)
    assert all(run["seconds"] > 0.5 for runs in results.values() for run in runs)  # the imports alone take longer
    assert "| torch_ref |" in printed


@pytest.mark.slow
def test_memory(run_benchmark):
    flags = ("--shape", "1m", "--rounds", 1, "--updates", 1, "--ways", "jaxprefix:float32")
    printed, results = run_benchmark("memory", *flags, "--remat", "block", "--scan_layers")
    assert 0 < results["jaxprefix:float32"][0]["after_one"] <= results["jaxprefix:float32"][0]["peak_bytes"]
    assert "| jaxprefix:float32 |" in printed
    assert "1 updates, --remat block, --scan_layers\n" in printed


@pytest.mark.parametrize("compiler", [(), pytest.param(("--gpu",), marks=needs_cuda_plugin)], ids=["CPU", "H100"])
def test_memory_by_the_compilers_account(run_benchmark, compiler):
    sizes = ("--shape", "1m", "--rows", 2, "--tokens", 16, "--dtype", "float32")
    printed, results = run_benchmark("memory", "--abstract", "--mesh", "tensor=2", *sizes, *compiler)
    (account,) = results["tensor=2"]
    split_weights = 2 * (12 * 64**2 + 7 * 64) + 2 * 4000 * 64  # nearly all, in 4 bytes on two devices
    assert 2 * split_weights < account["arguments"] < 2.3 * split_weights
    assert account["total"] == sum(account[part] for part in ("arguments", "outputs", "temporaries"))
    assert "| tensor=2 |" in printed


@pytest.mark.slow
def test_scaling(run_benchmark):
    flags = ("--shape", "1m", "--small", "--rounds", 1, "--turns", 1, "--sweeps", "layers")
    printed, results = run_benchmark("scaling", *flags)
    assert set(results["layers"][0]) == {"1", "2", "round"}
    assert "| layers | ms an update |" in printed


def test_attention_has_3_and_a_half_times_the_operations_of_its_scores_and_sums():
    """Of a token's pairs with the prefix and the half of its row: two operations each for q k and for the sum."""
    rows = [np.array([[100, 0], [20, 19]]), np.array([[7, 0]])]
    pairs = sum(n * (10 + n / 2) for n in (100, 20, 19, 7))
    assert attention_flops(rows, prefix_len=10, n_layer=3, width=64) == pytest.approx(3.5 * 3 * pairs * 64 * 2 * 2)


def test_the_line_of_a_sweep():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert line_through(x, 3 + 2 * x) == pytest.approx((3, 2))
    start, slope = line_through(x, x**2)
    assert np.abs(x**2 / (start + slope * x) - 1).max() > 0.15


def test_the_largest_array_of_a_program():
    fused = "%inside (p: f32[9]) -> f32[9] {\n %x = f32[9] add()\n}"
    entry = "%a = f32[2,3]{1,0} dot(%b)\n%b = bf16[10]{0} fusion(%a), calls=%inside\n %c = f32[] add()"
    assert largest_array(f"{fused}\n\n{entry}") == "f32[2,3]"


def test_how_turns_are_summed_up():
    ours, theirs = (
        [{"t": float(t), "turn": turn} for turn, t in enumerate(times)] for times in ((2, 4, 30), (1, 1, 1, 9))
    )
    assert report.ratio(ours, theirs, "t") == 4
    assert (report.median(ours, "t"), report.largest(ours, "t")) == (4, 30)


def test_memory_is_the_most_and_of_all_descendants():
    block = np.ones(2**25)
    most = peak_memory()
    del block
    assert peak_memory() > most - 2**27
    hold = "import sys; held = b'x' * 2**27; print(flush=True); sys.stdin.read()"
    nest = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    before = descendants_memory()
    with subprocess.Popen([sys.executable, "-c", nest], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        during = descendants_memory()
        child.communicate()
    assert during - before > 2**27


@pytest.mark.parametrize(
    ("own", "n_rounds", "told"),
    [
        ({}, 0, ("false", "0", "unset")),
        ({}, 1, ("unset", "0", ".95")),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5", "CUDA_VISIBLE_DEVICES": "2,3"}, 1, ("unset", "2", "unset")),
        (dict.fromkeys(ways.OF_GPUS, "1"), 0, ("1", "1", "1")),
    ],
)
def test_processes_share_one_gpu_or_have_it_to_themselves_unless_the_user_says_otherwise(
    monkeypatch, own, n_rounds, told
):
    for name in ways.OF_GPUS:
        monkeypatch.setenv(name, "")  # so that what the benchmark sets is gone afterwards
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    (turn,) = processes.take_turns({"way": []}, ways.shows_gpus, 1, n_rounds)["way"]
    assert turn["told"] == told


@pytest.mark.parametrize("n_rounds", [0, 1])
def test_a_cpu_is_not_compared_with_a_gpu(monkeypatch, n_rounds):
    for name in ways.OF_GPUS:
        monkeypatch.setenv(name, "1")  # so that what the benchmark sets is gone afterwards
    with pytest.raises(RuntimeError, match="not all compute on the same kind of device"):
        processes.take_turns({"ours": [None, "cpu"], "theirs": [None, "gpu"]}, ways.breaks_off_in, 1, n_rounds)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pefts_own_loss_is_that_of_the_labels(tmp_path):
    """Which are shifted already."""
    folder = make_folder(tmp_path / "base", SHAPES["1m"])
    sizes = {"train_data_size": 2, "batch_size": 2, "n_epochs": 1}
    config = TrainConfig(str(folder), SAMPLE, "benchmark", **sizes)
    batches, *_ = torch_batches(config)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10))
    tokens, labels = batches[0]
    logits = model(input_ids=tokens).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)
    own = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
    assert own.item() == pytest.approx(expected.item(), rel=1e-6)


def test_results_say_on_what_they_were_made(tmp_path, monkeypatch):
    (data := tmp_path / "sample.jsonl").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train", "--data", str(data)])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.publish("name", "table", {})
    written = json.loads((tmp_path / "name.json").read_text())
    assert written["arguments"] == ["--data", "sample.jsonl (SHA-256 44136fa355b3678a…)"]
    assert {"cpu_family_model", "cpu_features", "usable_cores", "jax"} <= written["machine"].keys()
