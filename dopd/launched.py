"""Which of the processes of a run this one is, from what its launcher says. Needs nothing but Python."""

import os

# What MPI's launchers set, which accelerate reads where torchrun or `accelerate launch` has set nothing.
_RANKS_OF_MPI = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_main_process() -> bool:
    """Whether this process is the first of those that were started together, or the only one."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ.get("RANK") or 0) == 0
    return all(int(os.environ.get(name) or 0) == 0 for name in _RANKS_OF_MPI)
