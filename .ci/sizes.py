"""Print how long functions and files are: medians, ninth deciles, and the longest ones."""

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compiler", "passes", "backends", "kernels")


def code_lines(source: str, tree: ast.AST) -> set[int]:
    """Numbers of the lines that hold code: no blanks, comments or docstrings."""
    docs: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            docs |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return {n for n, line in lines if line.strip() and not line.strip().startswith("#")} - docs


def main() -> None:
    """Measure the product's folders."""
    files, functions = [], []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        lines = code_lines(source, tree)
        name = str(path.relative_to(ROOT))
        files.append((len(lines), name))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own = range(node.lineno, (node.end_lineno or 0) + 1)
                functions.append((len(lines & set(own)), f"{name}:{node.name}"))
    for title, sizes in (("files", files), ("functions", functions)):
        numbers = sorted(size for size, _ in sizes)
        decile = numbers[int(0.9 * (len(numbers) - 1))]
        print(f"{len(sizes)} {title}: {sum(numbers) if title == 'files' else ''} code lines, "
              f"median {statistics.median(numbers):g}, p90 {decile}, longest:")  # fmt: skip
        for size, name in sorted(sizes, reverse=True)[:6]:
            print(f"  {size:4d} {name}")


if __name__ == "__main__":
    main()
