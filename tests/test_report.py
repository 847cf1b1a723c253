"""Statistics against scipy, hand and simulation; the paper's tables; pictures; listening tests; the report notebook."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metis_lib import audio, notebook
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, plots, record, report, runner, statistics
from recipes import listening
from recipes.paper import tables as paper

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.evaluation
SYSTEMS = {"recording": 0.0, "resynthesis": 0.1, "mymodel": 0.2}


def make_rows(
    task: str = "tts", *, systems: dict[str, float] = SYSTEMS, speakers: int = 10, each: int = 2, seeds: int = 1
) -> list[dict[str, Any]]:
    """Rows of a made-up run: what a system adds to its word errors is ten times its entry."""
    rng, rows = np.random.default_rng(7), []
    for index in range(speakers * each):
        text, hard = f"the cat number {index} sat down on the old mat today", rng.integers(0, 3)
        for (system, worse), seed in itertools.product(systems.items(), range(seeds)):
            fixed = system != "mymodel"
            if fixed and seed:
                continue
            row: dict[str, Any] = {key: float(rng.normal(3.5 - worse, 0.2)) for key in metrics.TASKS[task]["metrics"]}
            row |= {"id": f"u{index}", "system": system, "seed": None if fixed else seed, "error": None, "words": 11}
            row |= {"speaker": f"s{index % speakers}", "text": text, "heard": text, "audio": f"audio/u{index}.flac"}
            row |= {"word_errors": int(hard + 10 * worse), "seconds": 2.0 + index / 4, "snr_db": float(index % 5)}
            rows.append(row | dict.fromkeys(("wer", "wer_seedtts"), row["word_errors"] / 11))
    return rows


def make_run(folder: Path, *, tasks: tuple[str, ...] = ("tts",), sound: bool = True, **changes: Any) -> Path:
    """A run folder as ``metis evaluate`` leaves it, with buzzing for speech."""
    summary = {}
    for task in tasks:
        rows = make_rows(task, speakers=3, each=2)
        for row in rows:
            path = folder / task / row["system"] / row["audio"]
            if sound and not path.is_file():
                pitch = 100 + 50 * list(SYSTEMS).index(row["system"])
                audio.write(path, 0.1 * np.sin(2 * np.pi * pitch * np.arange(8000) / 16_000), 16_000)
        summary[task] = runner.save(rows, task, folder)
    settings = {"checkpoint": "mymodel", "options": {"cfg": changes.pop("cfg", None)}}
    settings |= {"dtype": changes.pop("dtype", "float32")}
    items = changes.pop("items", 6)
    about = {"commit": "c" * 40, "dirty": False, "manifest_sha256": "m" * 64, "checkpoint": "mymodel", "seeds": [0]}
    about |= {"tasks": {task: {"settings": settings, "items": items} for task in tasks}, "limit": None}
    record.write_json(folder / "summary.json", summary)
    record.write_json(folder / "run.json", about | changes)
    return folder


# --- statistics ------------------------------------------------------------------------------------------


def test_interval_equals_scipy_at_the_expanded_level() -> None:
    from scipy.stats import bootstrap, norm, t

    values = np.random.default_rng(3).gamma(2.0, 0.1, 12)
    level = 1 - 2 * norm.sf(np.sqrt(12 / 11) * t.ppf(0.975, 11))
    assert level == pytest.approx(0.9785, abs=1e-4)
    expected = bootstrap((values,), np.mean, confidence_level=level, n_resamples=10_000, method="percentile", rng=9)
    found = statistics.mean_interval(list(values), ["one"] * 12, [str(index) for index in range(12)])
    assert found.ci95 == pytest.approx(tuple(expected.confidence_interval), abs=0.006)
    by_speaker = statistics.mean_interval(list(values), [str(index) for index in range(12)], list("abcdefghijkl"))
    assert by_speaker.unit == "speakers" and by_speaker.ci95 == pytest.approx(found.ci95, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "speakers", "unit"), [(12, 1, "utterances"), (40, 4, "utterances"), (40, 10, "speakers")]
)
def test_intervals_cover_the_truth_about_95_times_in_100(monkeypatch: Any, n: int, speakers: int, unit: str) -> None:
    """400 simulations; three standard errors are 3.3 points.  Few speakers are fixed, many are drawn."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng, hits = np.random.default_rng(5), 0
    names = [f"s{index % speakers}" for index in range(n)]
    for _ in range(400):
        effect = rng.normal(0, 0.5, speakers) if unit == "speakers" else np.linspace(-1, 1, speakers) * (speakers > 1)
        values = effect[np.arange(n) % speakers] + rng.normal(size=n)
        found = statistics.mean_interval(list(values), names, [str(index) for index in range(n)])
        assert found.ci95 and found.unit == unit
        hits += found.ci95[0] <= 0 <= found.ci95[1]
    assert 0.915 <= hits / 400 <= 0.985


