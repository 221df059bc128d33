"""Documents name what is there: links, headings, files, functions; and the README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPO

SKIPPED = {".venv", "build", "dist", "node_modules"}
PAGES = sorted(
    path.relative_to(REPO).as_posix()
    for path in REPO.rglob("*.md")
    if not any(part in SKIPPED or (part.startswith(".") and part != ".") for part in path.relative_to(REPO).parts)
)
NAMED = re.compile(r"((?:intactkv_export|native|tests|benchmarks|docs|examples)/[\w./\-]*)(?::(\w+))?")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        n = found.get(name, 0)
        found[name] = n + 1
        result.add(name if n == 0 else f"{name}-{n}")
    return result


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in links(REPO / page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, wanted = set(), [REPO / "README.md"]
    while wanted:
        page = wanted.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        wanted += [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link]
    assert {path.relative_to(REPO).as_posix() for path in seen if path.is_file()} >= set(PAGES)


def named(page: str) -> Iterator[tuple[str, str]]:
    """Paths of the repository between backticks, and the function behind a colon or ""."""
    for code in re.findall(r"`([^`\n]+)`", prose(REPO / page)):
        if match := NAMED.fullmatch(code):
            yield match[1], match[2] or ""


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # what was may be gone
def test_named_files_and_functions_are_there(page: str) -> None:
    missing = []
    for path, function in named(page):
        file = REPO / path
        if not file.exists():
            missing.append(path)
        elif function:
            define = rf"(def|class) {function}\b" if file.suffix == ".py" else rf"\b{function}\("
            if not re.search(define, file.read_text(encoding="utf-8")):
                missing.append(f"{path}:{function}")
    assert not missing


# --- the README ---


def numbers(text: str) -> list[str]:
    """Numbers that stand alone: not parts of names (Q4_0, F16, x86-64, SmolLM2-135M), nor of links' targets."""
    text = re.sub(r"\]\([^)]*\)|https?://\S+", " ", text)
    words = (word.rstrip(".-") for word in re.findall(r"[\w.\-+]+", text))
    return [word for word in words if re.fullmatch(r"[+-]?\d[\d_.]*(x|s|ms)?", word)]


def test_numbers_are_counted() -> None:
    text = "Q4_0 at 3.5 and -0.2, `n=7`, [x](a/1.md) x86-64, 24 tokens, 12 %: 1.2x. SmolLM2-135M"
    assert numbers(text) == ["3.5", "-0.2", "7", "24", "12", "1.2x"]


def test_readme_is_short() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    assert len(numbers(text)) <= 15, numbers(text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert table.count("\n") - 2 <= 6, table  # without head and line
    assert re.search(r"^ +make demo\b", text, re.MULTILINE) and re.search(r"^ +make test\b", text, re.MULTILINE)


def test_measurements_are_tabled_in_one_place() -> None:
    """No table of figures outside of docs/results, but for the README's one."""
    for page in PAGES:
        names_have_versions = ("docs/reference/models.md", "docs/reference/templates.md")
        if page in ("README.md", *names_have_versions) or page.startswith("docs/results/"):
            continue
        for table in re.findall(r"(?:^\|.*\n)+", (REPO / page).read_text(encoding="utf-8"), re.MULTILINE):
            decimals = [n for n in numbers(table) if "." in n]
            assert len(decimals) <= 2, (page, table)
