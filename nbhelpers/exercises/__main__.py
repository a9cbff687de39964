"""``python -m nbhelpers.exercises 02_ada.ipynb 02_ben.ipynb``: count the right answers in executed notebooks."""

import re
import sys
from pathlib import Path

import nbformat


def right_answers(path: Path) -> list[bool]:
    """Return for each exercise of an executed notebook, in order, whether its check printed "Right"."""
    cells = nbformat.read(path, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code" and "exercise" in cell.metadata.get("tags", [])]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    return [bool(re.search(r"^Right: ", text, re.MULTILINE)) for text in printed]


def main(paths: list[str]) -> None:
    """Print one line per notebook: how many answers are right, and which."""
    for path in paths:
        try:
            right = right_answers(Path(path))
        except (OSError, ValueError, nbformat.ValidationError) as error:
            print(f"{path}: cannot be read ({type(error).__name__})")
            continue
        numbers = ", ".join(str(number) for number, is_right in enumerate(right, 1) if is_right)
        print(f"{path}: {sum(right)} of {len(right)} right" + (f" ({numbers})" if numbers else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
