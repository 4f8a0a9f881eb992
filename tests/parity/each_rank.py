"""Run the reference under a launcher, each rank in its own folder; keep the encoders: … each_rank FOLDER flags …"""

import contextlib
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed's launcher names one for each rank, also where none is used

import torch
import torch.distributed as dist

from torch_ref.config import train_parser
from torch_ref.train import train

if __name__ == "__main__":
    folder, *arguments = (part for part in sys.argv[1:] if not part.startswith("--local_rank"))
    own = Path(folder) / f"rank{os.environ['RANK']}"
    own.mkdir()
    with contextlib.chdir(own):
        record = train(train_parser().parse_args(arguments))
    torch.save(record.encoder.state_dict(), own.with_suffix(".pt"))
    dist.destroy_process_group()
