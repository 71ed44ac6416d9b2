// Depth profile: the norm of each parameter at one step, from the first layer to the last, beside what is usual for it.

import { decades, INFINITE, isFinite16, NAN, nameOf, NO_GRADIENT, unpack, ZERO } from "./api.js";
import { count, counted, fill, h, number, plain } from "./dom.js";
import { axis, draw, heightBelow, layout, logAxis } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";

const MAX_LABELS = 40;
const MAX_JOINED = 200;
const HALF = 0.3;
const LANES = { [NAN]: ["nan", "x", 1.5, "y9"], [INFINITE]: ["inf", "triangle-up", 0.5, "y9"], [ZERO]: ["zero", "triangle-down", 1.5, "y8"], [NO_GRADIENT]: ["quiet", "circle-open", 0.5, "y8"] };

// What has no logarithm is null, which Plotly draws as a gap.
const norm = (code) => (isFinite16(code) ? 10 ** decades(code) : null);

// The band as one outline for each stretch without a gap.
function outlines(low, high) {
  const [x, y] = [[], []];
  let begin = 0;
  for (let end = 0; end <= low.length; end += 1) {
    if (end < low.length && low[end] !== null && high[end] !== null) continue;
    if (end > begin) {
      const inside = Array.from({ length: end - begin }, (_, offset) => begin + offset);
      const [first, last] = [begin, end - 1];
      x.push(first + 1 - HALF, ...inside.map((index) => index + 1), last + 1 + HALF, last + 1 + HALF, ...inside.toReversed().map((index) => index + 1), first + 1 - HALF, null);
      y.push(low[first], ...inside.map((index) => low[index]), low[last], high[last], ...inside.toReversed().map((index) => high[index]), high[first], null);
    }
    begin = end + 1;
  }
  return { x, y };
}

export class DepthView {
  constructor(tab) {
    this.tab = tab;
    this.slider = h("input", { type: "range", "aria-label": "Step", onchange: (event) => set({ step: event.target.value }) });
    this.number = h("input", { type: "number", id: "step", min: 0, onchange: (event) => set({ step: event.target.value }) });
    this.words = h("p", { class: "words" });
    this.plot = h("div", { class: "plot" });
    this.element = h(
      "div", {}, h("div", { class: "tools" }, h("label", { for: "step" }, "Step ", this.number), this.slider), this.words, this.plot,
    );
  }

