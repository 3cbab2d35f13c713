"""Gathers the pages of the site: README, `docs`, and whatever they link to, placed as in the repository.

python docs/tools/site.py FOLDER         # make docs builds the site from it
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)


def gather(folder: Path) -> list[Path]:
    """Copy the pages and all that they lead to.

    Args:
        folder (`Path`): made anew.

    Returns:
        Relative paths of what is there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    waiting, known = [*START], set(START)
    while waiting:
        path = waiting.pop()
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(path, copy)
            continue
        text = path.read_text(encoding="utf-8")
        copy.write_text(_for_site(text), encoding="utf-8")
        for link in _LINK.findall(_CODE.sub("", text)):
            target = (path.parent / link[1]).resolve()
            target = target / "README.md" if target.is_dir() else target
            if target.is_file() and target not in known:
                known.add(target)
                waiting.append(target)
    return sorted(path.relative_to(ROOT) for path in known)


def _for_site(text: str) -> str:
    """What a repository's view of Markdown takes and the site's does not, written otherwise: links to folders, which
    show their README; lists and tables without an empty line before them.
    """
    text = re.sub(r"(\]\((?:\.\./)*experiments)/?\)", r"\1/README.md)", text)
    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    parts[::2] = [re.sub(r"^((?![-|>#<!\s\d]).+)\n(?=- |\| )", r"\1\n\n", part, flags=re.M) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    print(f"{len(gather(Path(sys.argv[1])))} files")
