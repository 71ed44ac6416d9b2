// Norms: the whole model before and after clipping, with the limit of an explosion, and how much was clipped.

import { count, fill, h } from "./dom.js";
import { axis, draw, heightBelow, layout, MARK_AXIS, markTraces, STEP_AXIS, vertical, zooms } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";

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
    const line = (name, y, more, extra = {}) => ({
      name, type: "scatter", mode: steps.length > 1 ? "lines" : "markers", x: steps, y, line: { width: 1.5, ...more },
      hovertemplate: "%{y:.4g}", ...extra,
    });
    const hasLoss = data.loss.some((value) => typeof value === "number");
    const height = heightBelow(this.plot, 420, 760);
    const [first, last] = [steps[0] ?? 0, steps[steps.length - 1] ?? 1];
    const isPositive = data.loss.every((value) => typeof value !== "number" || value > 0);
    const traces = [
      line("global norm", data.global_norm, { color: colour("accent"), width: 2 }),
      line("after clipping", data.clipped_norm, { color: colour("clipped") }),
      line("explosion limit", data.explosion_limit, { color: colour("explosion"), dash: "dash" }),
      line("clip coefficient", data.clip_coef, { color: colour("clipped") }, { yaxis: "y2", showlegend: false }),
      ...(hasLoss ? [line("loss", data.loss, { color: colour("quiet") }, { yaxis: "y3", showlegend: false })] : []),
      ...markTraces(data.marks, 0.56 * height - 40),
    ];
    const domains = hasLoss ? [[0.44, 1], [0.23, 0.38], [0, 0.17]] : [[0.3, 1], [0, 0.22], [0, 0.001]];
    const titled = (text, more) => axis({ title: { text, font: { size: 11 } }, ...more });
    const settings = layout({
      height,
      hovermode: "x unified",
      margin: { l: 64, r: 16, t: 30, b: 40 },
      shapes: state.step === null ? [] : [vertical(Number(state.step), "select", { dash: "dot" })],
      xaxis: axis({ ...STEP_AXIS, anchor: hasLoss ? "y3" : "y2", range: [first - 1, last + 0.01 * (last - first) + 1] }),
      yaxis: titled("norm", { type: "log", domain: domains[0], exponentformat: "power", fixedrange: true }),
      yaxis2: titled("clip coefficient", { domain: domains[1], range: [0, 1.05], fixedrange: true }),
      ...(hasLoss ? { yaxis3: titled("loss", { domain: domains[2], fixedrange: true, nticks: 4, type: isPositive ? "log" : "linear", exponentformat: "power" }) } : {}),
      yaxis9: MARK_AXIS,
    });
    const clipped = `${count(data.num_clipped)} steps clipped, ${count(data.num_skipped)} skipped so far.`;
    const shown = data.num_steps > steps.length ? ` ${count(steps.length)} of ${count(data.num_steps)} logged steps are drawn, all extremes among them.` : "";
    fill(
      this.words, clipped, shown, " Drag to zoom, double-click to see all, click to choose a step. ",
      (state.from || state.to) && h("button", { onclick: () => set({ from: null, to: null }) }, "All steps"),
    );
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
