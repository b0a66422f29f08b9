"""What was measured, for people and for programs: tables, JSON, a plot, and the figures in docs/benchmarks.md."""

import json
import os
import platform
import re
import statistics
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import zmq
from rich.console import Console
from rich.table import Table

from messenger import wire

from .sample import ROOT, version_of
from .works import CONTENDERS, Target, Work

RESULTS = Path(__file__).parent / "results" / "bench.json"
PLOT = RESULTS.with_suffix(".svg")
DOCUMENT = ROOT / "docs" / "benchmarks.md"
MARKED = re.compile(r"(?<=<!-- figures -->\n).*(?=<!-- end of figures -->)", re.DOTALL)


class Figures:
    """The figures of one work: of each contender one a round, or why it has none."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.values: dict[str, list[float]] = {name: [] for name in work.contenders}
        self.notes: dict[str, str] = {}

    def give_up(self, name: str, why: str) -> None:
        """Leave a contender out."""
        self.values.pop(name, None)
        self.notes[name] = why

    def ratio(self, name: str, against: tuple[str, ...]) -> float | None:
        """Return the median over the rounds of the ratio to the best of some contenders, or nothing without them."""
        own, others = self.values.get(name), [self.values[other] for other in against if other in self.values]
        if not own or (against and not others):
            return None
        if not against:
            return statistics.median(own)
        best = min if self.work.less_is_better else max
        bests: list[float] = [best(values) for values in zip(*others, strict=True)]
        return statistics.median(value / base for value, base in zip(own, bests, strict=True))

    def is_met(self, target: Target) -> bool | None:
        """Return whether a target was met, or nothing if it was not measured."""
        ratio = self.ratio(target.contender, target.against)
        if ratio is None:
            return None
        return ratio <= target.limit if self.work.less_is_better else ratio >= target.limit

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        baseline = (self.work.baseline,)
        contenders = {
            name: {"median": statistics.median(values), "ratio": self.ratio(name, baseline), "values": values}
            for name, values in self.values.items()
        }
        targets = [
            {**target._asdict(), "measured": self.ratio(target.contender, target.against), "met": self.is_met(target)}
            for target in self.work.targets
        ]
        described = {key: value for key, value in self.work._asdict().items() if key not in ("contenders", "targets")}
        return {**described, "contenders": contenders, "left_out": self.notes, "targets": targets}


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    needed = {distribution for contender in CONTENDERS.values() for distribution in contender.needs}
    distributions = ("messenger-zmq", "pyzmq", "msgspec", *sorted(needed))
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "core": "interpreted" if wire.__file__.endswith(".py") else "compiled",
        **{distribution: version_of(distribution) or "not installed" for distribution in distributions},
    }


def write(machine: dict[str, Any], round_count: int, figures: list[Figures]) -> None:
    """Write the JSON, the plot, and the figures in the document."""
    RESULTS.parent.mkdir(exist_ok=True)
    report = {"machine": machine, "rounds": round_count, "works": [each.as_json() for each in figures]}
    RESULTS.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    PLOT.write_text(plot(figures), "utf-8")
    if DOCUMENT.exists():
        described = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
        text = f"\nMedians of {round_count} rounds; {described}.\n\n{target_table(figures)}\n{figure_table(figures)}\n"
        DOCUMENT.write_text(MARKED.sub(lambda _: text, DOCUMENT.read_text("utf-8")), "utf-8")


def show_number(value: float | None) -> str:
    """Return a number with three digits or so."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe_target(work: Work, target: Target) -> tuple[str, str, str]:
    """Return what is compared, the least that is asked, and the aim."""
    sign = "at most" if work.less_is_better else "at least"
    against = " or ".join(target.against) if len(target.against) < 3 else "the best peer"
    what = f"{target.contender} ÷ {against}" if target.against else f"{target.contender}, {work.unit}"
    return what, f"{sign} {target.limit:,.4g}" if target.limit else "", f"{target.aim:,.7g}"


def target_table(figures: list[Figures]) -> str:
    """Return what is asked and what was measured, as Markdown."""
    lines = ["| work | ratio | asked | aim | measured | |", "|---|---|---|---|---|---|"]
    for each in figures:
        for target in each.work.targets:
            what, limit, aim = describe_target(each.work, target)
            measured = show_number(each.ratio(target.contender, target.against))
            verdict = {True: "met", False: "**missed**", None: ""}[each.is_met(target)] if target.limit else ""
            lines.append(f"| {each.work.title} | {what} | {limit} | {aim} | {measured} | {verdict} |")
    return "\n".join(lines) + "\n"


def figure_table(figures: list[Figures]) -> str:
    """Return all figures, as Markdown."""
    lines = ["| work | contender | median | × the baseline |", "|---|---|---|---|"]
    for each in figures:
        for name in each.work.contenders:
            row = f"| {each.work.title} | {name} |"
            if name in each.notes:
                lines.append(f"{row} {each.notes[name]} | |")
                continue
            median = f"{show_number(statistics.median(each.values[name]))} {each.work.unit}"
            ratio = each.ratio(name, (each.work.baseline,))
            lines.append(f"{row} {median} | {show_number(ratio)} |")
    return "\n".join(lines) + "\n"


def print_tables(figures: list[Figures]) -> None:
    """Print all figures, then what is asked."""
    console = Console()
    for each in figures:
        table = Table(title=f"{each.work.title} ({each.work.unit})", title_justify="left")
        for column in ("contender", "median", f"× {each.work.baseline}", "least", "most"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for name in each.work.contenders:
            if name in each.notes:
                table.add_row(name, each.notes[name])
                continue
            values = each.values[name]
            ratio = each.ratio(name, (each.work.baseline,))
            shown = (statistics.median(values), ratio, min(values), max(values))
            table.add_row(name, *map(show_number, shown))
        console.print(table)
    table = Table(title="what is asked", title_justify="left")
    for column in ("work", "ratio", "asked", "aim", "measured", ""):
        table.add_column(column)
    for line in target_table(figures).splitlines()[2:]:
        table.add_row(*(cell.strip().strip("*") for cell in line.strip("|").split("|")))
    console.print(table)


# The plot: for each work a bar for each contender, the longest for the largest figure.

WIDTH, LABEL_WIDTH, BAR_WIDTH, ROW_HEIGHT = 860, 240, 460, 20


def plot(figures: list[Figures]) -> str:
    """Return bars as SVG."""
    parts: list[str] = []
    y = 10
    for each in figures:
        medians = {name: statistics.median(values) for name, values in each.values.items() if values}
        y += ROW_HEIGHT
        better = "less is better" if each.work.less_is_better else "more is better"
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(each.work.title)}, {each.work.unit}</text>')
        parts.append(f'<text x="{WIDTH - 10}" y="{y}" text-anchor="end" fill="#666">{better}</text>')
        y += 8
        for name in each.work.contenders:
            color = "#1b6ca8" if name.startswith("messenger") else "#a8b3bd"
            value = medians.get(name)
            length = max(1, BAR_WIDTH * value / max(medians.values())) if value is not None else 0
            label = show_number(value) if value is not None else each.notes.get(name, "")
            text_y = y + 14
            parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{text_y}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{LABEL_WIDTH}" y="{y + 2}" width="{length:.1f}" height="15" fill="{color}"/>')
            parts.append(f'<text x="{LABEL_WIDTH + length + 6:.1f}" y="{text_y}">{escape(label)}</text>')
            y += ROW_HEIGHT
        y += 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        'font-family="sans-serif" font-size="13" role="img" aria-label="Messenger beside its peers">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n"
