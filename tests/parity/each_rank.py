"""Run the reference under a launcher and keep every rank's encoder: python -m … each_rank FOLDER flags …"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from torch_ref.config import train_parser
from torch_ref.train import train

if __name__ == "__main__":
    folder, *arguments = (part for part in sys.argv[1:] if not part.startswith("--local_rank"))
    record = train(train_parser().parse_args(arguments))
    torch.save(record["encoder"].state_dict(), Path(folder) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
