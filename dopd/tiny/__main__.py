"""`python -m dopd.tiny TASK ROLE SEED`: put a named tiny model into the package; older files go."""

import sys

from dopd.tiny.cache import get_recipe, tiny_model_path
from dopd.tiny.shipped import FOLDER, pack

task, role, seed = sys.argv[1:]
folder = tiny_model_path(task, role, int(seed))
for old in FOLDER.glob(f"{task}-{role}-seed{seed}-*.safetensors"):
    if old.stem != folder.name:
        old.unlink()
print(pack(folder, get_recipe(task, role)))
