"""What the reference tells DeepSpeed and several ranks, for machines that have neither."""

import pytest

from torch_ref.config import deepspeed_config, train_parser
from torch_ref.train import epoch_order

FLAGS = {"pretrained_model_dir": "a", "data_filepath": "b", "save_name": "c", "batch_size": 3, "n_accum_steps": 5}
FLAGS |= {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-6, "weight_decay": 0.2, "grad_clip": 0.5}
FLAGS |= {"min_lr": 0.1, "max_lr": 0.3, "n_warmup_steps": 7}


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_deepspeed_is_told_what_the_flags_say(half):
    arguments = [str(part) for name, value in FLAGS.items() for part in (f"--{name}", value)]
    adam = {"lr": 0.3, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.2, "adam_w_mode": True}
    warmup = {"warmup_min_lr": 0.1, "warmup_max_lr": 0.3, "warmup_num_steps": 7}
    assert deepspeed_config(train_parser().parse_args([*arguments, f"--{half}"])) == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "optimizer": {"type": "Adam", "params": adam},
        "scheduler": {"type": "WarmupLR", "params": warmup},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 0},
        "fp16": {"enabled": half == "fp16", "initial_scale_power": 10},
        "bf16": {"enabled": half == "bf16"},
    }


def test_ranks_share_each_epoch_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)

    def order(rank, seed=42, epoch=0):
        monkeypatch.setattr("torch.distributed.get_rank", lambda *_: rank)
        return epoch_order(20, seed, epoch)

    assert sorted(order(0) + order(1)) == [*range(20)]
    assert order(0) == order(0)
    assert order(0) not in (order(0, epoch=1), order(0, seed=43), [*range(0, 20, 2)])