def test_strata_leave_out_what_speakers_differ_by() -> None:
    rng = np.random.default_rng(0)
    speakers = [f"s{index % 4}" for index in range(40)]
    values = [10.0 * int(speaker[1:]) + rng.normal() for speaker in speakers]
    ids = [str(index) for index in range(40)]
    strata, plain = (statistics.mean_interval(values, names, ids).ci95 for names in (speakers, ["x"] * 40))
    assert strata and plain and np.ptp(strata) < 0.2 * np.ptp(plain)
    alone = statistics.mean_interval([1.0, 2.0, 3.0], ["a", "b", "c"], ["1", "2", "3"])
    assert alone.ci95 == (1.0, 3.0)  # one utterance each: they share a stratum


def test_seeds_are_averaged_before_resampling_and_told_apart() -> None:
    rows = make_rows(seeds=3)
    for row in rows:
        if row["system"] == "mymodel":
            row["wer"] = 0.1 * (row["seed"] + 1)
    entry = statistics.summarise(rows, "tts")["mymodel"]["wer"]
    assert (entry["mean"], entry["seeds"], entry["n"], entry["n_failed"]) == (0.2, 3, 60, 0)
    assert entry["seed_sd"] == pytest.approx(0.1) and entry["ci95"] == pytest.approx([0.2, 0.2])
    fixed = statistics.summarise(rows, "tts")["recording"]["wer"]
    assert (fixed["seeds"], fixed["seed_sd"], fixed["n"], fixed["unit"]) == (1, None, 20, "speakers")
    assert "(seeds ± 0.10)" in report.cell(entry) and "seeds" not in report.cell(fixed)
    assert report.utterances(statistics.summarise(rows, "tts")) == 20


def test_corpus_rate_is_a_ratio_and_failures_are_counted() -> None:
    rows = [row for row in make_rows(speakers=1, each=2) if row["system"] == "recording"]
    rows[0] |= {"word_errors": 0, "words": 2, "wer": 0.0, "sim_prompt": None}
    rows[1] |= {"word_errors": 4, "words": 8, "wer": 0.5, "sim_prompt": None}
    found = statistics.summarise(rows, "tts")["recording"]
    assert (found["wer"]["mean"], found["wer_corpus"]["mean"]) == (0.25, 0.4)
    failed = {"mean": None, "ci95": None, "n": 0, "n_failed": 2, "unit": None, "seeds": 1, "seed_sd": None}
    assert found["sim_prompt"] == failed | {"protocol": metrics.METRICS["sim_prompt"]}


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0] and statistics.holm([]) == []


