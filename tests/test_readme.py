"""The README's Python examples run, in order, as a user would paste them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_seven_examples():
    assert len(BLOCKS) == 7
    assert not re.findall(r"^[A-Z]+_[A-Z]+$", README.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README example {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "row 0: When at resid@5:22" in printed
    assert (tmp_path / "happiness-edit" / "artifact.json").is_file()
