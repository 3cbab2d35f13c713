"""The order of prompts: a function of seed and epoch alone, so that a resumed run goes on where it stopped."""

from collections.abc import Callable, Iterator, Sized

import torch
from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """TRL's `RepeatSampler` that knows which epoch it is in.

    TRL's own draws from a generator that lives as long as the process: a run resumed in its second epoch would go
    through the order of the first one again. The epoch is asked for and not set: `set_epoch` does not reach a sampler
    below the layers that accelerate puts around it when a resumed run skips batches on several ranks.

    Args:
        data_source, mini_repeat_count, batch_size, repeat_count, shuffle, seed: as in TRL.
        epoch (callable): -> number of the current epoch, read when an epoch begins.
    """

    def __init__(
        self,
        data_source: Sized,
        *,
        mini_repeat_count: int,
        batch_size: int,
        repeat_count: int,
        shuffle: bool,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        super().__init__(data_source, mini_repeat_count, batch_size, repeat_count, shuffle, seed)
        self._seed = seed
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            # The draws of an unbroken run: one permutation for each epoch before this one.
            self.generator = torch.Generator().manual_seed(self._seed)
            for _ in range(self._epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()
