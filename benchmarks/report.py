"""What comes out of a run: verdicts, a table, JSON, a plot."""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import PEERS
from workloads import Check, Row, Sample


@dataclass
class Outcome:
    """What came out of one row."""

    row: Row
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    dashes: dict[str, str] = field(default_factory=dict)
    """Columns that could not be measured, and why."""

    def values(self, column: str, key: str = "value") -> list[float]:
        """Return the figures of a column, round by round."""
        if key == "p99":
            pooled = [age for s in self.samples.get(column, []) for age in s["samples"]]
            return [percentile(pooled, 0.99)] if pooled else []
        return [s[key] for s in self.samples.get(column, []) if key in s]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# =============================================================================
# Verdicts
# =============================================================================


@dataclass
class Verdict:
    """One threshold, and what came out."""

    text: str
    value: float | None
    low: float = 0.0
    high: float = 0.0
    holds: bool | None = None


def group(outcome: Outcome, name: str) -> list[str]:
    """Return the columns that a group's name stands for."""
    if name in outcome.row.columns:
        return [name] if name in outcome.samples else []
    members = [
        c
        for c in outcome.samples
        if c in PEERS and c not in ("sqlite3", "omniq_sqlite")
    ]
    # A queue that handed tasks out twice did not do the work.
    members = [
        c
        for c in members
        if not any("twice" in s.get("remark", "") for s in outcome.samples[c])
    ]
    if name == "python peers":
        return [c for c in members if PEERS[c].python_only]
    if name == "crash-safe peers":
        return [c for c in members if PEERS[c].crash_safe]
    if name in ("fair peers", "unfair peers"):
        fair = [
            c
            for c in members
            if statistics.median(outcome.values(c, "fairness")) >= 0.4
        ]
        return fair if name == "fair peers" else [c for c in members if c not in fair]
    return members


def judge(outcome: Outcome, check: Check) -> Verdict:
    """Hold a row's figures against one threshold."""
    word = "at most" if check.at_most else "at least"
    if not check.to:
        values = outcome.values(check.of, check.key)
        label = "" if check.key == "value" else f"{check.key} "
        text = f"{label}{word} {check.limit:g}"
        return _verdict(text, values, check)
    candidates = [
        (
            column,
            [
                a / b
                for a, b in zip(
                    outcome.values(check.of), outcome.values(column), strict=False
                )
            ],
        )
        for column in group(outcome, check.to)
    ]
    candidates = [(column, ratios) for column, ratios in candidates if ratios]
    if not candidates:
        return Verdict(f"{word} {check.limit:g} × {check.to}", None)
    choose = max if check.at_most else min
    column, ratios = choose(candidates, key=lambda each: statistics.median(each[1]))
    best = "" if column == check.to else f" ({check.to}: {column})"
    return _verdict(f"{word} {check.limit:g} × {column}{best}", ratios, check)


def _verdict(text: str, values: list[float], check: Check) -> Verdict:
    if not values:
        return Verdict(text, None)
    value = statistics.median(values)
    holds = value <= check.limit if check.at_most else value >= check.limit
    return Verdict(text, value, min(values), max(values), holds)


# =============================================================================
# Output
# =============================================================================


def show(value: float) -> str:
    """Format a figure with about three digits."""
    if value >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def show_verdict(verdict: Verdict) -> str:
    """Format a threshold and what came out."""
    if verdict.value is None:
        return f"[ -- ] {verdict.text}: nothing to compare with"
    spread = (
        ""
        if verdict.low == verdict.high
        else f" ({show(verdict.low)}–{show(verdict.high)})"
    )
    mark = "[ ok ]" if verdict.holds else "[MISS]"
    return f"{mark} {show(verdict.value)}{spread}, {verdict.text}"


def print_outcome(outcome: Outcome, *, timed: bool) -> None:
    """Print one row: its columns, its dashes, its verdicts."""
    row = outcome.row
    print(f"\n{row.name}: {row.title} [{row.unit}]", flush=True)
    for column in row.columns:
        if column in outcome.dashes:
            print(f"    {column:28} –  {outcome.dashes[column]}")
            continue
        values = outcome.values(column)
        spread = f"({show(min(values))}–{show(max(values))})"
        figure = show(statistics.median(values))
        print(f"    {column:28} {figure:>10} {spread:20} {remarks(outcome, column)}")
    if timed:
        for check in row.checks:
            print("    " + show_verdict(judge(outcome, check)))
    sys.stdout.flush()


