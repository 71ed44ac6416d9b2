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

// A logarithmic axis. Over several decades it says each of them once; over less, the numbers between are of use, written out
// (of a bare 5 nobody knows the decade), and over much less there are no round ones but in even steps.
export function logAxis(series, numTicks = 6) {
  const values = series.flat().filter((value) => typeof value === "number" && value > 0);
  const [least, most] = [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), 0)];
  const span = Math.log10(most) - Math.log10(least);
  const power = { type: "log", exponentformat: "power" };
  if (!(span <= 1.5)) return { ...power, dtick: Math.ceil(span / numTicks) || 1 };
  return { ...power, tickformat: "~g", dtick: span > 0.7 ? "D2" : `L${roundStep((most - least || most) / Math.min(numTicks, 4))}` };
}

// The next larger of 1, 2 or 5 times a power of ten.
function roundStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].find((factor) => factor * power >= step) * power;
}

export function layout(more = {}) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: colour("plot"),
    font: { family: "Roboto, system-ui, sans-serif", size: 12, color: colour("text") },
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("text") }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1, yref: "container", yanchor: "top", bgcolor: "rgba(0,0,0,0)" },
    margin: { l: 60, r: 16, t: 8, b: 36 },
    dragmode: "zoom",
    ...more,
  };
}

export async function draw(element, traces, settings, label, role = "img") {
  element.setAttribute("role", role);
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

// The height that is left below an element, so that a view fits the window.
export function heightBelow(element, least, most = 4000) {
  const room = window.innerHeight - element.getBoundingClientRect().top - window.scrollY - 20;
  return Math.round(Math.min(Math.max(room, least), most));
}
