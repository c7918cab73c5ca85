"""The report of scale studies, on a synthetic study: all that was observed is on the page, and nothing from outside."""

import base64
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from megatron_depthattn.study import fit
from megatron_depthattn.study.report import write_report
from megatron_depthattn.study.report_data import read_record

RUNGS = {"d4": (4, 96, 412_000), "d6": (6, 144, 1_390_000), "d8": (8, 192, 3_300_000)}
GAIN = {"vanilla": 1.0, "depth_attention": 1.15, "denseformer": 1.05, "mhc": 1.0, "looped": 0.8}
STEP = {"vanilla": 1.0, "depth_attention": 1.03, "denseformer": 1.08, "mhc": 1.3, "looped": 1.0}
BUDGETS, SEEDS, STEPS = (10.0, 20.0), (1, 2, 3), 40
UNFINISHED, NOT_STARTED = "d8/looped/x20/seed3", "d8/mhc/x20/seed3"


def law(size: float, tokens: float) -> float:
    return 1.7 + 60.0 / size**0.3 + 150.0 / tokens**0.33


def write_study(folder: Path) -> Path:
    """Plan, results and run directories of a ladder that follows `law`, a gain in tokens a method, and noise."""
    rng = np.random.default_rng(7)
    plan = {
        "study": "cpu",
        "title": "Depth-Attention & others <on CPU> ![](https://a.example)",
        "question": "Is it worth it?",
        "baseline": "vanilla",
        "confidence": 0.9,
    }
    plan |= {"rungs": [], "points": []}
    results: dict = {"results": [], "timing": {}, "timing_source": "interleaved steps, median of 40 rounds"}
    for rung, (layers, width, size) in RUNGS.items():
        shape = {"num_layers": layers, "hidden_size": width, "size": size, "parameters": size + 100_000}
        plan["rungs"].append({"rung": rung, **shape, "learning_rate": 3e-3, "global_batch_size": 8})
        results["timing"][rung] = {
            m: {"seconds_per_step": 0.04 * t, "ratio": t, "low": t - 0.01, "high": t + 0.01} for m, t in STEP.items()
        }
        noise = {(budget, seed): rng.normal(0, 0.01) for budget in BUDGETS for seed in SEEDS}
        for method, budget, seed in ((m, b, s) for m in GAIN for b in BUDGETS for s in SEEDS):
            name, tokens = f"{rung}/{method}/x{budget:g}/seed{seed}", int(size * budget)
            point = {"id": name, "rung": rung, "method": method, "tokens_per_parameter": budget, "seed": seed}
            point |= {"size": size, "parameters": size + 100_000 + len(method), "tokens": tokens, "steps": STEPS}
            point |= {"flops": 6.0 * size * tokens * (1 + 0.01 * len(method)), "world": 2}
            plan["points"].append(point)
            if name == NOT_STARTED:
                continue
            loss = law(size, tokens * GAIN[method]) + noise[budget, seed] + rng.normal(0, 0.002)
            done = 17 if name == UNFINISHED else STEPS
            write_record(folder / "runs" / name, point, loss, done, rng)
            results["results"].append(
                {"id": name, "finished": done == STEPS, "step": done, "loss": loss if done == STEPS else None}
                | {"initial_loss": 7.2, "seconds": 0.04 * STEP[method] * done + 0.1 * seed, "commit": "abc1234"}
                | {"code": f"c0de{seed}", "machine": "2 CPU cores", "date": "2026-11-22"}
                | {"reason": None if done == STEPS else "step 17 of 40, node failed"}
            )
    for name, content in (("plan", plan), ("results", results), ("fit", fit_of(plan, results))):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_record(folder: Path, point: dict, loss: float, done: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    layers = range(2, RUNGS[point["rung"]][0], 2)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, done + 1):
            part = step / STEPS
            now = loss + (7.2 - loss) * (1 - part) ** 3
            record = {"step": step, "loss": now + rng.normal(0, 0.05), "tokens": int(point["tokens"] * part)}
            record |= {"eval_loss": now if step % 5 == 0 else None, "depth": None}
            if point["method"] == "depth_attention" and step % 10 == 0:
                depth = {}
                for layer in layers:
                    sources = list(range(0, layer, 2))
                    mine = 1 - 0.5 * part - 0.01 * layer
                    weights = [*[(1 - mine) / len(sources)] * len(sources), mine]
                    depth[str(layer)] = {"sources": sources, "weights": weights, "entropy": 0.5, "collapsed": 0.0}
                record["depth"] = {"tokens": 1024, "layers": depth}
            file.write(json.dumps(record) + "\n")


def between(value: float, width: float) -> dict:
    return {"value": value, "low": value - width, "high": value + width}


