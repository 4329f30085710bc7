"""The report of runs: one page that needs nothing else, whatever the runs hold."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from agents.cli import main
from agents.runs.curves import MOST_POINTS, line_of, smoothed, thinned
from agents.runs.report import MOST_TOKENS, by_seed, episodes, report
from agents.runs.run_files import read_run, times

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '<script>document.title="taken"</script><img src=x onerror="document.title=1">{{ 7*7 }} $\\frac$'
FIGURES = ("value", "return", "reward", "advantage", "kl", "entropy", "probability", "ratio")


def write_run(directory: Path, seed: int = 0, iterations: int = 40, words: str = " good", **config: Any) -> Path:
    """A run as a training leaves it, but for weights."""
    directory.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    options = {"algo": "ppo", "model": "builtin", "seed": seed, "total_timesteps": 100 * iterations, **config}
    (directory / "config.yaml").write_text(yaml.safe_dump({**options, "env": {"reward": "builtin+sentiment"}}))
    names = ("objective/scores", "objective/gold_score", "objective/kl", "train/clip_fraction", "objective/reward/a<b>")
    with (directory / "progress.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["time/total_timesteps", "objective/kl_coef", *names])
        writer.writeheader()
        for i in range(iterations):
            row = {name: np.log1p(i) + 0.1 * generator.normal() for name in names}
            writer.writerow({"time/total_timesteps": 100 * (i + 1), "objective/kl_coef": 0.04, **row})
    with (directory / "samples.jsonl").open("w") as file:
        for time in range(0, 100 * iterations + 1, 500):
            row = {"timesteps": time, "prompt": "The movie", "completion": words, "score": time / 1000}
            file.write(json.dumps({**row, "finish_reason": "eos"}) + "\n")
    with (directory / "episodes.jsonl").open("w") as file:
        for time in range(100, 100 * iterations + 1, 500):
            figures = {name: generator.normal(size=3).round(3).tolist() for name in FIGURES}
            row = {"timesteps": time, "prompt": "The movie", "completion": words, "score": 1.5, **figures}
            file.write(json.dumps({**row, "tokens": [" was", words, "<eos>"], "finish_reason": "eos"}) + "\n")
    return directory


class Page(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_command_writes_one_file_that_refers_to_no_other(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    assert len(text) < 5_000_000
    assert page.all("link") == page.all("iframe") == page.all("img") == []
    assert all("src" not in script for script in page.all("script"))
    references = [a.get("href") or "" for a in page.all("a")] + [u.get("xlink:href") or "" for u in page.all("use")]
    assert len(references) > 20
    assert all(reference.startswith("#") for reference in references)
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(meta["content"] for meta in page.all("meta") if "content" in meta and "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_everything_that_a_run_holds_is_on_the_page(tmp_path: Path) -> None:
    page = report([read_run(write_run(tmp_path / "run"))])
    for title in (
        "Score (trained on)",
        "Gold score (only measured)",
        "Part of the reward: a&lt;b&gt;",
        "Clip fraction",
    ):
        assert f">{title}</figcaption>" in page
    assert "score per nat" in page  # the unit of β
    assert re.search(r'aria-label="score over tokens \(thousands\)\. [^"]*run: from -?[\d.]+ to [\d.]+\."', page)
    assert "textrlhf train --config" in page
    assert "reward: builtin+sentiment" in page
    assert 'data-n="' in page
    assert "after 4,000 tokens" in page


def test_what_files_say_is_never_an_element_or_a_template(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", words=HOSTILE, model=HOSTILE, algo=HOSTILE)
    with (run / "progress.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    rows[0][-1] += HOSTILE  # the name of a column
    with (run / "progress.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    text = report([read_run(run)], title=HOSTILE)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert "{{ 7*7 }}" in text


def test_runs_that_differ_in_the_seed_alone_are_one_line_with_a_band(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"ppo-{seed}", seed)) for seed in range(3)]
    other = read_run(write_run(tmp_path / "grpo", algo="grpo"))
    groups = by_seed([*runs, other])
    assert [len(group) for group in groups.values()] == [3, 1]
    assert list(groups) == [f"{tmp_path}/ppo (3 seeds)", str(tmp_path / "grpo")]
    line = line_of([run.curve("objective/scores") for run in runs], 0, "ppo")
    assert line is not None
    assert line.low is not None
    assert line.high is not None
    assert (line.low <= line.y).all()
    assert (line.y <= line.high).all()
    assert (line.low < line.high).any()
    text = report([*runs, other])
    assert text.count('type="checkbox"') == 2
    assert 'class="line-0"' in text
    assert 'class="line-1"' in text


def test_a_run_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "run"))
    assert main(["report", run, run]) == 1
    assert "Expected every run once" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "Expected the directory of a run, which has a config.yaml" in capsys.readouterr().out


def test_a_run_that_has_only_begun_and_one_without_episodes_have_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("progress.csv", "samples.jsonl", "episodes.jsonl"):
        (run / name).unlink()
    text = report([read_run(run)])
    for said in ("No iteration has been finished yet.", "No texts have been written yet.", "no episodes.jsonl"):
        assert said in text


def test_half_a_line_is_left_out_and_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=4)
    for name in ("progress.csv", "samples.jsonl", "episodes.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"timeste' if name != "progress.csv" else "500,0.0")
    read = read_run(run)
    assert read.timesteps == 400
    assert {row["timesteps"] for row in read.samples} == {0}
    (run / "samples.jsonl").write_text('{"timesteps": "soon"}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1, to be a row with"):
        read_run(run)


def test_of_long_runs_there_are_as_many_points_texts_and_tokens_as_there_is_room_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=3000)
    rows = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    long = [{**row, "tokens": ["x"] * 4000, **{name: [0.5] * 4000 for name in FIGURES}} for row in rows]
    (run / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    read = read_run(run)
    assert sum(len(episode["tokens"]) for episode in episodes([read])) <= MOST_TOKENS
    text = report([read])
    assert len(text) < 5_000_000
    line = line_of([read.curve("objective/scores")], 0, "run")
    assert line is not None
    assert len(line.x) == MOST_POINTS
    assert times(read.samples, 8)[0] == 0
    assert times(read.samples, 8)[-1] == 300_000


def test_smoothing_takes_means_of_neighbours_and_leaves_a_straight_line_alone() -> None:
    line = np.arange(90.0)
    assert smoothed(line) == pytest.approx(line)
    assert smoothed(line**2)[45] == pytest.approx(np.mean(np.arange(42.0, 49.0) ** 2))
    assert smoothed(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]
    assert thinned(np.arange(1000.0), 10).tolist() == [49.5 + 100 * i for i in range(10)]


# ---- in a browser --------------------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    runs = [write_run(root / f"ppo-{seed}", seed) for seed in range(2)] + [write_run(root / "grpo", algo="grpo")]
    assert main(["report", *map(str, runs), "--out", str(root / "report.html")]) == 0
    hostile = write_run(root / "hostile", words=HOSTILE)
    assert main(["report", str(hostile), "--out", str(root / "hostile.html")]) == 0
    return root


def browse(*options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0")
    return subprocess.run([CHROMIUM, *quiet, *options], capture_output=True, text=True, timeout=120)


def answer(page: Path, script: str, width: int = 1280) -> Any:
    """What a script returns in the page, once it has loaded: in the title of a copy without the page's policy, which
    would not let it run."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    asking = page.with_name(f"asking-{page.name}")
    asked = f"<script>document.title = JSON.stringify((() => {{ {script} }})())</script>"
    asking.write_text(text.replace("</body>", asked + "</body>"))
    done = browse("--dump-dom", f"--window-size={width},1000", f"file://{asking}")
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@in_a_browser
@pytest.mark.parametrize("width", [1280, 500])
def test_the_browser_has_nothing_to_complain_of_and_draws_the_page(pages: Path, width: int) -> None:
    shot = pages / f"report-{width}.png"
    done = browse(f"--window-size={width},2000", f"--screenshot={shot}", f"file://{pages / 'report.html'}")
    assert re.findall(r".*CONSOLE.*", done.stderr) == []
    image = np.asarray(Image.open(shot).convert("L"))
    assert image.shape == (2000, width)
    assert image.std() > 5  # it is not blank