def test_paired_comparison_on_known_data() -> None:
    """Six utterances: the difference, the exact p of all 64 sign patterns, and seeds averaged first."""
    rows, gains = [], [0.1, 0.2, 0.3, -0.1, 0.2, 0.4]
    for index, gain in enumerate(gains):
        base = {"id": str(index), "speaker": "x", "text": "a b", "words": 2, "word_errors": 1, "seed": 0}
        rows.append(base | {"system": "b", "wer": 0.5, "sim_prompt": 0.3})
        rows += [
            base | {"system": "a", "wer": 0.5 + gain + d, "sim_prompt": 0.3, "seed": s}
            for s, d in ((0, 0.05), (1, -0.05))
        ]
    table = statistics.compare(rows, "a", "b", "tts")
    signs = [
        sum(s * g for s, g in zip(pattern, gains, strict=True)) for pattern in itertools.product([1, -1], repeat=6)
    ]
    exact = np.mean(np.abs(signs) >= sum(gains) - 1e-9)
    entry = table["wer"]
    assert (
        entry["difference"] == pytest.approx(np.mean(gains), abs=1e-6)
        and entry["n"] == 6
        and entry["unit"] == "utterances"
    )
    assert entry["p"] == pytest.approx(exact, abs=1e-6) and entry["ci95"][0] < entry["difference"] < entry["ci95"][1]
    assert entry["p_holm"] == pytest.approx(min(1.0, 3 * exact), abs=1e-5)
    assert (table["sim_prompt"]["difference"], table["sim_prompt"]["p"], table["wer_corpus"]["difference"]) == (0, 1, 0)
    assert list(table) == ["wer", "wer_corpus", "sim_prompt"]


def test_a_clear_difference_is_found_and_chance_is_not() -> None:
    rows = make_rows(speakers=12)
    table = statistics.compare(rows, "mymodel", "recording", "tts")
    assert table["wer"]["p_holm"] < 0.01 and table["wer"]["difference"] == pytest.approx(2 / 11, abs=1e-6)
    twin = [row | {"system": "twin"} for row in rows if row["system"] == "recording"]
    assert statistics.compare([*rows, *twin], "recording", "twin", "tts")["dnsmos_sig"]["p"] == 1.0


def test_what_is_not_comparable_is_refused(tmp_path: Path) -> None:
    rows = make_rows()
    with pytest.raises(MetisError, match="not comparable: not the same test set"):
        statistics.compare(
            [row for row in rows if row["id"] != "u3" or row["system"] != "mymodel"], "mymodel", "recording", "tts"
        )
    with pytest.raises(MetisError, match="no rows of the system 'nobody'"):
        statistics.compare(rows, "mymodel", "nobody", "tts")
    one, two = make_run(tmp_path / "one", sound=False), make_run(tmp_path / "two", sound=False)
    assert report.compare_runs(one, two, "tts", "mymodel")["wer"]["difference"] == 0
    summary = json.loads((two / "summary.json").read_text())
    summary["tts"]["mymodel"]["wer"]["protocol"] = "wer/other@1"
    record.write_json(two / "summary.json", summary)
    with pytest.raises(MetisError, match="not comparable"):
        report.compare_runs(one, two, "tts", "mymodel")
    other = make_run(tmp_path / "three", sound=False, manifest_sha256="n" * 64)
    with pytest.raises(MetisError, match="not the same test set"):
        report.compare_runs(one, other, "tts", "mymodel")


# --- the paper's tables ----------------------------------------------------------------------------------


def value(number: int, testset: str, system: str, metric: str, data: str | None = None) -> list[str]:
    table = paper.tables()[number - 1]
    part = next(part for part in table["parts"] if part["testset"] == testset)
    rows = [row for row in part["rows"] if row["system"] == system and data in (None, row["data"])]
    return [row["values"][metric] for row in rows]


