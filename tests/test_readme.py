"""README.md keeps its word: its Python runs, in order, as one program, and the files that it points to are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_snippets_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = README.read_text()
    snippets = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(snippets) >= 4 and len(snippets) == text.count("```py")
    names: dict[str, object] = {"__name__": "readme"}
    for snippet in snippets:
        lines_above = text[: snippet.start(1)].count("\n")  # so that a traceback names the line of README.md
        exec(compile("\n" * lines_above + snippet[1], README, "exec"), names)


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README.read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing, missing
