"""What the documents show is what is there: examples run, messages exist, generated pages are up to date."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, blocks

import skipvision_train
from skipvision_train import inference, plans
from skipvision_train.config import api_reference

DOCS = ROOT / "docs"


def test_examples_of_concepts_run():
    code = "\n".join(block.text for block in blocks("docs/concepts.md") if block.language == "python")
    test = doctest.DocTestParser().get_doctest(code, {}, "docs/concepts.md", None, 0)
    assert len(test.examples) > 20
    said: list[str] = []
    failed = doctest.DocTestRunner().run(test, out=said.append).failed
    assert not failed, "".join(said)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_is_python(document):
    for block in blocks(document):
        if block.language == "python" and document != "docs/api.md" and not block.text.startswith(">>> "):
            ast.parse(block.text)


def test_the_quick_start_in_python(folder, capsys):
    (block,) = (block for block in blocks("docs/quickstart.md") if block.language == "python")
    exec(compile(block.text, "docs/quickstart.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    page = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{document}: {target}"
        assert not anchor or anchor in anchors(found), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    """``docs/x.md``, ``tests/...``, ``benchmarks/...`` and ``conf/...`` in running text."""
    for path in re.findall(r"`((?:docs|tests|benchmarks|launch)/[\w./-]+\.\w+)`", (ROOT / document).read_text()):
        assert (ROOT / path).exists(), f"{document}: {path}"


def test_the_readme_lists_every_document():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in sorted(DOCS.glob("*.md")) if f"docs/{page.name}" not in text] == []


# --- messages -------------------------------------------------------------------------------------------------------


@cache
def texts() -> list[str]:
    """Every string of the package; what is filled in is a NUL."""
    found = []
    for file in (ROOT / "skipvision_train").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def exists(message: str) -> bool:
    """Some string has the fixed parts of a message, in this order."""
    parts = [part for part in message.split("...") if part]
    return any(in_order(parts, text) for text in texts())


def in_order(parts: list[str], text: str) -> bool:
    end = 0
    for part in parts:
        if (start := text.find(part, end)) < 0:
            return False
        end = start + len(part)
    return True


def quoted(document: str) -> list[str]:
    """The first column of tables whose header begins with ``message``."""
    found: list[str] = []
    inside = False
    for line in (ROOT / document).read_text().splitlines():
        inside = line.startswith("| message") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| message", "|---")):
            cell = re.match(r"\| `([^`]+)` \|", line)
            assert cell is not None, f"{document}: {line}"
            found.append(cell[1])
    return found


@pytest.mark.parametrize("document", ["docs/troubleshooting.md", "docs/inference.md"])
def test_quoted_messages_exist(document):
    messages = quoted(document)
    assert len(messages) > 5
    if document == "docs/inference.md":  # as they are printed: with numbers, and with the marker
        messages = [re.sub(r"\d+|<image>", "...", message) for message in messages]
    assert [message for message in messages if not exists(message)] == []


def test_a_message_that_is_gone_is_found():
    assert exists("plan.method: ... is unknown; use ...")
    assert not exists("plan.method: ... is unheard of; use ...")
    assert not exists("is unknown; use ... plan.method")


# --- generated ------------------------------------------------------------------------------------------------------


def test_the_api_reference_is_up_to_date():
    assert (DOCS / "api.md").read_text() == api_reference.markdown(), "run make reference"


def test_the_api_reference_knows_every_exported_name():
    for module in (skipvision_train, inference, plans):
        assert api_reference.exported(module.__name__) == sorted(module.__all__, key=str.lower)
        for name in module.__all__:
            source, node = api_reference.origin(module.__name__, name)
            assert getattr(importlib.import_module(source), name) is getattr(module, name)
            assert isinstance(node, ast.Assign | ast.AnnAssign) or ast.get_docstring(node)


def test_prose_by_hand():
    text = (
        "Does ``x``; see :class:`Y`.\n\nArgs:\n    a: one,\n        two.\n    b: 3.\n\nRaises:\n    Z: never.\n\nMore."
    )
    assert "\n".join(line for line in api_reference._prose(text) if line) == (
        "Does `x`; see `Y`.\n*Args*\n* `a`: one,\n  two.\n* `b`: 3.\n*Raises*\n* `Z`: never.\nMore."
    )


def test_the_picture_is_up_to_date():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "images" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    rows = draw.read_rows(draw.RESULTS.read_text())
    assert set(rows) == set(draw.SHOWN)
    assert rows["V-Skip"][2] == (2, 70.0, 69.4, 65.9, 72.7)
    assert draw.PICTURE.read_text() == draw.draw(rows), "run make reference"
    assert draw.PICTURE.stat().st_size < 60_000
