"""Interactive figures, drawn by plotly: a page of their own, or a part of another page."""

from __future__ import annotations

import html
from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from orchestration.reporting.drawing.matplotlib_figures import draw_figure
from orchestration.reporting.figures import COLOURS, FigureInfo, Series, figure_info
from orchestration.reporting.html_pages import write_page
from orchestration.reporting.study_results import StudyResults
from orchestration.reporting.training_figures import Confusion

_LABELLED = 12
"""Most points of a series that have labels beside them; the labels of more appear on hovering."""
_LOOK: dict[str, Any] = {
    "template": "simple_white",
    "margin": {"l": 60, "r": 20, "t": 20, "b": 60},
    "height": 430,
    "legend": {"orientation": "h", "y": -0.22},
    "font": {"size": 12},
}


def write_figure(results: StudyResults, file: Path) -> None:
    """Write a study's figure as png, pdf, svg or html, by the suffix of ``file``.

    The HTML page is interactive and needs no other file.

    Raises:
        UserError: the format is unknown, or a model's reconstructions are missing.
    """
    if file.suffix.lower() != ".html":
        draw_figure(results, file)
        return
    figure = study_chart(results)
    script = plotly_script()
    # Masks and reconstructions have no chart: the page has their picture, without the script.
    if not figure:
        figure = Markup('<img src="{}" alt="">').format(picture(results))
        script = Markup("")
    write_page(file, "figure.html", title=results.study.file.title, script=script, figure=figure)


def study_chart(results: StudyResults) -> Markup:
    """Return a study's figure as a part of a page; empty for masks and reconstructions."""
    if results.study.file.figure.kind in ("masks", "reconstructions"):
        return Markup("")
    return chart(figure_info(results))


def plotly_script() -> Markup:
    """Return plotly's own script (4.8 MB), which a page needs once."""
    # The text is plotly's own: nothing in it comes from a user.
    return Markup(f"<script>{get_plotlyjs()}</script>")  # noqa: S704


def chart(info: FigureInfo) -> Markup:
    """Return a figure as a part of a page."""
    figure: Any = go.Figure()
    names = list(dict.fromkeys(series.name.removesuffix(", paper") for series in info.series))
    for series in info.series:
        colour = COLOURS[names.index(series.name.removesuffix(", paper")) % len(COLOURS)]
        figure.add_trace(_trace(info, series, colour))
    if info.chance is not None:
        figure.add_hline(info.chance, line={"dash": "dot", "color": "#666", "width": 1.5})
        # The line's name is in the legend, because beside the line it would cover points. An empty
        # trace makes the entry.
        legend = {
            "mode": "lines",
            "line": {"dash": "dot", "color": "#666"},
            "name": f"chance level, {info.chance:.2f} %",
        }
        figure.add_trace(go.Scatter(x=[None], y=[None], hoverinfo="skip", **legend))
    figure.update_layout(xaxis_title=info.x_title, yaxis_title=info.y_title, **_LOOK)
    if info.has_log_x:
        figure.update_xaxes(type="log")
    return part_of_page(figure)


def confusion_chart(confusion: Confusion) -> Markup:
    """Return a confusion matrix as part of a page.

    Colours show the shares of each class; the counts appear on hovering.
    """
    counts = confusion.counts
    # A class without test videos has a row of zeros: divided by 1, not by 0.
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    # plotly renders some HTML tags in labels.
    names = [html.escape(name) for name in confusion.names]
    heat = go.Heatmap(
        x=names,
        y=names,
        z=shares.tolist(),
        customdata=counts.tolist(),
        colorscale="Blues",
        zmin=0,
        zmax=1,
        hovertemplate="%{y} taken for %{x}: %{customdata} videos (%{z:.0%})<extra></extra>",
    )
    figure: Any = go.Figure(heat)
    figure.update_layout(xaxis_title="taken for", yaxis_title="class", **_LOOK)
    # The first class at the top, as in a printed matrix.
    figure.update_yaxes(autorange="reversed")
    return part_of_page(figure)


def _trace(info: FigureInfo, series: Series, colour: str) -> Any:
    """Return plotly's trace of a series: bars, a line or labelled points."""
    bars = {"type": "data", "array": list(series.error), "visible": any(series.error)}
    x = list(series.x)
    y = list(series.y)
    name = html.escape(series.name)
    labels = [html.escape(label) for label in series.labels]
    hover = "%{text}<br>%{y}<extra>%{fullData.name}</extra>"
    if info.kind == "bars":
        return go.Bar(
            x=labels,
            y=y,
            error_y=bars,
            text=labels,
            textposition="none",
            name=name,
            marker_color=colour,
            hovertemplate=hover,
        )
    if series.is_line:
        # With more curves than colours, dashes distinguish those of one colour. A front is grey.
        line: dict[str, Any] = {"color": colour if info.kind == "curves" else "#999"}
        if info.kind == "curves":
            number = [each.name for each in info.series].index(series.name)
            line["dash"] = ("solid", "dash", "dot")[number // len(COLOURS) % 3]
        return go.Scatter(
            x=x, y=y, text=labels, mode="lines+markers", line=line, name=name, hovertemplate=hover
        )
    marker = {"color": colour, "size": 9, "symbol": "circle-open" if series.is_papers else "circle"}
    hover = "%{text}<br>%{x}, %{y}<extra>%{fullData.name}</extra>"
    mode = "markers+text" if len(labels) <= _LABELLED else "markers"
    return go.Scatter(
        x=x,
        y=y,
        error_y=bars,
        text=labels,
        mode=mode,
        textposition="top center",
        textfont={"size": 10, "color": colour},
        cliponaxis=False,
        marker=marker,
        name=name,
        hovertemplate=hover,
    )


def part_of_page(figure: Any) -> Markup:
    """Return a plotly figure as a part of a page, which must contain plotly's script."""
    config = {"responsive": True, "displaylogo": False}
    html_text = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    # plotly writes the data as JSON. Names that it shows as HTML are escaped when a trace is made.
    return Markup(html_text)  # noqa: S704


def picture(results: StudyResults) -> str:
    """Return a study's figure as a data URI.

    Raises:
        UserError: a model's reconstructions are missing.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "figure.png"
        draw_figure(results, file)
        return f"data:image/png;base64,{b64encode(file.read_bytes()).decode()}"
