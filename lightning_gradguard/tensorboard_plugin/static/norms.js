// Norms: what one looks at first, on one axis: the norm before and after clipping with its limit, the loss, the learning rate,
// the weights and how far they move, and what was clipped and skipped.

import { count, counted, fill, h, number, plain } from "./dom.js";
import { Marks } from "./kinds.js";
import { axis, draw, heightBelow, layout, logAxis, STEP_AXIS, vertical, zooms } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";

const GAP_PX = 12;
const PANEL_PX = [46, 76];
const MAIN_PX = 190;
const LEGEND_PX = 44;

const inSteps = (number) => counted(number, "step");

const real = (values) => values.filter((value) => typeof value === "number");

// These are measured at the steps that are due; a step that is logged for its alert is no gap in them.
const AT_DUE_STEPS = ["learning_rate", "weight_norm", "update_ratio"];

// The panels below the norms: title, and the curves in it as [name, field, colour, more].
const PANELS = [
  ["clip<br>coef.", [["clip coefficient", "clip_coef", "clipped"]], { range: [0, 1.05], nticks: 3 }],
  ["loss", [["loss", "loss", "quiet"]], "log"],
  ["learning<br>rate", [["learning rate", "learning_rate", "accent"]], { rangemode: "tozero" }],
  ["update /<br>weight", [["update over weights, of the step before", "update_ratio", "other"]], "log"],
  ["weight<br>norm", [["weight norm", "weight_norm", "text"]], { rangemode: "tozero" }],
  ["steps<br>so far", [["clipped so far", "clipped_so_far", "clipped"], ["skipped so far", "skipped_so_far", "guilty", { dash: "dash" }]], { rangemode: "tozero" }],
];

export class NormsView {
  constructor(tab) {
    this.tab = tab;
    this.plot = h("div", { class: "plot" });
    this.words = h("p", { class: "words" });
    this.element = h("div", {}, this.words, this.plot);
  }

  async update() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const data = await this.tab.ask("norms", { from: state.from, to: state.to });
    if (turn !== this.turn) return;
    const { steps } = data;
    const clipped = data.num_clipped === null
      ? `${inSteps(data.num_skipped)} skipped so far; what is clipped after the guard is not known here.`
      : `${inSteps(data.num_clipped)} clipped, ${count(data.num_skipped)} skipped so far.`;
    const shown = data.num_steps > steps.length ? ` ${count(steps.length)} of ${counted(data.num_steps, "logged step")} are drawn, all extremes among them.` : "";
    fill(
      this.words, clipped, shown, " Drag to zoom, double-click to see all, click to choose a step. ",
      (state.from || state.to) && h("button", { onclick: () => set({ from: null, to: null }) }, "All steps"),
    );
    const line = (name, y, more, extra = {}) => ({
      name, type: "scatter", mode: real(y).length > 1 ? "lines" : "markers", x: steps, y, line: { width: 1.5, ...more }, marker: { color: more.color },
      hovertemplate: "%{y:.4g}", ...extra,
    });
    const limitText = data.explosion_limit.map((limit, index) => {
      const ratio = limit / data.global_norm[index];
      return Number.isFinite(ratio) ? `${number(ratio)} times the norm here` : "";
    });
    const panels = PANELS.filter(([, curves]) => curves.some(([, field]) => real(data[field]).length > 0));
    const marks = new Marks(data.marks, plain);
    const room = heightBelow(this.plot, 420) - LEGEND_PX - 40 - marks.height;
    // The panels leave the norm its room, become lower where there is little, and higher on a large screen.
    const highest = Math.max(PANEL_PX[1], room / 12);
    const panel = Math.min(Math.max((room - MAIN_PX) / Math.max(panels.length, 1) - GAP_PX, PANEL_PX[0]), highest);
    const below = panels.length * (panel + GAP_PX);
    const main = Math.max(room - below, MAIN_PX);
    const inner = marks.height + main + below;
    const traces = [
      line("global norm", data.global_norm, { color: colour("accent"), width: 2 }),
      line("after clipping", data.clipped_norm, { color: colour("clipped"), dash: "dot" }),
      line("explosion limit", data.explosion_limit, { color: colour("explosion"), dash: "dash" }, {
        text: limitText, hovertemplate: "%{y:.4g}, %{text}<br>  (from the median and spread of the norms before; max_norm, if that is smaller)",
      }),
      ...marks.traces("y9"),
      ...panels.flatMap(([, curves], index) =>
        curves.map(([name, field, paint, more = {}]) => line(name, data[field], { color: colour(paint), ...more }, { yaxis: `y${index + 2}`, showlegend: false, connectgaps: AT_DUE_STEPS.includes(field) }))),
    ];
    const titled = (text, more) => axis({ title: { text, font: { size: 11 }, standoff: 4 }, fixedrange: true, ...more });
    const panelAxes = panels.map(([title, curves, kind], index) => {
      const top = (panels.length - index) * (panel + GAP_PX) - GAP_PX;
      const values = curves.map(([, field]) => real(data[field]));
      const isLog = kind === "log" && values.flat().every((value) => value > 0);
      return [`yaxis${index + 2}`, titled(title, { domain: [(top - panel) / inner, top / inner], nticks: 4, ...(isLog ? logAxis(values, 3) : kind === "log" ? {} : kind) })];
    });
    const [first, last] = [steps[0] ?? 0, steps[steps.length - 1] ?? 1];
    const settings = layout({
      height: inner + LEGEND_PX + 40,
      hovermode: "x unified",
      margin: { l: 84, r: 16, t: LEGEND_PX, b: 40 },
      shapes: state.step === null ? [] : [vertical(Number(state.step), "select", { dash: "dot" })],
      xaxis: axis({ ...STEP_AXIS, anchor: panels.length ? `y${panels.length + 1}` : "y", range: [first - 1, last + 0.01 * (last - first) + 1] }),
      yaxis: titled("gradient norm", { ...logAxis([data.global_norm, data.explosion_limit, data.clipped_norm], 8), domain: [below / inner, (below + main) / inner] }),
      ...Object.fromEntries(panelAxes),
      yaxis9: marks.axis((below + main) / inner, 1),
    });
    await draw(this.plot, traces, settings, `Gradient norm before and after clipping. ${clipped}`);
    if (this.plot.dataset.listens) return;
    this.plot.dataset.listens = "true";
    zooms(this.plot, set);
    this.plot.on("plotly_click", ({ points }) => {
      const marked = points.find((point) => typeof point.customdata === "string");
      set(marked ? { alert: marked.customdata, step: marked.x } : { step: points[0].x });
    });
  }
}