def remarks(outcome: Outcome, column: str) -> str:
    """Return what else is to be said of a column."""
    samples = outcome.samples[column]
    said = sorted({s["synchronous"] for s in samples if "synchronous" in s})
    if p99 := outcome.values(column, "p99") if "samples" in samples[0] else []:
        said.append(f"p99 {show(p99[0])}")
    if fairness := outcome.values(column, "fairness"):
        said.append(f"slowest/fastest {statistics.median(fairness):.2f}")
    if "peak" in samples[0]:
        said.append(f"peak {samples[0]['peak']:.0f} MB")
    said += sorted({s["remark"] for s in samples if "remark" in s})[:1]
    loses = (
        outcome.row.name.startswith("work")
        and column in PEERS
        and not PEERS[column].crash_safe
    )
    return ", ".join([*said, *(["loses the task on a crash"] if loses else [])])


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Return a row for the JSON file."""
    row = outcome.row
    verdicts = [judge(outcome, check) for check in row.checks]
    return {
        "name": row.name,
        "title": row.title,
        "unit": row.unit,
        "fewer_is_better": row.fewer_is_better,
        "columns": {
            column: {
                "values": outcome.values(column),
                "median": statistics.median(outcome.values(column)),
                "remarks": remarks(outcome, column),
            }
            for column in row.columns
            if column in outcome.samples
        },
        "dashes": outcome.dashes,
        "verdicts": [vars(verdict) for verdict in verdicts],
    }


def print_table(results: dict[str, Any]) -> None:
    """Print the rows as README shows them."""
    print("\n| workload | omniq_sqlite | beside it | wanted, and what came out |")
    print("| --- | ---: | --- | --- |")
    for row in results["rows"]:
        columns = row["columns"]
        ours = [c for c in columns if c not in PEERS or c == "omniq_sqlite"][-1:]
        figure = f"{show(columns[ours[0]]['median'])} {row['unit']}" if ours else "–"
        others = sorted(
            (c for c in columns if c not in ours),
            key=lambda c: columns[c]["median"],
            reverse=not row["fewer_is_better"],
        )
        shown = [c for c in others if c == "sqlite3"] + [
            c for c in others if c != "sqlite3"
        ]
        beside = ", ".join(f"{c} {show(columns[c]['median'])}" for c in shown[:4])
        verdicts = "; ".join(
            f"{v['text']}: {'' if v['holds'] else '**'}{show(v['value'])}"
            f"{'' if v['holds'] else '**'}"
            for v in row["verdicts"]
            if v["value"] is not None
        )
        print(f"| {row['title']} | {figure} | {beside} | {verdicts} |")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw a bar for each column of the rows that have peers."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams["svg.fonttype"] = "none"  # text stays text
    wanted = (
        "enqueue-full work-full enqueue-bulk enqueue-async enqueue-threads"
        " enqueue-processes work-processes wake worker"
    ).split()
    rows = [row for row in results["rows"] if row["name"] in wanted]
    if not rows:
        return
    height = -(-len(rows) // 3)
    figure, axes = pyplot.subplots(height, 3, figsize=(13, 2.9 * height), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    for axis, row in zip(axes.flat, rows, strict=False):
        draw(axis, row)
    figure.suptitle(
        "omniq_sqlite beside other queues: {cores} cores, {filesystem}, "
        "Python {python}, SQLite {sqlite}, {date}".format_map(results["facts"])
    )
    figure.tight_layout()
    figure.savefig(path)


def draw(axis: Any, row: dict[str, Any]) -> None:
    """Draw one row: medians as bars, the spread as a line."""
    columns = sorted(
        row["columns"].items(),
        key=lambda each: each[1]["median"],
        reverse=row["fewer_is_better"],
    )
    colours = {"omniq_sqlite": "#d55e00", "sqlite3": "#444444"}
    for place, (name, column) in enumerate(columns):
        low, median, high = (
            min(column["values"]),
            column["median"],
            max(column["values"]),
        )
        axis.barh(place, median, color=colours.get(name, "#9bb7d4"))
        axis.plot([low, high], [place, place], color="black", linewidth=1)
        axis.annotate(f" {show(median)}", (high, place), va="center", fontsize=7)
    axis.set_yticks(range(len(columns)), [name for name, _ in columns], fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.margins(x=0.15)
    axis.set_title(f"{row['title']} [{row['unit']}]", fontsize=8, wrap=True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
