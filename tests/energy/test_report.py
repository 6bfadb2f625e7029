"""Reports: a page that parses and fetches nothing, says what was measured and what was modelled, and adds up."""

from __future__ import annotations

import csv
import json
import math
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from energy import cli
from energy.errors import ProfileError
from energy.report import charts
from energy.report.build import read, report_profile, report_run
from energy.report.run_data import Job, Round, Run
from energy.report.svg import linear_ticks, log_ticks, nice_end
from energy.report.tables import csv_text, rounded
from energy.report.units import amount, both_words
from energy.thor.layers import partition
from energy.thor.profile import Cost, Device, Family, Fitted, Mark, Point, Profile, Sample, Sensed, Whole, save_profile

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits.bundle"
HOSTILE = '<script>alert("x")</script>&\'"'
VOID = {"meta", "line", "br", "link", "img", "input", "hr"}
BOARD = {"sensor": "ina3221", "scope": "module", "quality": "power", "covers": "VDD_IN"}
MODEL = {"sensor": "modelled", "scope": "modelled", "quality": "modelled", "covers": "idle + k x utilisation"}


class Checker(HTMLParser):
    """Reads a page as a browser would and keeps its tags, attributes and text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def check(page):
    """A page that is whole, stands alone, and holds no NaN; gives its text with plain spaces."""
    found = Checker(page)
    assert found.open == []
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    style = re.search("<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "@import" not in style
    assert set(re.findall(r"url\((.*?)\)", page)) <= {
        f"#hatch-{name}" for name in ("train", "compress", "other", "radio")
    }
    text = " ".join(" ".join(found.texts).split())
    numbers = [value for name, value in found.attributes if name in ("x", "y", "cx", "cy", "width", "height", "d", "r")]
    for bad in ("nan", "inf", "none"):
        assert not [value for value in numbers if bad in value.lower()]
        assert not re.search(rf"(?<![a-z]){bad}(?![a-z])", text.lower().replace("there are none", ""))
    return text


def job(device="a", round_=0, **changes):
    values = {"device": device, "round": round_, "assignment": f"r{round_}-{device}", "status": "counted", **BOARD}
    return Job(**{**values, "train_joules": 2.0, "compress_joules": 0.25, "radio_modelled_joules": 0.5, **changes})


def modelled_job(device="m", round_=0, **changes):
    nothing = {"train_joules": None, "compress_joules": None}
    return job(device, round_, **{**nothing, **MODEL, "train_modelled_joules": 7.0, **changes})


def make_run(jobs, rounds=2, **changes):
    history = [Round(round=number, accuracy=0.5 + number / 10, updates=2, seconds=3.0) for number in range(rounds)]
    values = {"run": "r-1", "status": "finished", "rounds": rounds, "rounds_planned": rounds, "history": history}
    return Run(**{**values, "ledger": list(jobs), "accuracy": 0.6, "initial_accuracy": 0.1, "devices": 2, **changes})


def fitted(points):
    """A model as a fit leaves it, with one feature (the batch) and no steps."""
    one = {"block": 1.0, "columns": 0.0, "center": 3.0, "scale": 1.0, "length": 2.0, "signal": 0.5, "trend": 1.0}
    one |= {"noise": 0.05, "floor": 1e-6, "offset": -6.0}
    parameters = {name: [value] for name, value in one.items()}
    parameters |= {"steps": [], "step_length": [], "step_signal": [], "doubt": [1.0] * len(points)}
    return Fitted(parameters=parameters)


def make_profile(quantity="joules", **changes):
    points = [
        Point(
            sizes={"batch": 2**power, "in_channels": 8},
            costs={quantity: Cost(mean=1e-3 * 2**power, relative_error=0.01, repeats=3)},
        )
        for power in range(2, 8)
    ]
    values = {
        "device": Device(name="pi-7", board="Raspberry Pi 5", cpu="4x Cortex-A76", power_mode="ondemand"),
        "quantity": quantity,
        "families": [
            Family(kind="linear", points=points, fitted={quantity: fitted(points)}),
            Family(kind="relu", points=points[:2]),
        ],
        "fixed": {quantity: 1e-4},
        "sensed": Sensed(sensor="pmic", scope="module", quality="coarse", covers="rails of the PMIC"),
        "profiling_seconds": 60.0,
        "idle_watts": 3.0,
        "wholes": [
            Whole(model="MLP", quantity=quantity, batch=32, measured=0.2, predicted=0.21, low=0.18, high=0.24),
            Whole(model="LSTM", quantity=quantity, batch=32, measured=0.3, predicted=0.2, low=0.18, high=0.22),
            Whole(model="LeNet", quantity=quantity, batch=32, measured=1, predicted=1, low=0.9, high=1.1, anchor=True),
        ],
        "power": [Sample(at_s=number / 10, watts=5.0 + number % 3) for number in range(50)],
        "windows": [Mark(name="linear", start_s=1.0, end_s=4.0)],
        "notes": ["the clocks changed once"],
    }
    return Profile(**{**values, **changes})


# Runs
def test_the_ledger_adds_up_everywhere(tmp_path):
    """Jobs, devices, rounds and totals say the same joules in JSON and CSV, and the page shows the totals."""
    jobs = [
        job("a", 0),
        job("a", 1, train_joules=3.5, other_joules=1.5),
        modelled_job("m", 0, other_modelled_joules=0.5),
        modelled_job("m", 1, stopped="used its 7 J"),
    ]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(msgspec.to_builtins(make_run(jobs))))
    out = [str(tmp_path / name) for name in ("page.html", "tables", "all.json")]
    assert cli.main(["report", str(path), "-o", out[0], "--csv", out[1], "--json", out[2]]) == 0
    data = json.loads((tmp_path / "all.json").read_text())
    assert (data["joules"], data["modelled_joules"], data["radio_modelled_joules"]) == (7.5, 14.5, 2.0)
    parts = [f"{part}{kind}" for part in ("train", "compress", "other") for kind in ("_joules", "_modelled_joules")]
    for table in ("jobs", "devices", "rounds"):
        for key in (*parts, "radio_modelled_joules"):
            expected = math.fsum(getattr(entry, key) or 0 for entry in jobs)
            assert math.fsum(row[key] or 0 for row in data[table]) == pytest.approx(expected)
        with (tmp_path / "tables" / f"{table}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(data[table])
        assert math.fsum(float(row["train_joules"] or 0) for row in rows) == pytest.approx(5.5)
    assert sum(row["joules"] or 0 for row in data["sensors"]) == pytest.approx(7.5)
    text = check((tmp_path / "page.html").read_text())
    assert "7.50 J measured, loading to compression" in text
    assert "14.5 J modelled, loading to compression" in text
    assert "1.50 J loading and evaluating, measured" in text
    assert "used its 7 J" in text


def test_files_count_rounds_from_1_without_noise_of_floats():
    """As pages and status do; six digits are kept."""
    report = report_run(make_run([job("a", 0, train_joules=0.1 + 0.2, steps=3, stopped="hot"), job("b", 1)]))
    tables = {table.key: table for table in report.tables}
    assert [row["round_from_1"] for row in tables["rounds"].records()] == [1, 2]
    assert [row["round_from_1"] for row in tables["jobs"].records()] == [1, 2]
    assert "0.30000000000000004" not in json.dumps(report.data) + csv_text(tables["jobs"])
    assert tables["jobs"].records()[0]["train_joules"] == 0.3
    assert rounded(1763759598.4) == 1763759598.0
    assert rounded(1.23456789e-7) == 1.23457e-7
    assert "ended early after 3 steps, hot" in check(report.html)


def test_measured_and_modelled_are_told_apart():
    """By colour and hatching in the charts, by words beside figures, by columns in files."""
    report = report_run(make_run([job("a"), modelled_job("m")]))
    text = check(report.html)
    assert "2.25 J measured" in text
    assert "7.00 J modelled" in text
    assert "2.00 J training, measured" in text
    assert 'class="train-modelled"' in report.html
    assert 'class="train"' in report.html
    devices = {row["device"]: row for row in report.data["devices"]}
    assert devices["m"]["train_joules"] is None
    assert devices["m"]["train_modelled_joules"] == 7.0
    only_modelled = report_run(make_run([modelled_job("m")]))
    assert 'class="train"></rect></li>' not in only_modelled.html
    assert only_modelled.data["joules"] is None


def test_doubtful_jobs_are_marked():
    """In a sentence, beside their device's bar, and in files; their joules stay in the sums."""
    report = report_run(make_run([job("a", doubtful=True), job("b")]))
    text = check(report.html)
    assert "The joules of 1 job of 2 are doubtful" in text
    assert "2.25 J measured (1 doubtful)" in text
    assert (report.data["joules"], report.data["doubtful_jobs"]) == (4.5, 1)
    assert [row["doubtful_jobs"] for row in report.data["devices"]] == [1, 0]
    assert "doubtful" not in check(report_run(make_run([job("b")])).html)


def test_a_sensor_that_is_known_by_name_alone_is_named():
    """The coordinator did not know what it covers: its joules stand under its name, as measured."""
    report = report_run(make_run([job("a", sensor="rapl", scope=None, quality=None, covers=None)]))
    assert "rapl (unknown scope)" in check(report.html)
    assert report.data["sensors"][0]["joules"] == 2.25


def test_hostile_names_stay_text():
    """Whatever a file calls its devices, sensors, runs, models or windows: the page shows it and runs nothing."""
    hostile = dict.fromkeys(("device", "assignment", "status", "sensor", "scope", "covers", "stopped", "note"), HOSTILE)
    run = make_run([job(**hostile), job("b")], run=HOSTILE, status=HOSTILE, reason=HOSTILE)
    text = check(report_run(run, HOSTILE).html)
    assert text.count(HOSTILE) >= 6
    device = Device(name=HOSTILE, board=HOSTILE, cpu=HOSTILE, power_mode=HOSTILE, software={HOSTILE: HOSTILE})
    sensed = Sensed(sensor=HOSTILE, scope=HOSTILE, quality=HOSTILE, covers=HOSTILE)
    whole = Whole(model=HOSTILE, quantity="joules", batch=1, measured=1.0, predicted=1.0, low=0.5, high=2.0)
    windows = [Mark(name=HOSTILE, start_s=0.0, end_s=5.0)]
    families = [Family(kind=HOSTILE, points=make_profile().families[0].points)]
    profile = make_profile(
        device=device, sensed=sensed, wholes=[whole], windows=windows, notes=[HOSTILE], families=families
    )
    assert HOSTILE in check(report_profile(profile).html)
    formula = report_run(make_run([job("=cmd|' /C calc'!A0")])).tables[0]
    assert "'=cmd" in csv_text(formula)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (make_run([], rounds=0, accuracy=None, initial_accuracy=None), "No job has reported its end yet."),
        (make_run([], rounds=0, ledger=None), "This file has no ledger"),
        (
            make_run(
                [
                    job(
                        sensor=None,
                        scope=None,
                        quality=None,
                        covers=None,
                        train_joules=None,
                        compress_joules=None,
                        radio_modelled_joules=None,
                    )
                ]
            ),
            "No device said what its jobs drew",
        ),
        (make_run([job(), job("b", train_joules=None, compress_joules=None)]), "is unknown for 1 of 2 jobs"),
        (make_run([job()], rounds=1), "Joules per round"),
        (
            make_run([job(train_joules=0.0, compress_joules=0.0, radio_modelled_joules=0.0)]),
            "Which sensor measured what",
        ),
        (make_run([job(round_=number) for number in range(300)], rounds=300), "Accuracy for energy"),
        (make_run([job(f"device-{number}") for number in range(200)]), "170 other devices"),
    ],
)
def test_runs_of_every_shape_make_a_page(run, words):
    """Empty, of unknown energy, of an older version, long and wide: a whole page that says how it is."""
    report = report_run(run)
    assert words in check(report.html)
    json.dumps(report.data, allow_nan=False)


def test_unknown_is_never_zero():
    """A device without a figure has a dash or the word, and empty cells in CSV."""
    lost = {"train_joules": None, "compress_joules": None, "radio_modelled_joules": None, "quality": None}
    report = report_run(make_run([job("a"), job("b", **lost)]))
    row = next(row for row in csv.DictReader(csv_text(report.tables[0]).splitlines()) if row["device"] == "b")
    assert {row[key] for key in ("train_joules", "compress_joules", "radio_modelled_joules")} == {""}
    assert "unknown" in check(report.html)


# Profiles
@pytest.mark.parametrize("quantity", ["joules", "modelled_joules", "cpu_seconds", "seconds"])
def test_a_profile_says_what_its_figures_are(quantity):
    """Only joules of a power sensor are called measured; others stand under their own name in every file."""
    pytest.importorskip("numpy")
    sensed = None if quantity in ("cpu_seconds", "seconds") else make_profile().sensed
    report = report_profile(make_profile(quantity, sensed=sensed))
    text = check(report.html)
    warned = {
        "joules": "measured energy per step",
        "modelled_joules": "No joule here was measured",
        "cpu_seconds": "costs are CPU seconds per step, not joules",
        "seconds": "Costs are wall seconds per step, not joules",
    }
    assert warned[quantity] in text
    assert "Whole models: predicted against metered" in text
    points = next(table for table in report.tables if table.key == "points")
    assert quantity in points.lines()[0]
    if quantity != "joules":
        assert "joules" not in {key for table in report.tables for key in table.lines()[0]}
    modelled = quantity == "modelled_joules"
    assert {"power", "idle_watts"} & set(report.data) == (set() if modelled else {"power", "idle_watts"})
    assert ("modelled_power" in report.data, "idle_modelled_watts" in report.data) == (modelled, modelled)
    assert "the clocks changed once" in text
    json.dumps(report.data, allow_nan=False)


