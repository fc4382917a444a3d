"""Put the types of TensorRT 10 in build/stubs, where mypy finds them; TensorRT is not needed.

They are those of `tensorrt-stubs` on PyPI, whose requirements (TensorRT itself) are left out. Three
things in them are no Python, and are mended.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "10.13.0.35.1"
ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "build" / "stubs"
STAMP = STUBS / VERSION
MENDS = (
    (r"\bin: ", "input_: "),  # a parameter called as a keyword
    (r"channel_axis: int\)", "channel_axis: int = ...)"),  # behind others with defaults
    (r"^import tensorrt_libs.*$", ""),  # the libraries
)


def main() -> None:
    """Fetch and mend them, unless they are there."""
    if STAMP.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"tensorrt-stubs=={VERSION}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, wanted], check=True)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(STUBS, [n for n in archive.namelist() if n.endswith(".pyi")])
    for path in STUBS.rglob("*.pyi"):
        text = path.read_text(encoding="utf-8")
        for pattern, mended in MENDS:
            text = re.sub(pattern, mended, text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    STAMP.touch()


if __name__ == "__main__":
    main()
