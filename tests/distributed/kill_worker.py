"""What each of two gloo processes runs for test_random_kills.py: a run that may be killed, gone on with if it was."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import resume_kit as kit
import torch

from dopd.trainer.whole import checkpoints_of

torch.set_num_threads(1)


def main() -> None:
    folder = Path(sys.argv[1])
    made = kit.resumable(folder, steps=kit.STEPS, per_device_train_batch_size=2, privileged_student="ema")
    (folder.parent / f"ready-{torch.distributed.get_rank()}").touch()
    made.train(resume_from_checkpoint=bool(checkpoints_of(folder)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
