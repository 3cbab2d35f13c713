"""`python -m lab.tiny TASK ROLE SEED`: put a named tiny model where its older files are, which go; a new one comes to
the weights of the experiments, outside the package.
"""

import sys

from dopd.tiny.shipped import FOLDER
from lab.tiny.cache import get_recipe, tiny_model_path
from lab.tiny.packing import REPOSITORY_FOLDER, pack

task, role, seed = sys.argv[1:]
folder = tiny_model_path(task, role, int(seed))
pattern = f"{task}-{role}-seed{seed}-*.safetensors"
older = [file for place in (FOLDER, REPOSITORY_FOLDER) for file in place.glob(pattern)]
for file in older:
    if file.stem != folder.name:
        file.unlink()
print(pack(folder, get_recipe(task, role), older[0].parent if older else REPOSITORY_FOLDER))