def fit_of(plan: dict, results: dict) -> dict:
    """A fit in the documented format: the pairs are those of the results, the rest is the truth of the fixture."""
    losses = {result["id"]: result["loss"] for result in results["results"] if result["finished"]}
    sizes, others = {rung["rung"]: rung["size"] for rung in plan["rungs"]}, list(GAIN)[1:]
    differences, multipliers = [], {}
    for rung, method, budget in ((r, m, b) for r in RUNGS for m in others for b in BUDGETS):
        pairs = []
        for seed in SEEDS:
            mine, theirs = (f"{rung}/{name}/x{budget:g}/seed{seed}" for name in (method, "vanilla"))
            if mine in losses:
                pair = {"seed": seed, "baseline": losses[theirs], "loss": losses[mine]}
                pairs.append(pair | {"difference": losses[mine] - losses[theirs]})
        mean = float(np.mean([pair["difference"] for pair in pairs]))
        entry = {"rung": rung, "tokens_per_parameter": budget, "tokens": int(sizes[rung] * budget), "method": method}
        differences.append(entry | {"pairs": pairs, "mean": mean, "low": mean - 0.004, "high": mean + 0.004})
    for method in others[:-1]:
        kinds = {"equal_tokens": GAIN[method], "equal_time": GAIN[method] / STEP[method]}
        rungs = {rung: {kind: between(value, 0.08) for kind, value in kinds.items()} for rung in RUNGS}
        conclusion = "better" if GAIN[method] > 1 else "worse"
        sentence = f"{conclusion}. vanilla needs {GAIN[method]:.2f} × the tokens for the same loss."
        overall = {kind: between(value, 0.04) for kind, value in kinds.items()}
        multipliers[method] = overall | {"rungs": rungs, "conclusion": conclusion, "sentence": sentence}
    unknown = {"conclusion": "no difference shown", "reason": "two of its runs are missing"}
    multipliers[others[-1]] = unknown | {"sentence": "no difference shown. Not known: two of its runs are missing."}
    truth = {"E": 1.7, "A": 60.0, "alpha": 0.3, "B": 150.0, "beta": 0.33}
    laws: dict = {method: {k: between(v, 0.1 * v) for k, v in truth.items()} | {"rmse": 0.004} for method in GAIN}
    laws["mhc"] = {"reason": "three sizes are needed"}
    held_out = {"rung": "d8", "methods": {}}
    for method in list(GAIN)[:3]:
        measured = losses[f"d8/{method}/x20/seed1"]
        entry = {"tokens": sizes["d8"] * 20, "predicted": between(measured - 0.012, 0.01), "measured": measured}
        held_out["methods"][method] = [entry | {"missed_by": 0.012}]
    fit = {"baseline": "vanilla", "confidence": 0.9, "resamples": 400, "num_observations": len(losses)}
    fit |= {"form": "L = E + A/N^alpha + B/D^beta, Huber loss", "laws": laws, "held_out": held_out}
    return fit | {"differences": differences, "multipliers": multipliers}


