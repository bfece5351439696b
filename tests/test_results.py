"""docs/RESULTS.md is what its script makes of bench/results, and the README quotes nothing that it lacks."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
UNITS = {"tok/s": "t/s", "GiB": "peak VRAM"}  # in the README, and the column on the page


def column(name: str) -> list[float]:
    """The numbers (without deviation or unit) below a heading of any of the page's tables before the kernels'."""
    found, at = [], None
    for line in PAGE.split("## Kernels")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            at = None
        elif name in cells:
            at = cells.index(name)
        elif at is not None and (match := re.match(r"[\d.]+", cells[at])):
            found.append(float(match[0]))
    return found


def test_the_page_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "bench" / "make_results.py"))
    assert script["page"]() == PAGE, "run: python bench/make_results.py"


def test_pictures_that_the_page_shows_are_there() -> None:
    for link in re.findall(r"\]\((pictures/[^)]*)\)", PAGE):
        assert (ROOT / "docs" / link).stat().st_size < 500_000, link


def test_performance_part_of_the_readme_has_numbers() -> None:
    assert len(quoted()) > 4


def quoted() -> list[tuple[str, str]]:
    """Numbers with their units above the README's first section."""
    return re.findall(r"(\d+(?:\.\d+)?) (tok/s|GiB)", README.split("\n## ")[0])


@pytest.mark.parametrize(("number", "unit"), quoted())
def test_the_page_has_what_the_readme_quotes(number: str, unit: str) -> None:
    digits = len(number.partition(".")[2])
    assert any(f"{value:.{digits}f}" == number for value in column(UNITS[unit])), f"{number} {unit}"
