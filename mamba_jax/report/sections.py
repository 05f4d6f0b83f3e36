"""The parts of the page below the curves. Every text of a run is escaped: samples are what a model wrote."""

import datetime
import html
import json
from collections.abc import Sequence
from typing import Any

from mamba_jax.report.curves import short
from mamba_jax.report.run import Run
from mamba_jax.telemetry.goodput import GoodputSummary
from mamba_jax.telemetry.metrics import format_seconds

# Colours of the buckets, by palette index; those not named share the last.
_BUCKETS = {
    "step": (2, "steps that count"),
    "lost": (5, "steps that were done again"),
    "down": (9, "no process"),
    "compile": (3, "compiling"),
    "init": (4, "starting and restoring"),
    "data": (1, "waiting for data"),
    "checkpoint": (0, "saving"),
    "evaluation": (6, "held-out loss"),
    "sample": (8, "samples"),
}
_ENDS = ("finished", "preempted", "aborted")
_MOST_ROWS = 500
_MOST_SAMPLES = 50
_LONGEST_SAMPLE = 20_000
_LONGEST_CELL = 2_000


def table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    """An HTML table of escaped texts.

    Args:
        header: titles of the columns.
        rows: the cells of each row, as many as there are columns.
        marked: for each row, whether to highlight it; empty highlights none.
    """
    flags = marked or [False] * len(rows)
    body = "".join(
        f"<tr{' class="differs"' if flag else ''}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row, flag in zip(rows, flags, strict=True)
    )
    columns = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def goodput_section(runs: Sequence[Run]) -> str:
    """Where the time went, a bar for each run that tells."""
    bars = [_bar(run, run.goodput) for run in runs if run.goodput is not None and run.goodput.wall_seconds > 0]
    return f"<h2>Time</h2>{''.join(bars)}" if bars else ""


def _bar(run: Run, summary: GoodputSummary) -> str:
    """HTML of a bar that is divided by what the wall time of a run went into, with a legend."""
    order = [*_BUCKETS, *sorted(summary.seconds.keys() - _BUCKETS.keys())]
    shares = {name: summary.seconds[name] for name in order if name in summary.seconds}
    parts, legend = [], []
    for name, seconds in shares.items():
        color, meaning = _BUCKETS.get(name, (7, "everything else"))
        share = seconds / summary.wall_seconds
        text = f"{html.escape(name)} {format_seconds(seconds)} ({share:.1%})"
        parts.append(f'<i class="c{color}" style="flex:{share:.5f}" title="{text}"></i>')
        legend.append(f'<span title="{meaning}"><i class="block c{color}"></i>{text}</span>')
    goodput = "" if summary.goodput is None else f"goodput {summary.goodput:.1%} of "
    head = f"{html.escape(run.name)}: {goodput}{format_seconds(summary.wall_seconds)}"
    bar, names = "".join(parts), "".join(legend)
    return f'<div class="card">{head}<div class="bar">{bar}</div><div class="legend">{names}</div></div>'


def lineage_section(runs: Sequence[Run]) -> str:
    """What each run began with, which fields it changed of that, and where its schedule was extended."""
    rows = []
    for run in runs:
        if run.lineage is not None:
            changes = "; ".join(run.lineage.changes) or "nothing, as far as is known"
            rows.append([run.name, str(run.lineage.first_step), f"began as {run.lineage}", changes])
        extended = [event for event in run.events if event["event"] == "extended"]
        rows += [[run.name, str(event.get("step", "")), "extended", event.get("changes", "")] for event in extended]
    header = ["run", "step", "what", "changed"]
    return f'<h2>Lineage</h2><div class="card">{table(header, rows[-_MOST_ROWS:])}</div>' if rows else ""