class Page(HTMLParser):
    """What a reader of the page sees, and all that a browser might fetch for it."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.images: list[list[tuple[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.images += [attrs] if tag == "img" else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    def row(self, *first: str) -> list[str]:
        (row,) = (row for row in self.cells if row[: len(first)] == list(first))
        return row


def outside(text: str) -> list[str]:
    """What the page would fetch: every address in it that is not a place in the page or data."""
    parts = Page(text).attributes
    names = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background")
    found = [value for _, name, value in parts if name in names and not value.startswith(("#", "data:"))]
    found += [
        address for address in re.findall(r"url\(\s*['\"]?([^)]*)", text) if not address.startswith(("#", "data:"))
    ]
    return found + re.findall(r"@import.*|<script.*", text)


def study_of(folder: Path) -> dict:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "results", "fit")}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"))
    write_report(folder, figures_dir=folder / "figures")
    return folder


@pytest.fixture(scope="module")
def page(study):
    return (study / "report.html").read_text()


def test_every_observation_is_on_the_page(study, page):
    data, read = study_of(study), Page(page)
    results = {result["id"]: result for result in data["results"]["results"]}
    for point in data["plan"]["points"]:
        row, result = read.row(point["id"]), results.get(point["id"], {})
        assert int(row[3].replace(",", "")) == point["tokens"]
        assert int(row[4].replace(",", "")) == point["parameters"]
        assert float(row[5]) == pytest.approx(point["flops"], rel=5e-3)
        assert row[1] == "none" if result.get("loss") is None else abs(float(row[1]) - result["loss"]) < 6e-5
        assert not result or abs(float(row[6]) - result["seconds"]) < 0.06
        assert row[7:9] == [result.get("commit", ""), result.get("code", "")]


def test_every_difference_and_multiplier_is_on_the_page_and_differences_in_the_markdown(study, page):
    data, read, markdown = study_of(study), Page(page), (study / "report.md").read_text()
    table = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| d")]
    for entry in data["fit"]["differences"]:
        for cells in (read.cells, table):
            (row,) = (
                row
                for row in cells
                if row[:2] == [entry["rung"], entry["method"]] and f"({entry['tokens_per_parameter']:g})" in row[2]
            )
            assert [float(v) for v in re.findall(r"[-+][\d.]+", row[3])] == pytest.approx(
                [entry["mean"], entry["low"], entry["high"]], abs=6e-5
            )
            pairs = [[float(value) for value in re.findall(r"[-+]?[\d.]+", part)] for part in row[4].split(";")]
            assert pairs == [pytest.approx(list(pair.values()), abs=6e-5) for pair in entry["pairs"]]
    for method in list(GAIN)[1:-1]:
        whole = data["fit"]["multipliers"][method]
        for level, entry in {"all runs": whole, **whole["rungs"]}.items():
            row = read.row(method, level)
            for text, kind in zip(row[2:4], ("equal_tokens", "equal_time"), strict=True):
                found = [float(v) for v in re.findall(r"[\d.]+", text)]
                assert found == pytest.approx(list(entry[kind].values()), abs=6e-4)


def test_conclusions_of_losers_reasons_and_unfinished_runs_are_shown(study, page):
    read, data = Page(page), study_of(study)
    words = " ".join(read.words)
    for text in (words, (study / "report.md").read_text()):
        for method, entry in data["fit"]["multipliers"].items():
            assert f"{method}: {entry['conclusion']}." in text
            assert entry["sentence"].removeprefix(f"{entry['conclusion']}. ") in text
        assert "two of its runs are missing" in text
        assert "88 of 90 planned runs are finished" in text
    assert (read.row(UNFINISHED)[2], read.row(NOT_STARTED)[2]) == ("step 17 of 40, node failed", "not started")
    assert "three sizes are needed" in words


def test_nothing_is_fetched(page):
    assert outside(page) == []
    for control in (
        '<script src="x.js"></script>',
        '<img src="https://a.example/x.png">',
        '<link rel="stylesheet" href="//a.example/x.css">',
        "<style>@import 'https://a.example/x.css'</style>",
        "<style>p { background: url(https://a.example/x.png) }</style>",
        '<svg><image xlink:href="x.png"/></svg>',
    ):
        assert outside(page.replace("</body>", control + "</body>")), control


def test_figures_are_well_formed_and_named(study, page):
    images = [dict(attributes) for attributes in Page(page).images]
    # curves, gaps, laws, differences and depth weights of each rung; multipliers
    assert len(images) == 5 * len(RUNGS) + 1 and all(shown["alt"] for shown in images)
    for shown in images:
        xml.etree.ElementTree.fromstring(base64.b64decode(shown["src"].partition("base64,")[2]))
    files = {file.name: file.read_bytes() for file in (study / "figures").glob("*.svg")}
    assert {"fit-d4.svg", "curves-d4.svg", "multipliers.svg"} <= files.keys() and len(files) == len(images)
    markdown = (study / "report.md").read_text()
    assert markdown.startswith("# Depth-Attention & others \\<on CPU\\> !\\[\\](https://a.example)\n")
    shown = re.findall(r"^!\[.*\]\((.*)\)$", markdown, flags=re.MULTILINE)
    assert len(shown) == len(files) and all((study / path).is_file() for path in shown)


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(study, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(study, copy)
    before = [(copy / name).read_bytes() for name in ("report.html", "report.md")]
    assert [path.read_bytes() for path in write_report(copy, figures_dir=copy / "figures")] == before
    for text in before:
        assert str(study).encode() not in text and b"/tmp" not in text


def edit(folder: Path, name: str, change) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def other_loss(results: dict) -> None:
    results["results"][20]["loss"] += 0.001


ERRORS = {
    "no plan": (lambda f: (f / "plan.json").unlink(), "no plan.json: run `plan`"),
    "no results": (lambda f: (f / "results.json").unlink(), "no results.json: run `run`"),
    "no fit": (lambda f: (f / "fit.json").unlink(), "no fit.json: run `fit`"),
    "torn": (lambda f: (f / "fit.json").write_text('{"baseline"'), "fit.json is not JSON"),
    "a key": (lambda f: edit(f, "fit.json", lambda c: c.pop("differences")), "lacks 'differences'"),
    "an earlier version": (
        lambda f: edit(f, "fit.json", lambda c: c["multipliers"]["mhc"].update(verdict="better")),
        "fit.json is of an earlier version: run `fit` again",
    ),
    "an older fit": (lambda f: edit(f, "results.json", other_loss), "from other results"),
    "one more in the fit": (
        lambda f: edit(f, "results.json", lambda c: c["results"][20].update(loss=None)),
        "from other results than those in results.json: run `fit` again",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_missing_or_does_not_fit_is_an_error_of_one_line(study, tmp_path, case):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    (folder / "report.html").unlink()
    spoil, message = ERRORS[case]
    spoil(folder)
    with pytest.raises(ValueError) as error:
        write_report(folder)
    assert message in str(error.value) and "\n" not in str(error.value) and str(folder) not in str(error.value)
    assert not (folder / "report.html").exists()


def test_a_study_of_which_nothing_is_known_is_shown_as_such(study, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    data = study_of(study)
    data["results"].update(results=[], timing={}, timing_source="not timed yet")
    data["fit"].update(laws={"vanilla": {"reason": "no run is finished"}}, differences=[], num_observations=0)
    data["fit"].update(held_out={"reason": "nothing to hold out"}, multipliers={})
    for name, content in data.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    words = " ".join(Page(write_report(folder)[0].read_text()).words)
    for text in ("0 of 90 planned", "No rung held out: nothing to hold out.", "no run is finished", "not timed yet"):
        assert text in words
    assert "No run has recorded depth weights." in words and words.count("no finished run.") == len(GAIN) - 1


def test_a_folder_without_the_runs_records_has_all_but_their_curves(study, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    shutil.rmtree(folder / "runs")
    page = Page(write_report(folder)[0].read_text())
    assert (
        "The runs' records are not in this folder." in " ".join(page.words) and len(page.images) == 2 * len(RUNGS) + 1
    )


def test_what_the_fit_writes_is_shown(study, tmp_path):
    """The fit's own fit.json, sentences and reasons included: a step time is missing, and two rungs predict none."""
    shutil.copytree(study, tmp_path / "study")
    data = study_of(study)
    losses = {result["id"]: result["loss"] for result in data["results"]["results"] if result["finished"]}
    keys = ("rung", "method", "seed", "size", "tokens", "tokens_per_parameter")
    points = [point for point in data["plan"]["points"] if point["id"] in losses]
    runs = [fit.Observation(**{key: point[key] for key in keys}, loss=losses[point["id"]]) for point in points]
    ratios = {(rung, method): STEP[method] for rung in RUNGS for method in STEP if method != "mhc"}
    found = fit.fit_study(runs, baseline="vanilla", time_ratios=ratios, resamples=39)
    (tmp_path / "study/fit.json").write_text(json.dumps(found))
    read = Page(write_report(tmp_path / "study")[0].read_text())
    words = " ".join(read.words)
    assert found["multipliers"]["looped"]["conclusion"] == "worse" and found["held_out"]["reason"] in words
    for entry in found["multipliers"].values():
        assert entry["sentence"].removeprefix(f"{entry['conclusion']}. ") in words
    assert read.row("mhc", "all runs")[3] == f"none: {found['multipliers']['mhc']['equal_time']['reason']}"