def test_all_eleven_tables_are_there_and_consistent() -> None:
    tables, about = paper.tables(), paper.index()
    assert [table["table"] for table in tables] == list(range(1, 12))
    for table in tables:
        keys = [column["key"] for column in table["columns"]]
        assert {"title", "section", "task", "columns", "parts", "notes"} <= set(table)
        assert {column["protocol"] for column in table["columns"]} <= set(about["protocols"])
        for part in table["parts"]:
            assert part["testset"] in about["testsets"] and set(part.get("protocols", {}).values()) <= set(
                about["protocols"]
            )
            assert (part.get("task") or table["task"]) in metrics.TASKS
            for row in part["rows"]:
                assert list(row) == ["system", "data", "values"] and set(row["values"]) <= set(keys)
                assert table["table"] == 11 or list(row["values"]) == keys
                for text in filter(None, row["values"].values()):
                    assert re.fullmatch(r"\d+\.\d\d(±\d\.\d\d)?", text)
    assert [sum(len(part["rows"]) for part in table["parts"]) for table in tables] == [
        22,
        7,
        18,
        23,
        4,
        8,
        5,
        4,
        5,
        4,
        24,
    ]
    places = (
        json.loads((ROOT / "recipes" / "testsets.json").read_text())
        if (ROOT / "recipes" / "testsets.json").is_file()
        else {}
    )
    assert not places or set(about["testsets"]) <= set(places)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ((1, "seedtts-en", "Metis-TTS full", "wer", "10K"), ["2.28"]),
        ((1, "seedtts-en", "Metis-TTS LoRA 32", "sim", "0.58K LibriTTS"), ["0.70"]),
        ((1, "seedtts-zh", "Metis-TTS w/o pre-train", "wer"), ["4.98"]),
        ((2, "vctk", "Metis-VC LoRA 16, cfg 2.0", "sim"), ["0.55"]),
        ((3, "libri2mix", "WeSep", "bak"), ["3.93"]),
        ((3, "emiliamix", "Metis-TSE LoRA 16", "nisqa"), ["4.06"]),
        ((4, "dns2020-no-reverb", "Metis-SE full", "nisqa"), ["4.76"]),
        ((4, "dns2020-real", "SELM", "nisqa"), [None]),
        ((5, "lrs3", "Metis-L2S", "sim"), ["56.74"]),
        ((6, "libri2mix", "Metis-Omni, text-guided", "wer"), ["2.70"]),
        ((7, "librispeech", "Metis-TTS", "wer"), ["4.33"]),
        ((8, "seedtts-vc-zh", "HierSpeech++", "nisqa"), ["4.14"]),
        ((9, "seedtts-en", "Metis-TTS", "smos"), ["4.19±0.18"]),
        ((10, "dns2020-with-reverb", "Metis-SE", "qmos"), ["4.29±0.21"]),
        ((11, "libri2mix", "WeSep", "bak"), ["3.39"]),
        ((11, "seedtts-en", "Metis-TTS", "wer"), ["2.41"]),
    ],
)
def test_spot_values_as_printed(where: tuple[Any, ...], expected: list[str]) -> None:
    assert value(*where) == expected


def test_our_numbers_stand_beside_with_daggers_in_four_formats(tmp_path: Path) -> None:
    run = record.read_run(make_run(tmp_path / "run", sound=False))
    paths = paper.write_tables(tmp_path / "tables", [run])
    assert len(paths) == 44
    mean, wer = (run.summary["tts"]["mymodel"]["wer_seedtts"][key] for key in ("mean", "protocol"))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "table01.csv").read_text())))
    ours = [row for row in rows if row["of"] == "run"]
    assert {row["test_set"] for row in ours} == {"SeedTTS test-en"}  # the run is English
    (mine,) = [row for row in ours if (row["system"], row["metric"]) == ("mymodel", "wer")]
    assert float(mine["value"]) == pytest.approx(100 * mean, abs=1e-3) and mine["protocol"] == wer
    assert (mine["same_judge"], mine["same_test_set"], mine["n"]) == ("False", "False", "6")
    printed = [row["value"] for row in rows if (row["of"], row["metric"]) == ("paper", "wer")]
    assert printed[:3] == ["2.14", "6.13", "7.55"] and len(printed) == 22

    tex = (tmp_path / "tables" / "table01.tex").read_text()
    lines = [line.removesuffix(r" \\").split(" & ") for line in tex.splitlines() if line.endswith(r" \\")]
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines) == 1 + 22 + 2
    assert tex.count(r"\begin{") == tex.count(r"\end{") and not re.search(r"(?<!\\)[_%]", tex.replace("{!}{%", ""))
    head = [name.replace(r"\%", "%").replace(r"$\dagger$", "†") for name in lines[0]]
    assert f"WER % ours † {wer}" in head
    row = next(line for line in lines if line[1].startswith("mymodel"))
    assert row[head.index(f"WER % ours † {wer}")].startswith(f"{100 * mean:.2f} [") and r"$\ddagger$" in row[1]

    md = (tmp_path / "tables" / "table01.md").read_text()
    assert f"WER % ours † {wer} |" in md and "† Not the paper's judge" in md and "‡ Not the paper's test set" in md
    page = (tmp_path / "tables" / "table01.html").read_text()
    assert page.count("<tr class='ours'>") == 2 and "2.28" in page  # the recordings stand in the ground truth's row
    assert "ours" not in (tmp_path / "tables" / "table09.md").read_text()