def restarts_section(runs: Sequence[Run]) -> str:
    """Every process that worked on a run, and what became of it."""
    parts = []
    for run in runs:
        places = [place for place, event in enumerate(run.events) if event["event"] == "start"]
        if not places:
            continue
        rows = []
        for place, following in zip(places, [*places[1:], len(run.events)], strict=True):
            start, last = run.events[place], run.events[following - 1]
            devices = f"{start.get('devices', '?')} x {start.get('device_kind', '?')}"
            ended = next((e["event"] for e in run.events[place:following] if e["event"] in _ENDS), "")
            is_newest = following == len(run.events)
            rows.append(
                [
                    _when(start["time"]),
                    str(start.get("step", "")),
                    devices,
                    str(start.get("processes", "")),
                    format_seconds(max(0.0, last["time"] - start["time"])),
                    ended or ("no end so far" if is_newest else "killed or crashed"),
                ]
            )
        header = ["start (UTC)", "from step", "devices", "processes", "last sign after", "end"]
        parts.append(f'<div class="card">{_caption(runs, run)}{table(header, rows)}</div>')
    return f"<h2>Starts</h2>{''.join(parts)}" if parts else ""


def skipped_section(runs: Sequence[Run]) -> str:
    """Steps whose update was left out."""
    parts = []
    for run in runs:
        skipped = [event for event in run.events if event["event"] == "skipped"]
        rows = [[str(e.get("step", "")), e.get("reason", ""), _number(e.get("grad_norm"))] for e in skipped]
        if rows:
            note = _cut_note(len(rows), _MOST_ROWS)
            body = table(["step", "reason", "gradient norm"], rows[-_MOST_ROWS:])
            parts.append(f'<div class="card">{_caption(runs, run)}{note}{body}</div>')
    return f"<h2>Skipped steps</h2>{''.join(parts)}" if parts else ""


def config_section(runs: Sequence[Run]) -> str:
    """All fields in a table with a search; of several runs those that differ come first."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    if not names:
        return ""
    rows = [[name, *(run.config.get(name, "") for run in runs)] for name in names]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    differs = [len(set(row[1:])) > 1 for row in rows]
    header = ["field", *(run.name if len(runs) > 1 else "value" for run in runs)]
    title = f"Config ({sum(differs)} of {len(rows)} fields differ)" if len(runs) > 1 else f"Config ({len(rows)} fields)"
    opened = " open" if any(differs) else ""
    return (
        f"<h2>Config</h2><details{opened}><summary>{title}</summary>"
        f'<input type="search" placeholder="search, such as optimizer lr" aria-label="search the config">'
        f"{table(header, rows, differs)}</details>"
    )


def samples_section(runs: Sequence[Run]) -> str:
    """Texts that the model wrote, newest first."""
    parts = []
    for run in runs:
        if not run.samples:
            continue
        parts.append(_caption(runs, run) + _cut_note(len(run.samples), _MOST_SAMPLES))
        for place, (step, text) in enumerate(reversed(run.samples[-_MOST_SAMPLES:])):
            shown = _cut(text, _LONGEST_SAMPLE)
            opened = " open" if place == 0 else ""
            parts.append(f"<details{opened}><summary>step {step:,}</summary><pre>{html.escape(shown)}</pre></details>")
    return f"<h2>Samples</h2>{''.join(parts)}" if parts else ""


def events_section(runs: Sequence[Run]) -> str:
    """The event log, newest first."""
    parts = []
    for run in runs:
        if not run.events:
            continue
        rows = [[_when(e["time"]), e["event"], _fields(e)] for e in reversed(run.events[-_MOST_ROWS:])]
        note = _cut_note(len(run.events), _MOST_ROWS)
        title = f"{html.escape(run.name)}: " if len(runs) > 1 else ""
        parts.append(
            f"<details><summary>{title}{len(run.events):,} events</summary>{note}"
            f'<input type="search" placeholder="search, such as checkpoint" aria-label="search the events">'
            f"{table(['time (UTC)', 'event', 'fields'], rows)}</details>"
        )
    return f"<h2>Events</h2>{''.join(parts)}" if parts else ""


def _fields(event: dict[str, Any]) -> str:
    values = {name: value for name, value in event.items() if name not in ("time", "event")}
    if event["event"] == "goodput":
        seconds = values["seconds"]
        values["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    texts = (value if isinstance(value, str) else json.dumps(value) for value in values.values())
    return ", ".join(f"{name} {text}" for name, text in zip(values, texts, strict=True))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def _caption(runs: Sequence[Run], run: Run) -> str:
    return f"<b>{html.escape(run.name)}</b>" if len(runs) > 1 else ""


def _cut_note(count: int, limit: int) -> str:
    return f'<div class="faint">the last {limit:,} of {count:,}</div>' if count > limit else ""


def _number(value: float | None) -> str:
    return "" if value is None else short(value)


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
