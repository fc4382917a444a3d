"""Mirror the package-dir mapping as symlinks in build/typing, where a type checker finds it."""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typing"


def main() -> None:
    """Rebuild the tree from pyproject.toml."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shutil.rmtree(TREE, ignore_errors=True)
    for name, folder in tool["package-dir"].items():
        for source in (ROOT / folder).rglob("*.py*"):
            if "__pycache__" in source.parts:
                continue
            link = TREE.joinpath(*name.split("."), source.relative_to(ROOT / folder))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)


if __name__ == "__main__":
    main()
