"""Reports: tables against numpy, pages against a real HTML parser; knows no model."""

import builtins
import csv
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from trimtab.errors import ArtifactError, TrimtabError
from trimtab.evals import report

NASTY = """<script>alert("x")</script> & 'quotes' </td></table><img src=x onerror=alert(1)>"""


@dataclass(frozen=True)
class Arm:
    name: str
    scale: float | None
    prompts: list
    answers: list
    effects: list
    perplexities: list
    fluencies: list
    repetitions: list

    @property
    def effect(self):
        return float(np.mean(self.effects))

    @property
    def perplexity(self):
        return float(np.mean(self.perplexities))


@dataclass(frozen=True)
class Fit:
    value: float = 0.71
    r2: float = 0.93
    interval: tuple = (0.6, 0.8)

    def curve(self, scales):
        return np.tanh(np.asarray(scales) / 20)


@dataclass(frozen=True)
class Sweep:
    arms: list
    title: str = "A title"
    pnes: Fit | None = field(default_factory=Fit)

    @property
    def baseline(self):
        return self.arms[0]


def arm(name, scale, level, prompts, seed):
    random = np.random.default_rng(seed)
    n = len(prompts)
    return Arm(
        name,
        scale,
        prompts,
        [f"answer {i} of {name} at {scale}" for i in range(n)],
        (level + random.normal(size=n) / 10).tolist(),
        (random.uniform(8, 10, size=5) * (1 + abs(scale or 0) / 50)).tolist(),
        [*random.uniform(5, 6, size=n - 1).tolist(), None],  # an empty answer has no fluency
        random.uniform(0, 0.1, size=n).tolist(),
    )


def made(prompts=("What now?", NASTY, "And then?"), scales=(-16.0, -8.0, -4.0, -2.0, 2.0, 8.0)):
    prompts = list(prompts)
    arms = [arm("none", None, 0.4, prompts, 0)]
    for i, scale in enumerate(scales):
        arms.append(arm("edit", scale, 0.4 + scale / 40, prompts, 10 + i))
        arms.append(arm("random", scale, 0.4, prompts, 30 + i))
    arms.append(arm("flipped", 8.0, 0.2, prompts, 50))
    arms.append(arm("prompt", None, 0.7, prompts, 60))
    return Sweep(arms)