def test_the_same_judge_and_test_set_bear_no_dagger(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=("se",), sound=False, testset="/somewhere/dns2020-real", items=300)
    found = paper.records(paper.tables()[3], [record.read_run(folder)])
    ours = {(one["test_set"], one["metric"]): one for one in found if one["of"] == "run" and one["system"] == "mymodel"}
    assert (
        ours["DNS 2020 real recordings", "sig"]["same_test_set"]
        and ours["DNS 2020 real recordings", "sig"]["same_judge"]
    )
    assert not ours["DNS 2020 with reverb", "sig"]["same_test_set"]
    with pytest.raises(MetisError, match="no finished run"):
        record.read_run(tmp_path)


def test_a_part_of_a_test_set_or_prompts_of_our_own_bear_a_dagger(tmp_path: Path) -> None:
    """A copy that is not whole (--allow-count) has the name of the set and is not the set."""
    few = make_run(tmp_path / "few", tasks=("se",), sound=False, testset="dns2020-real", items=5)
    found = paper.records(paper.tables()[3], [record.read_run(few)])
    assert not any(one["same_test_set"] for one in found if one["of"] == "few")
    lips = make_run(tmp_path / "lips", tasks=("l2s",), sound=False, testset="lrs3", items=1321)
    found = [one for one in paper.records(paper.tables()[4], [record.read_run(lips)]) if one["of"] == "lips"]
    marks = {one["metric"]: one["same_test_set"] for one in found if one["test_set"] == "LRS3 test"}
    assert not marks.pop("sim") and marks["wer"]
    places = json.loads((ROOT / "recipes" / "testsets.json").read_text())
    known = {name: about["items"] for name, about in paper.index()["testsets"].items() if about["published"]}
    assert known == {name: places[name]["official"] for name in known}


def test_rows_of_ours_say_how_they_were_decoded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tasks=("vc",), sound=False, testset="vctk", cfg=2.0, dtype="bfloat16")
    table = paper.tables()[1]
    found = paper.records(table, [record.read_run(run)])
    frame, _ = paper.beside(table, found)
    assert "mymodel (ours, cfg 2.0, bfloat16, n = 6 ‡)" in set(frame["system"])
    assert {one["how"] for one in found if one["of"] == "run"} == {"cfg 2.0, bfloat16"}
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert "--tasks vc --testset vctk --model amphion/metis --judges paper --option cfg=0" in page


def test_nisqa_is_the_papers_only_where_its_rate_is_known() -> None:
    """Ours hears 16 kHz, which the paper states for enhancement alone."""
    entry = {"mean": 4.0, "ci95": None, "n": 1, "n_failed": 0, "protocol": metrics.protocol("nisqa", "paper")}
    tasks = ("vc", "tse", "se", "l2s")
    run = record.Run("run", Path(), {task: {"mymodel": {"nisqa": entry}} for task in tasks}, {"testset": "human"})
    same: dict[int, set[bool]] = {}
    for table in paper.tables():
        for one in paper.records(table, [run]):
            if one["of"] == "run":
                same.setdefault(table["table"], set()).add(one["same_judge"])
                assert one["same_judge"] == one["test_set"].startswith("DNS 2020")
    assert same == {2: {False}, 3: {False}, 4: {True}, 5: {False}, 6: {False}, 8: {False}, 11: {True, False}}


# --- pictures and failures -------------------------------------------------------------------------------