@in_a_browser
def test_a_hostile_text_runs_nothing_and_is_shown_as_it_is(pages: Path) -> None:
    done = browse("--dump-dom", f"file://{pages / 'hostile.html'}")
    assert re.findall(r".*CONSOLE.*", done.stderr) == []
    assert "<title>taken" not in done.stdout
    assert "run report</title>" in done.stdout
    assert answer(pages / "hostile.html", "return document.querySelectorAll('.text img, .text script').length") == 0


@in_a_browser
def test_whatever_can_be_chosen_is_an_element_with_a_label_that_the_keyboard_reaches(pages: Path) -> None:
    script = """
    const controls = [...document.querySelectorAll("select, input")];
    const visible = controls.filter((one) => one.checkVisibility());
    return {
      unlabelled: controls.filter((one) => !one.labels.length || !one.labels[0].textContent.trim()).length,
      unreachable: visible.filter((one) => { one.focus(); return document.activeElement !== one; }).length,
      selects: visible.filter((one) => one.tagName === "SELECT").length,
      radios: visible.filter((one) => one.type === "radio").length,
      clickable: document.querySelectorAll("[onclick]").length,
    };"""
    found = answer(pages / "report.html", script)
    assert found == {"unlabelled": 0, "unreachable": 0, "selects": 3, "radios": 6, "clickable": 0}