class Page(HTMLParser):
    """What a browser would make of a page: elements, text by table cell, attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def text():
    """The page of one sweep, drawn once."""
    return report.page(made())


# ---- tables --------------------------------------------------------------------------------------


def test_table_by_numpy():
    sweep = made()
    lines = report.table(sweep)
    base = np.mean(sweep.arms[0].perplexities)
    assert len(lines) == len(sweep.arms) and tuple(lines[0]) == report.COLUMNS
    for line, own in zip(lines, sweep.arms, strict=True):
        assert (line["arm"], line["scale"]) == (own.name, own.scale)
        assert line["effect"] == pytest.approx(np.mean(own.effects))
        error = np.std(own.effects, ddof=1) / math.sqrt(len(own.effects))
        assert line["interval"] == pytest.approx(1.96 * error)
        assert line["ratio"] == pytest.approx(np.mean(own.perplexities) / base)
        assert line["fluency"] == pytest.approx(np.mean(own.fluencies[:-1]))
        assert line["repetition"] == pytest.approx(np.mean(own.repetitions))
    assert lines[0]["ratio"] == 1 and lines[1]["ratio"] != 1


def test_a_single_prompt_has_no_interval():
    assert math.isnan(report.table(made(["only one"]))[0]["interval"])


def test_csv_reads_back(tmp_path):
    sweep = made()
    report.write_csv(sweep, tmp_path / "new" / "t.csv")
    with (tmp_path / "new" / "t.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for line, expected in zip(found, report.table(sweep), strict=True):
        assert line["scale"] == ("" if expected["scale"] is None else str(expected["scale"]))
        assert float(line["effect"]) == expected["effect"]
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["t.csv"]  # and nothing half written


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write .*choose another path"):
        report.write_csv(made(), tmp_path / "file" / "t.csv")


# ---- plots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "start"),
    [pytest.param(".png", b"\x89PNG", marks=pytest.mark.slow), (".svg", b"<?xml")],
)
def test_plot_is_the_same_every_time(tmp_path, suffix, start):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.plot(made(), tmp_path / f"a{suffix}")
    report.plot(made(), tmp_path / f"b{suffix}")
    first, second = ((tmp_path / f"{n}{suffix}").read_bytes() for n in "ab")
    assert first == second and first.startswith(start)
    other = replace(made(), arms=made().arms[:-1])  # control: without the prompt baseline
    report.plot(other, tmp_path / f"c{suffix}")
    assert (tmp_path / f"c{suffix}").read_bytes() != first
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "scales", [(), (4.0,), (0.01, 0.02, 0.03), tuple(2.0**i for i in range(9))]
)
def test_sweeps_of_any_size_are_drawn(tmp_path, scales):
    report.plot(made(scales=scales), tmp_path / "p.png")
    report.write_page(replace(made(scales=scales), pnes=None), tmp_path / "p.html")


@pytest.mark.slow
def test_the_plot_shows_its_numbers():
    drawn = report._drawn(made(), "svg", clear=True).decode()
    root = ElementTree.fromstring(drawn)
    texts = [e.text for e in root.iter() if e.tag.endswith("}text")]
    assert "PNES 0.710 [0.600, 0.800], r² 0.93" in texts
    for name in ("edit", "random direction", "flipped sign", "just asking"):
        assert name in texts


def test_without_matplotlib_there_is_a_remedy_and_still_a_page(tmp_path, monkeypatch, text):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TrimtabError, match=r"pip install 'trimtab\[evals\]'"):
        report.plot(made(), tmp_path / "p.png")
    page = report.page(made())
    assert "<svg" not in page and "trimtab[evals]" in page and "answer 2 of edit at 8.0" in page
    assert "<svg" in text  # control: the page drawn with it


def test_a_plot_of_another_kind_is_refused(tmp_path):
    with pytest.raises(TrimtabError, match=r"\.png, \.svg or \.pdf file, not .*p\.bmp"):
        report.plot(made(), tmp_path / "p.bmp")


# ---- pages ---------------------------------------------------------------------------------------


def test_prompts_and_answers_stay_text(tmp_path):
    sweep = made()
    sweep.arms[1].answers[0] = NASTY + "\ud800"  # half a character must not stop it either
    sweep = replace(sweep, title=NASTY)
    report.write_page(sweep, tmp_path / "p.html")
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "link", "object", "form"} & set(page.tags)
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert NASTY in page.cells and any(cell.startswith(NASTY + "?") for cell in page.cells)
    assert {"script", "img"} <= set(Page(NASTY).tags)  # control: unescaped it would be elements


def test_the_page_loads_nothing(text):
    page = Page(text)
    policy = next(v for t, n, v in page.attributes if t == "meta" and "default-src" in (v or ""))
    assert "default-src 'none'" in policy and "script" not in policy
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "data", "action"), (tag, name, value)
        if name.endswith("href"):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)


def test_every_answer_stands_in_its_column(text):
    sweep = made()
    for i, own in enumerate(sweep.arms):
        column = re.findall(rf'<td class="c{i}"><p>(.*?)</p>', text)
        assert column == own.answers
        assert f'id="c{i}"' in text and f"#c{i}:not(:checked)) .c{i}{{display:none}}" in text


def test_what_is_shown_first_is_the_best_that_is_still_fluent(text):
    sweep = made()
    shown = {int(i) for i in re.findall(r'id="c(\d+)" checked', text)}
    fluent = [
        a
        for a in sweep.arms
        if a.name == "edit" and a.perplexity <= 1.25 * sweep.arms[0].perplexity
    ]
    best = max(fluent, key=lambda a: a.effect)
    names = {(sweep.arms[i].name, sweep.arms[i].scale) for i in shown}
    alike = {(a.name, a.scale) for a in sweep.arms if a.scale == best.scale}
    assert names == alike | {("none", None), ("prompt", None)}
    assert len(shown) < len(sweep.arms)


def test_conversations_are_shown_turn_by_turn():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<b>Yes</b>"}]
    assert "user: Hi\nassistant: &lt;b&gt;Yes" in report.page(made([turns, "b", "c"]))