def test_pictures(tmp_path: Path) -> None:
    notebook.style()
    rows = make_rows()
    figure = record.write_figure(tmp_path / "a" / "x.png", plots.by(rows, "seconds", "wer", label="s", title="t"))
    assert (tmp_path / "a" / "x.png").stat().st_size > 5000
    axis = figure.axes[0]
    assert len(axis.get_legend().get_texts()) == 3 and axis.get_xlabel() == "s"
    recording = [row["wer"] for row in rows if row["system"] == "recording" and row["snr_db"] == 0]
    shown = plots.by(rows, "snr_db", "wer", bins=5).axes[0].lines[0].get_ydata()
    assert shown[0] == pytest.approx(np.mean(recording))
    with pytest.raises(MetisError, match="fewer than two values of rt60"):
        plots.by(rows, "rt60", "wer")
    runs = [record.read_run(make_run(tmp_path / f"cfg{cfg}", sound=False, cfg=cfg)) for cfg in (0.0, 2.0)]
    labels = [text.get_text() for text in plots.guidance(runs, "tts").axes[0].texts]
    assert labels == ["cfg 0", "cfg 2"]
    with pytest.raises(MetisError, match="fewer than two runs"):
        plots.guidance(runs[:1], "tts")


def test_failures_come_worst_first(tmp_path: Path) -> None:
    rows = make_rows(speakers=2, each=2)
    mine = [row for row in rows if row["system"] == "mymodel"]
    for row, wer, like in zip(mine, (0.1, 0.9, 0.9, None), (0.9, 0.5, 0.2, None), strict=True):
        row |= {"wer": wer, "sim_prompt": like}
    mine[3] |= {"error": "<silent>", "audio": None, "heard": None}
    found = report.failures(rows, "mymodel", 3)
    assert [row["id"] for row in found] == [mine[3]["id"], mine[2]["id"], mine[1]["id"]]
    text = report.failures_html(tmp_path, "tts", found)
    assert "&lt;silent&gt;" in text and text.count("<tr>") == 4


# --- listening tests -------------------------------------------------------------------------------------


def answer(key: dict[str, Any], listener: str, give: Any, folder: Path) -> Path:
    """A CSV as the page saves it; ``give`` takes the systems of a page (in the order shown) and returns the answer."""
    lines = ["test,kind,listener,position,trial,first,second,answer,seconds"]
    for place, trial in enumerate(key["trials"]):
        clips = trial["clips"] if place % 2 else trial["clips"][::-1]
        said = give([key["clips"][clip]["system"] for clip in clips], place)
        first, second = [*clips, ""][:2]
        lines.append(f"{key['test']},{key['kind']},{listener},{place},{trial['trial']},{first},{second},{said},3.5")
    path = folder / f"{listener}.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: Any) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "secretrun", testset="none")


def test_the_listening_page_hides_the_systems_and_the_key_restores_them(run_folder: Path, tmp_path: Path) -> None:
    page = listening.make_test(
        tmp_path, run_folder, "tts", ["mymodel", "resynthesis"], 4, 1, reference="recording", repeats=2
    )
    text, key = page.read_text(), json.loads((tmp_path / "key.json").read_text())
    bare = re.sub(r"base64,[^\"]+", "", text)
    for word in (
        "mymodel",
        "resynthesis",
        'recording"',
        "secretrun",
        "http",
        "number 0",
        *(row["item"] for row in key["clips"].values()),
    ):
        assert word not in bare, word
    assert bare.count("<audio") == 12 and len(key["trials"]) == 14
    assert sorted(key["clips"]) == sorted(set(re.findall(r'<div hidden id="(\w+)">', bare)))
    for about in key["clips"].values():
        path = run_folder / "tts" / about["system"] / "audio" / f"{about['item']}.flac"
        assert record.sha256_file(path) == about["sha256"]
    letters = {
        tuple(about["system"] for about in key["clips"].values())[place : place + 3] for place in range(0, 12, 3)
    }
    assert len(letters) > 1  # drawn anew for every utterance
    again = listening.make_test(
        tmp_path / "b", run_folder, "tts", ["mymodel", "resynthesis"], 4, 1, reference="recording", repeats=2
    )
    assert re.sub(r"base64,[^\"]+", "", again.read_text()) == bare  # Ogg streams draw their serial numbers