  async update() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const { alert, culprits } = this.tab.incident;
    const own = alert && this.tab.isOfOptimizer(alert) ? alert : null;
    const data = await this.tab.ask("depth", { step: state.step ?? own?.x });
    if (turn !== this.turn || data.step === null) return;
    const { paths, ndims } = this.tab.layout;
    this.number.value = data.step;
    Object.assign(this.slider, { min: data.first_step, max: data.last_step });
    this.slider.value = data.step;
    const codes = unpack(data.codes);
    const norms = Array.from(codes, norm);
    const [low, middle, high] = data.quantiles.map((text) => Array.from(unpack(text), norm));
    const x = data.nodes.map((_, index) => index + 1);
    const names = data.nodes.map((node) => plain(paths[node]));
    const isWeight = data.nodes.map((node) => ndims[node] >= 2);
    const named = new Set(own?.x === data.step ? culprits : []);
    const isMany = data.nodes.length > MAX_JOINED;
    const at = (indices) => ({ x: indices.map((index) => x[index]), customdata: indices.map((index) => paths[data.nodes[index]]) });
    const points = (title, keep, marker, mode = "markers") => {
      const chosen = data.nodes.map((_, index) => index).filter(keep);
      return {
        name: title, type: "scatter", mode, ...at(chosen), y: chosen.map((index) => norms[index]), text: chosen.map((index) => names[index]),
        hovertemplate: "%{text}<br>norm %{y:.3g}<extra></extra>", marker, line: { width: 2, color: colour("accent") },
      };
    };
    const special = Object.entries(LANES).flatMap(([code, [paint, symbol, y, yaxis]]) => {
      const chosen = data.nodes.map((_, index) => index).filter((index) => codes[index] === Number(code));
      if (!chosen.length) return [];
      return [{
        name: nameOf(Number(code)), type: "scatter", mode: "markers", yaxis, cliponaxis: false, ...at(chosen), y: chosen.map(() => y),
        text: chosen.map((index) => `${names[index]}: ${nameOf(codes[index])}`), hovertemplate: "%{text}<extra></extra>",
        marker: { symbol, size: 11, color: colour(paint), line: { width: symbol.endsWith("open") ? 2 : 0 } },
      }];
    });
    const traces = [
      { name: "usual (10 to 90 %)", type: "scatter", mode: "lines", ...outlines(low, high), line: { width: 0 }, fill: "toself", fillcolor: colour("band"), hoverinfo: "skip" },
      { name: "median", type: "scatter", mode: "lines", x, y: middle, line: { width: 1, dash: "dot", color: colour("quiet") }, hoverinfo: "skip" },
      points("weights", (index) => isWeight[index], { size: isMany ? 4 : 9, color: colour("accent") }, isMany ? "markers" : "lines+markers"),
      points("biases and other vectors", (index) => !isWeight[index], { size: isMany ? 4 : 8, symbol: "circle-open", line: { width: isMany ? 1 : 2 }, color: colour("accent") }),
      points("named by the alert", (index) => named.has(paths[data.nodes[index]]), { size: 16, symbol: "circle-open", line: { width: 2.5 }, color: colour("guilty") }),
      ...special,
    ].filter((trace) => trace.y.some((value) => value !== null));
    const numNone = codes.filter((code) => code === NO_GRADIENT).length;
    const what = `Step ${count(data.step)} of ${count(data.first_step)} to ${count(data.last_step)}: global norm ${number(data.global_norm)}`;
    fill(
      this.words, `${what}. The band is where each parameter's norm lies in 80 % of the logged steps; where it has a gap, there was no number to draw it from.`,
      numNone ? ` ${counted(numNone, "parameter")} had no gradient.` : "",
    );
    const isLabelled = data.nodes.length <= MAX_LABELS && window.innerWidth > 16 * data.nodes.length;
    const lane = (domain) => ({ domain, range: [0, 2], visible: false, fixedrange: true, anchor: "x" });
    const isUsed = (yaxis) => special.some((trace) => trace.yaxis === yaxis);
    const [bottom, top] = [isUsed("y8") ? 0.1 : 0, isUsed("y9") ? 0.9 : 1];
    const settings = layout({
      height: heightBelow(this.plot, 380), margin: { l: 64, r: 16, t: 44, b: isLabelled ? 150 : 40 }, showlegend: true,
      xaxis: axis({
        title: { text: isLabelled ? "" : "parameter, from the first to the last", font: { size: 11 } }, fixedrange: true, range: [0.5, x.length + 0.5], anchor: bottom ? "y8" : "y",
        ...(isLabelled ? { tickmode: "array", tickvals: x, ticktext: data.nodes.map((node) => plain(paths[node], 26)), tickangle: -35 } : {}),
      }),
      yaxis: axis({ ...logAxis([norms, low, high], 8), title: { text: "gradient norm", font: { size: 11 } }, domain: [bottom, top], fixedrange: true }),
      yaxis8: lane([0, Math.max(bottom - 0.01, 0)]), yaxis9: lane([Math.min(top + 0.01, 1), 1]),
    });
    await draw(this.plot, traces, settings, `${what}; ${counted(data.nodes.length, "parameter")}.`);
    if (this.plot.dataset.listens) return;
    this.plot.dataset.listens = "true";
    this.plot.on("plotly_click", ({ points: [point] }) => typeof point.customdata === "string" && set({ parameter: point.customdata }));
  }
}