@in_a_browser
def test_the_arrow_keys_go_from_token_to_token_and_tell_all_figures(pages: Path) -> None:
    script = """
    const text = [...document.querySelectorAll(".tokens")].find((one) => one.checkVisibility());
    const press = (key) => text.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    press("ArrowRight"); press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
    return document.getElementById("told").textContent;"""
    told = answer(pages / "report.html", script)
    assert told.startswith('2 of 3 " good": ')
    assert all(f"{name} " in told for name in ("advantage", "value", "KL", "ratio", "entropy", "probability"))


@in_a_browser
def test_choosing_another_figure_colours_the_tokens_by_it(pages: Path) -> None:
    script = """
    const tokens = [...document.querySelectorAll(".episode:not([hidden]) [data-n]")];
    const colours = () => tokens.map((one) => one.style.background);
    const before = colours();
    document.querySelectorAll("[name=figure]")[4].click();
    return [before, colours(), document.getElementById("unit").textContent];"""
    before, after, unit = answer(pages / "report.html", script)
    assert before != after
    assert all(colour.startswith("rgba(") for colour in [*before, *after])
    assert unit == "entropy (nats)"


@in_a_browser
def test_a_line_can_be_hidden_and_other_texts_and_episodes_chosen(pages: Path) -> None:
    script = """
    const shown = (selector) => [...document.querySelectorAll(selector)].filter((one) => !one.hidden);
    const drawn = () => shown(".line-1").filter((one) => one.style.display !== "none").length;
    const texts = () => shown("[data-view]").map((one) => one.dataset.view);
    const choose = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
    const before = [drawn(), texts()];
    document.querySelector("[data-line='1']").click();
    choose(document.querySelector("[data-side='0']"), "3");
    choose(document.getElementById("episode"), "0");
    return [...before, drawn(), texts(), shown(".episode").map((one) => one.dataset.episode)];"""
    drawn, texts, hidden, chosen, shown = answer(pages / "report.html", script)
    assert drawn > 0
    assert hidden == 0
    assert texts == ["0", "7"]  # the first and the last of the first run
    assert chosen == ["3", "7"]
    assert shown == ["0"]


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_the_window_and_no_text_lies_on_another(pages: Path, width: int) -> None:
    script = """
    for (const details of document.querySelectorAll("details")) details.open = true;
    const overlapping = [];
    for (const svg of document.querySelectorAll("figure svg")) {
      const boxes = [...svg.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()])
        .filter(([, box]) => box.width);
      for (const [i, [one, a]] of boxes.entries())
        for (const [other, b] of boxes.slice(i + 1))
          if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
            overlapping.push([one, other]);
    }
    return [document.body.scrollWidth, overlapping];"""
    page = pages / f"narrow-{width}.html"  # chromium's own windows are not as narrow as a phone
    page.write_text((pages / "report.html").read_text().replace("<body>", f'<body style="width:{width}px">'))
    assert answer(page, script, max(width, 500)) == [width, []]