def test_levels_are_kept(run_folder: Path, tmp_path: Path) -> None:
    import base64

    import soundfile

    text = listening.make_test(tmp_path, run_folder, "tts", ["mymodel"], ["u0"]).read_text()
    wav, rate = soundfile.read(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)", text)[0])))
    assert rate == 16_000 and np.sqrt(np.mean(wav**2)) == pytest.approx(0.1 / np.sqrt(2), rel=0.05)


def test_opinion_scores_and_inattentive_listeners(run_folder: Path, tmp_path: Path) -> None:
    listening.make_test(tmp_path, run_folder, "tts", ["mymodel", "resynthesis"], 6, reference="recording", repeats=4)
    key = json.loads((tmp_path / "key.json").read_text())
    good = {"recording": 5, "resynthesis": 4, "mymodel": 2}
    files = [answer(key, name, lambda systems, _: good[systems[0]], tmp_path) for name in ("ann", "bob")]
    files.append(answer(key, "cid", lambda systems, _: 6 - good[systems[0]], tmp_path))
    found = listening.analyse(tmp_path / "key.json", files)
    assert list(found["inattentive"]) == ["cid"] and "hidden reference 1.0" in found["inattentive"]["cid"][0]
    assert found["mos"]["mymodel"]["mean"] == pytest.approx(8 / 3, abs=1e-3) and found["listeners"] == 3
    low, high = found["mos"]["mymodel"]["ci95"]
    assert low == 2.0 and high == 4.0  # three listeners, two of one mind
    kept = listening.analyse(key, files, drop=True)
    assert {name: entry["mean"] for name, entry in kept["mos"].items()} == good
    assert kept["mos"]["mymodel"]["items"] == 6 and kept["mos"]["mymodel"]["ci95"] == [2.0, 2.0]
    seen: dict[str, int] = {}

    def moody(systems: list[str], place: int) -> int:
        clip = key["trials"][place]["clips"][0]
        seen[clip] = seen.get(clip, 0) + 1
        return 5 if seen[clip] == 1 else 1

    found = listening.analyse(key, [answer(key, "dot", moody, tmp_path)])
    assert "disagreed with themselves in 4 of 4 repeats" in found["inattentive"]["dot"]
    with pytest.raises(MetisError, match="has answered already"):
        listening.analyse(key, [files[0], files[0]])
    with pytest.raises(MetisError, match="another test"):
        listening.analyse(key | {"test": "x"}, files)


def test_preferences_with_a_binomial_test(run_folder: Path, tmp_path: Path) -> None:
    from scipy.stats import binomtest

    kinds = {"kind": "ab", "reference": "recording", "anchor": "mymodel"}
    listening.make_test(tmp_path, run_folder, "tts", ["mymodel", "resynthesis"], 6, **kinds)
    key = json.loads((tmp_path / "key.json").read_text())
    assert len(key["trials"]) == 12
    order = ["recording", "resynthesis", "mymodel"]

    def wise(systems: list[str], _: int) -> int:
        return 1 if order.index(systems[0]) < order.index(systems[1]) else 2

    files = [
        answer(key, "ann", wise, tmp_path),
        answer(key, "bob", lambda s, p: 0 if "recording" not in s else wise(s, p), tmp_path),
    ]
    files.append(answer(key, "cid", lambda s, p: 3 - wise(s, p), tmp_path))
    found = listening.analyse(key, files)
    assert list(found["inattentive"]) == ["cid"]
    first, second = found["preferences"]
    assert (first["a"], first["b"], first["prefer_a"], first["prefer_b"]) == ("mymodel", "recording", 6, 12)
    assert (second["prefer_a"], second["prefer_b"], second["none"]) == (6, 6, 6)
    assert first["p"] == pytest.approx(binomtest(6, 18).pvalue, abs=1e-6) and second["p"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mushra"}, "choose mos or ab"),
        ({"kind": "ab", "systems": ["mymodel"]}, "two for ab"),
        ({"kind": "ab", "reference": "recording"}, "name both or none"),
        ({"items": ["u99"]}, "no audio of every system for the utterance u99"),
        ({"systems": ["nobody"]}, "no utterances at"),
    ],
)
def test_listening_tests_that_cannot_be_made(run_folder: Path, tmp_path: Path, changes: Any, message: str) -> None:
    given = {"task": "tts", "systems": ["mymodel", "recording"], "items": 2} | changes
    with pytest.raises(MetisError, match=message):
        listening.make_test(tmp_path, run_folder, **given)


