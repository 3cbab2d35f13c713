"""`python -m lab.mutation --seed 15 --count 320`: see `dopd`'s tests fail, or not, on small faults.

A run goes on where it stopped: coverage and verdicts are kept in the work folder. `--again` judges its survivors anew,
with the tests as they are now; only test files that were changed are measured again.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from lab.mutation import campaign
from lab.mutation.covered import measure
from lab.mutation.forked import preload

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tests/unit", "tests/numerics")
# Tests of the checkout and of what is excluded: they run other programs, or read sources as text.
SKIPPED = ("test_architecture", "test_docs", "test_readme_example", "test_experiment", "test_report", "test_terminal")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--file-seconds", type=float, default=600.0, help="processor time for the tests of one file")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mutation", help="folder of copy and results")
    parser.add_argument(
        "--directed", type=float, metavar="SECONDS", help="measure no coverage: run the likely test files for so long"
    )
    parser.add_argument("--again", action="store_true", help="judge the survivors of the last run anew")
    arguments = parser.parse_args()
    tree, scratch = (arguments.work.resolve() / name for name in ("tree", "scratch"))
    scratch.mkdir(parents=True, exist_ok=True)
    if arguments.again or not tree.is_dir():
        _copy(tree)
    first = scratch / f"seed{arguments.seed}.jsonl"
    last = scratch / f"seed{arguments.seed}-again.jsonl"
    if arguments.again:
        mutants = [verdict.mutant for verdict in campaign.read(first) if not verdict.noticed]
    else:
        mutants = campaign.sample(tree, arguments.seed, arguments.count)
    preload()
    files, seconds = test_files(tree), arguments.directed
    covered = measure(tree, scratch, files, arguments.file_seconds) if seconds is None else None
    results = last if arguments.again else first
    judged = len(campaign.read(results))
    for number, mutant in enumerate(mutants[judged:], judged):
        if covered is None:
            verdict = campaign.judge_directed(tree, scratch, files, mutant, number, seconds)
        else:
            verdict = campaign.judge(tree, scratch, covered, mutant, number)
        campaign.append(results, verdict)
        print(f"{number + 1}/{len(mutants)} {verdict.ended}: {mutant.file}:{mutant.line} {mutant.kind}", flush=True)
    print(campaign.table(campaign.read(results)))


def test_files(tree: Path) -> list[str]:
    """The quick tests that are asked, relative to the tree."""
    paths = sorted(path for folder in FOLDERS for path in (tree / folder).glob("test_*.py"))
    return [path.relative_to(tree).as_posix() for path in paths if not path.name.startswith(SKIPPED)]


def _copy(tree: Path) -> None:
    """The checkout's tracked files as they are now; compiled, since runs with a mutant compile nothing."""
    shutil.rmtree(tree, ignore_errors=True)
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "dopd", "lab"], cwd=tree, check=True)


if __name__ == "__main__":
    main()