def test_layers_are_predicted_from_the_others():
    """A kind that was fitted shows how well its points predict one another; one that was not, does not."""
    pytest.importorskip("numpy")
    report = report_profile(make_profile())
    linear, relu = report.data["kinds"]
    assert linear["fitted"] is True
    assert 0 <= linear["left_out_median_error"] < 0.5
    assert 0 <= linear["left_out_coverage_90"] <= 1
    assert (relu["fitted"], relu["left_out_median_error"]) == (False, None)
    assert "Each of 6 layers predicted" in check(report.html)


def test_anchors_prove_nothing():
    """The mean error is over the models that did not set the factor."""
    pytest.importorskip("numpy")
    text = check(report_profile(make_profile()).html)
    assert "19.2 % mean error over 2 whole models" in text
    assert "1 of 2 metered values lie inside" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"wholes": []},
        {"wholes": [], "power": [], "windows": [], "families": [], "notes": [], "sensed": None, "idle_watts": None},
        {"power": [Sample(at_s=0.0, watts=0.0)], "windows": []},
        {"windows": [Mark(name="x", start_s=number / 9, end_s=number / 9 + 0.1) for number in range(500)]},
        {"families": [Family(kind="linear", points=[])]},
        {"wholes": [Whole(model="m", quantity="joules", batch=1, measured=0.0, predicted=1.0, low=0.0, high=9.0)]},
        {"wholes": [Whole(model="m", quantity="seconds", batch=1, measured=1.0, predicted=9.0, low=0.0, high=99.0)]},
    ],
)
def test_profiles_of_every_shape_make_a_page(changes):
    """Without wholes, without power, without anything; nothing is drawn that is not there."""
    pytest.importorskip("numpy")
    report = report_profile(make_profile(**changes))
    text = check(report.html)
    assert ("No whole model was metered" in text) == (not changes.get("wholes", True) or "wholes" in changes)
    json.dumps(report.data, allow_nan=False)


def test_layers_of_a_bundle(tmp_path, capsys):
    """``--bundle`` shows what every layer is predicted to cost, with its interval; the parts add up to the whole."""
    pytest.importorskip("numpy")
    with zipfile.ZipFile(DIGITS) as archive:
        layers = partition(json.loads(archive.read("manifest.json")))
    costs = {"joules": Cost(mean=1e-3, relative_error=0.01)}
    families = []
    for kind in sorted({layer.kind for layer in layers}):
        points = [Point(sizes=layer.sizes, costs=costs) for layer in layers if layer.kind == kind]
        families.append(Family(kind=kind, points=points, fitted={"joules": fitted(points)}))
    save_profile(make_profile(families=families), tmp_path / "profile.json")
    page, data = tmp_path / "page.html", tmp_path / "all.json"
    command = ["report", str(tmp_path / "profile.json"), "-o", str(page), "--json", str(data)]
    assert cli.main([*command, "--bundle", str(DIGITS)]) == 0
    value = json.loads(data.read_text())
    assert [row["layer"] for row in value["layers"]] == [layer.name for layer in layers] + ["every step"]
    total = math.fsum(row["predicted_joules"] for row in value["layers"])
    assert value["bundle"]["predicted_joules"] == pytest.approx(total)
    assert all(row["low_joules"] <= row["predicted_joules"] <= row["high_joules"] for row in value["layers"])
    assert "Layers of digits" in check(page.read_text())
    assert cli.main([*command, "--bundle", str(tmp_path / "profile.json")]) == 1
    assert "is no bundle" in capsys.readouterr().err