def test_a_line_cut_off_in_writing_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"tokens": 8, "loss": 2.5, "eval_loss": null}\n{"tokens": 16, "lo')
    assert read_record(path)["train_loss"] == [(8, 2.5)]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_chromium_shows_it_and_asks_nobody(page, tmp_path):
    """Its own log of the network is the witness: of two frames, the page and a page that asks, only one has asked."""
    control = '<img src="http://study.invalid/x.png">'
    asking = page.replace("</body>", control + "</body>").replace("img-src data:", "img-src *")
    frames = "".join(f'<iframe src="{name}.html" width="1240" height="950"></iframe>' for name in ("page", "asking"))
    for name, text in (("page", page), ("asking", asking), ("both", frames)):
        (tmp_path / f"{name}.html").write_text(text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={tmp_path / 'both.png'}", f"--log-net-log={tmp_path / 'log.json'}"]
    subprocess.run([*command, f"file://{tmp_path / 'both.html'}"], check=True, capture_output=True, timeout=120)
    # The browser asks for updates of its own; what a page asks for carries where the page came from.
    asked = re.findall(r'_isolation_key":"file:.*?"url":"(https?:[^"]*)"', (tmp_path / "log.json").read_text())
    assert set(asked) == {"http://study.invalid/x.png"}
    pixels = image.imread(tmp_path / "both.png")
    assert pixels.shape[:2] == (2000, 1280) and len(np.unique(pixels[:950].reshape(-1, pixels.shape[2]), axis=0)) > 50
