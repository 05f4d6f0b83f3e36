"""The page: headline numbers, curves, time, restarts, samples, config and events of one run or several."""

import html
from collections.abc import Sequence

from mamba_jax.report.assets import SCRIPT, STYLE
from mamba_jax.report.curves import Curve, draw, short
from mamba_jax.report.run import Run
from mamba_jax.report.sections import (
    config_section,
    events_section,
    goodput_section,
    lineage_section,
    restarts_section,
    samples_section,
    skipped_section,
    table,
)

# (title, unit, ((kind, name, label), ...))
_CHARTS = (
    (
        "Loss",
        "nats per token",
        (
            ("train", "cross_entropy", "training"),
            ("validation", "loss", "held-out"),
            ("validation_ema", "loss", "held-out, averaged weights"),
        ),
    ),
    (
        "Held-out bits per byte",
        "",
        (
            ("validation", "bits_per_byte", "held-out"),
            ("validation_ema", "bits_per_byte", "held-out, averaged weights"),
        ),
    ),
    ("Gradient norm", "before clipping", (("train", "grad_norm", "gradient norm"),)),
    ("Learning rate", "", (("train", "learning_rate", "learning rate"),)),
    ("Epochs", "passes over the text", (("train", "epochs", "epochs"),)),
    ("Speed", "tokens per second", (("train", "tokens_per_second", "tokens/s"),)),
    ("Model FLOP utilization", "share of peak", (("train", "mfu", "MFU"),)),
)
_COLORS = 8


def render(runs: Sequence[Run]) -> str:
    """The page as one self-contained HTML text.

    Args:
        runs: one, or several to compare; at least one.
    """
    title = " · ".join(run.name for run in runs)
    head = f"<h1>{html.escape(title)}</h1>"
    if len(runs) == 1:
        head += f'<div class="faint">{html.escape(runs[0].status)} · {html.escape(str(runs[0].folder))}</div>'
    body = "".join(
        [
            head,
            _headline(runs),
            lineage_section(runs),
            _curves(runs),
            goodput_section(runs),
            restarts_section(runs),
            skipped_section(runs),
            config_section(runs),
            samples_section(runs),
            events_section(runs),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _headline(runs: Sequence[Run]) -> str:
    """HTML of the most important numbers: tiles for a single run, a table with a row for each of several."""
    tiles = [_tiles(run) for run in runs]
    if len(runs) == 1:
        parts = (f'<div class="tile"><small>{name}</small><b>{value}</b></div>' for name, value in tiles[0].items())
        return f'<div class="tiles">{"".join(parts)}</div>'
    names = list(dict.fromkeys(name for row in tiles for name in row))
    rows = [
        [run.name, run.status, str(run.folder), *(row.get(name, "") for name in names)]
        for run, row in zip(runs, tiles, strict=True)
    ]
    return f'<h2>Runs</h2><div class="card">{table(["name", "status", "folder", *names], rows)}</div>'


def _tiles(run: Run) -> dict[str, str]:
    """Label -> text; what a run does not tell is left out."""
    known = {
        "loss": (run.last("train", "cross_entropy"), "{:.4f}"),
        "held-out loss": (run.last("validation", "loss"), "{:.4f}"),
        "bits per byte": (run.last("validation", "bits_per_byte"), "{:.4f}"),
        "held-out loss, averaged": (run.last("validation_ema", "loss"), "{:.4f}"),
        "tokens/s": (run.last("train", "tokens_per_second"), "{:,.0f}"),
        "MFU": (run.last("train", "mfu"), "{:.1%}"),
        "goodput": (run.goodput.goodput if run.goodput is not None else None, "{:.1%}"),
    }
    of_total = "" if run.num_steps is None else f" / {run.num_steps:,}"
    tiles = {"step": f"{run.step:,}{of_total}"}
    tiles.update({name: form.format(value) for name, (value, form) in known.items() if value is not None})
    if (tokens := run.last("train", "tokens")) is not None:
        tiles["tokens"] = short(tokens)
    starts = [event for event in run.events if {"parameters", "trained_parameters"} <= event.keys()]
    if starts:
        count, trained = starts[-1]["parameters"], starts[-1]["trained_parameters"]
        tiles["parameters"] = short(float(count))
        if trained != count:
            tiles["trained"] = f"{short(float(trained))} ({trained / max(count, 1):.2%})"
    if run.goodput is not None:
        tiles["restarts"] = str(run.goodput.starts - 1)
    if skipped := run.last("train", "skipped"):
        tiles["skipped steps"] = f"{skipped:,.0f}"
    return tiles


def _curves(runs: Sequence[Run]) -> str:
    charts = "".join(draw(title, unit, _chart(runs, _with_parts(runs, names))) for title, unit, names in _CHARTS)
    if not charts:
        return '<p class="faint">No metrics yet.</p>'
    return (
        '<h2>Curves</h2><p><label><input type="checkbox" id="log-steps"> logarithmic steps</label></p>'
        f'<div class="charts">{charts}</div>'
    )


def _with_parts(runs: Sequence[Run], names: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The numbers of a chart, and behind them the same ones of each part of a mixture, named behind a slash."""
    known = sorted({key for run in runs for key in run.series})
    found = list(names)
    for kind, name, label in names:
        for own_kind, own_name in known:
            of_kind, _, held_out_part = own_kind.partition("/")
            of_name, _, trained_part = own_name.partition("/")
            if (of_kind, of_name) == (kind, name) and (part := held_out_part or trained_part):
                found.append((own_kind, own_name, f"{label}, {part}"))
    return found


def _chart(runs: Sequence[Run], names: Sequence[tuple[str, str, str]]) -> list[Curve]:
    """One run takes a colour for each number, several take one for each run."""
    return [
        Curve(
            label=label if len(runs) == 1 else f"{run.name}, {label}" if len(names) > 1 else run.name,
            series=run.series[kind, name],
            color=(place if len(runs) == 1 else index) % _COLORS,
            is_marked=kind != "train",
        )
        for index, run in enumerate(runs)
        for place, (kind, name, label) in enumerate(names)
        if (kind, name) in run.series
    ]
