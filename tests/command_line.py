"""The command line, called by tests within their own process."""

from jaxprefix.cli import main
from tests.base_folders import GOLDEN, GOLDEN_BASE
from tests.runs import flags_of, run_config

BASE = ["--pretrained_model_dir", str(GOLDEN_BASE)]
PREFIX = ["--prefix_checkpoint_path", str(GOLDEN / "forward.weight")]
GREEDY = ["--decode_method", "greedy", "--max_output_len", "8"]


def train_flags(folder, **changes):
    return ["train", *flags_of(run_config(folder, **changes))]


def assert_fails(capsys, arguments, *messages):
    """Run a command that must end with code 2, plain messages on stderr, and nothing else."""
    capsys.readouterr()  # of earlier commands
    code = main(arguments)
    out, error = capsys.readouterr()
    assert code == 2
    assert not out or arguments[0] == "check", "only that one prints line by line what it has found out"
    assert "Traceback" not in error
    for message in messages:
        assert message in error