# Files
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "neither a profile nor the JSON of a run"),
        ("[1, 2]", "neither a profile nor the JSON of a run"),
        ('{"rounds": 3}', "neither a profile nor the JSON of a run"),
        ('{"run": "r", "history": 7}', "history"),
        ('{"run": "r", "history": [], "ledger": [{"device": "a", "train_joules": -1}]}', "train_joules"),
        ('{"run": "r", "history": [], "ledger": [{"device": "a", "train_joules": NaN}]}', "neither a profile nor"),
        (
            '{"run": "r", "history": [], "ledger": [{"device": "a"}, {"device": "b", "train_joules": 1e308}]}',
            "file.json: is no usable JSON of a run: Expected `float` <= 1000000000000000.0 - at `$.ledger[1].train",
        ),
        ('{"run": "r", "history": [{"round": 0, "accuracy": 1e308}]}', "$.history[0].accuracy"),
        ('{"format": "edge-energy-profile", "format_version": 99}', "newer than this software reads"),
    ],
)
def test_unusable_files_are_told_in_one_line(tmp_path, capsys, content, reason):
    """What is wrong with it, and what to give instead; no page is left behind."""
    path = tmp_path / "file.json"
    path.write_text(content)
    assert cli.main(["report", str(path), "-o", str(tmp_path / "page.html")]) == 1
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_places_that_cannot_be_written_are_told(tmp_path, capsys):
    """With the option to change, and exit code 2, as for options that do not go together."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(msgspec.to_builtins(make_run([job()]))))
    missing = tmp_path / "nowhere" / "page.html"
    page = str(tmp_path / "page.html")
    for arguments, reason in (
        (["-o", str(missing)], "choose another file for -o"),
        (["-o", page, "--csv", str(path)], "choose another --csv folder"),
        (["-o", page, "--bundle", "x"], "--bundle belongs to a profile"),
        (["-o", page, "--batch", "4"], "--batch belongs to --bundle"),
    ):
        assert cli.main(["report", str(path), *arguments]) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(ProfileError, match="cannot be read"):
        read(tmp_path / "nothing.json")


def test_newer_files_with_more_in_them_are_read(tmp_path):
    """Fields that this version does not know are ignored."""
    path = tmp_path / "run.json"
    run = {**msgspec.to_builtins(make_run([job()])), "new": {"x": 1}, "fleet": [], "energy": {"joules": 1.0, "more": 2}}
    path.write_text(json.dumps(run))
    assert read(path).jobs[0].device == "a"


# Drawing
def test_axes_have_round_numbers():
    """Ticks are readable, few, and reach the largest value."""
    assert linear_ticks(0.0, 10.0, 5) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert nice_end(0.93, 5) == pytest.approx(1.0)
    assert nice_end(0.0, 5) == 1.0
    assert log_ticks(0.002, 30.0) == pytest.approx([0.01, 0.1, 1.0, 10.0])
    for high in (1e-9, 0.37, 1.0, 99.99, 1e12):
        assert nice_end(high, 5) >= high * 0.999
        assert 2 <= len(linear_ticks(0.0, nice_end(high, 5), 5)) <= 8


@pytest.mark.parametrize("width", [330.0, 860.0])
def test_texts_of_a_chart_stay_inside_it(width):
    """On a phone as on a desktop: long names are cut, no text starts left of the chart or ends right of it."""
    rows = [charts.Bar("a-device-with-a-very-long-name-" * 4, (charts.Part(5.0, "train", "5 J"),), "5.00 J measured")]
    drawings = [
        charts.bars(rows, "energy", "J", width=width, label="bars"),
        charts.columns(rows * 3, "energy", "J", "round", width=width, label="columns"),
        charts.strips(
            [("a-kind-with-a-long-name" * 4, [charts.Spot(1.0, 0.0, "x")])], "t", "J", width=width, label="s"
        ),
        charts.ratios([row._replace(low=0.5, high=9.0) for row in rows], "ratio", width=width, label="ratios"),
    ]
    for drawing in drawings:
        for attributes, text in re.findall(r"<text ([^>]*)>(?:<title>.*?</title>)?(.*?)</text>", drawing):
            x = float(re.search('x="([^"]*)"', attributes).group(1))
            anchor = re.search('text-anchor="([^"]*)"', attributes)
            wide = 6.5 * len(text)
            start = x - {"middle": wide / 2, "end": wide}.get(anchor.group(1) if anchor else "", 0.0)
            assert start >= -4, text
            assert start + wide <= width + 4, text


def test_figures_have_prefixes_and_words():
    """Three digits, a unit, and what is unknown is no number."""
    assert [amount(value).replace("\u00a0", " ") for value in (0.0, 1.0, 999.6, 0.00123, 2.5e6, 1e15)] == [
        "0 J",
        "1.00 J",
        "1.00 kJ",
        "1.23 mJ",
        "2.50 MJ",
        "1.00e+09 MJ",
    ]
    assert amount(None) == "\u2013"
    assert amount(90.0, "s").replace("\u00a0", " ") == "90.0 s"
    assert both_words(None, None) == "unknown"
