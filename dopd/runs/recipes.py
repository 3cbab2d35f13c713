"""Configs that come with the package, by name."""

from pathlib import Path

from dopd.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parents[1] / "recipes"
_SUFFIX = ".yaml"


def recipe_names() -> list[str]:
    """What `dopd train NAME` knows, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob(f"*{_SUFFIX}"))


def recipe_path(name: str) -> Path:
    """The file of a recipe."""
    return FOLDER / f"{name}{_SUFFIX}"


def config_path(name: str | Path) -> Path:
    """The file that a config argument means: itself, or the recipe of that name (`tiny-dag`, `recipes/tiny-dag.yaml`).

    Raises:
        ConfigError: neither a file nor a recipe.
    """
    path, names = Path(name), recipe_names()
    if path.is_file():
        return path
    if path.parent.name in ("", FOLDER.name) and _stem(path) in names:
        return recipe_path(_stem(path))
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f": a run's configuration is {str(inside)!r}" if inside.is_file() else ""
        raise ConfigError(f"config {str(name)!r} cannot be read: it is a folder{hint}")
    raise ConfigError(
        f"config {str(name)!r} cannot be read: there is no such file, and no recipe of that name."
        f"{did_you_mean(_stem(path), names)} Recipes: {', '.join(names)}"
    )


def _stem(path: Path) -> str:
    # A name may have dots of its own (qwen2.5-coder-...).
    return path.name.removesuffix(_SUFFIX)