# --- the notebook ----------------------------------------------------------------------------------------


@pytest.mark.notebooks
def test_the_report_notebook(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", tasks=("tts", "se"), cfg=1.0)
    more = make_run(tmp_path / "more", cfg=2.0, sound=False)
    parameters = {"out": str(out), "runs": [str(more)], "device": "cpu", "testset": ""}
    executed = out / "executed" / "report.ipynb"
    problem = runner.run_notebook(ROOT / "eval" / "report.ipynb", executed, parameters, out / "logs" / "report.log")
    assert problem is None
    assert len(list((out / "tables").iterdir())) == 44
    names = {"scores_tts.png", "scores_se.png", "wer_by_seconds_tts.png", "wer_by_snr_db_se.png", "guidance_tts.png"}
    assert names <= {path.name for path in (out / "plots").iterdir()}
    text = executed.read_text()
    assert "data:audio/ogg;base64," in text and "mymodel − recording" in text and "image/png" in text


def test_two_runs_of_one_name_are_two_columns(tmp_path: Path) -> None:
    runs = [record.read_run(make_run(tmp_path / side / "human", sound=False)) for side in "ab"]
    paper.write_tables(tmp_path / "tables", runs)
    (lines,) = [t for p in sorted((tmp_path / "tables").glob("*.csv")) if "mymodel" in (t := p.read_text())][:1]
    of = {row["of"] for row in csv.DictReader(io.StringIO(lines))} - {"paper"}
    assert of == {(tmp_path / side / "human").resolve().as_posix() for side in "ab"}


def test_a_page_of_very_many_clips_points_to_them(tmp_path: Path, monkeypatch: Any) -> None:
    run, lines = make_run(tmp_path / "run", sound=True), []
    wanted = [f"u{i}" for i in range(6)]
    for id in wanted:
        audio.write(tmp_path / "set" / f"{id}.flac", 0.1 * np.sin(np.arange(24_000) / 30), 24_000)
        row = {"id": id, "task": "tts", "speaker": "s", "text": "the cat", "prompt": f"{id}.flac", "prompt_text": "x"}
        lines.append(json.dumps(row | {"clean": f"{id}.flac"}))
    (tmp_path / "set" / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    summary, pages = record.read_json(run / "summary.json"), []
    for held in (100, 5):
        monkeypatch.setattr(report, "HELD", held)
        pages.append(report.write_page(run, summary, tmp_path / "set", None).read_text())
    assert pages[0].count('src="data:audio') == 24 and "preload='none'" not in pages[0]
    sources = re.findall(r"<audio controls preload='none' src='([^']+)'", pages[1])
    assert len(sources) == 24 and "data:audio" not in pages[1]
    assert all((run / source).resolve().is_file() for source in sources)


@pytest.mark.parametrize("value", [
    {}, [], "ä\u2028\"", 3, None, {"a": {}}, [[], [1, [2, {"b": ()}]], "x" * 300], {"k" * 200: [{"n": 1.5}] * 40},
    {True: [1], None: [[2]], 3: {"z": [[0.1] * 90]}}, {"a": ({"b": [1]},) * 30},
])  # fmt: skip
def test_json_in_lines_is_the_same_json(tmp_path: Path, value: object) -> None:
    record.write_json(tmp_path / "one.json", value)
    text = (tmp_path / "one.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(value)) and text.endswith("\n")
    with pytest.raises(ValueError):
        record.write_json(tmp_path / "bad.json", {"a": [{"b": float("nan")}]})
    assert not (tmp_path / "bad.json").exists()
