// What all plots have in common.

import { colour } from "./theme.js";

export const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false };

export function axis(more = {}) {
  return {
    gridcolor: colour("grid"),
    linecolor: colour("line"),
    zeroline: false,
    tickfont: { size: 11, color: colour("quiet") },
    ...more,
  };
}

export const STEP_AXIS = { title: { text: "step", font: { size: 11 }, standoff: 4 }, tickformat: ",d" };

export function layout(more = {}) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: colour("plot"),
    font: { family: "Roboto, system-ui, sans-serif", size: 12, color: colour("text") },
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("text") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    margin: { l: 60, r: 16, t: 8, b: 36 },
    dragmode: "zoom",
    ...more,
  };
}

export async function draw(element, traces, settings, label) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  await window.Plotly.react(element, traces, settings, CONFIG);
  element.dataset.drawn = String(Number(element.dataset.drawn ?? 0) + 1);
}

export function vertical(x, name, more = {}) {
  const line = { color: colour(name), width: 1.5, ...more };
  return { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line };
}

// A stretch that was dragged out is asked for anew, in more detail. A double click goes back to everything.
export function zooms(element, set) {
  element.on("plotly_relayout", (change) => {
    const [from, to] = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (from !== undefined && to !== undefined) set({ from: Math.floor(from), to: Math.ceil(to) });
  });
  element.on("plotly_doubleclick", () => set({ from: null, to: null }));
}

export function kindColour(kind) {
  const known = ["nonfinite", "explosion", "vanishing", "overflow"];
  return colour(known.includes(kind) ? kind : "other");
}

// The height that is left below an element, so that a view fits the window.
export function heightBelow(element, least, most) {
  const room = window.innerHeight - element.getBoundingClientRect().top - 20;
  return Math.round(Math.min(Math.max(room, least), most));
}

// Alerts and skipped steps as symbols at the top of a plot of that height.
export function markTraces(marks, height) {
  const alerts = marks.filter((mark) => mark.alerts);
  const skips = marks.filter((mark) => mark.skips);
  const what = (mark) => `step ${mark.x.toLocaleString("en-US")}: ${mark.kinds.length ? `${mark.alerts} alert(s)` : ""}`;
  return [
    {
      name: "alert", type: "scatter", mode: "markers", yaxis: "y9", cliponaxis: false, showlegend: alerts.length > 0,
      x: alerts.map((mark) => mark.x), y: alerts.map(() => 1 - 9 / height), customdata: alerts.map((mark) => mark.id),
      marker: {
        symbol: "triangle-down", size: 13, line: { width: 1, color: colour("plot") },
        color: alerts.map((mark) => kindColour(mark.kinds[0])),
      },
      text: alerts.map(what), hovertemplate: "%{text}<extra></extra>",
    },
    {
      name: "step skipped", type: "scatter", mode: "markers", yaxis: "y9", cliponaxis: false, showlegend: skips.length > 0,
      x: skips.map((mark) => mark.x), y: skips.map(() => 1 - 24 / height),
      marker: { symbol: "x-thin", size: 8, line: { width: 2, color: colour("text") } },
      text: skips.map((mark) => `${mark.skips} step(s) skipped`), hovertemplate: "%{text}<extra></extra>",
    },
  ];
}

export const MARK_AXIS = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };
