// Depth profile: the norm of each parameter at one step, from the first layer to the last, beside what is usual for it.

import { decades, INFINITE, isFinite16, NAN, nameOf, unpack, ZERO } from "./api.js";
import { count, fill, h, number, plain } from "./dom.js";
import { axis, draw, heightBelow, layout } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";

const MAX_LABELS = 40;
const MAX_JOINED = 200;

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
    const alert = this.tab.incident.alert;
    const data = await this.tab.ask("depth", { step: state.step ?? alert?.x });
    if (turn !== this.turn || data.step === null) return;
    const { paths, labels, ndims } = this.tab.layout;
    this.number.value = data.step;
    Object.assign(this.slider, { min: data.first_step, max: data.last_step });
    this.slider.value = data.step;
    const codes = unpack(data.codes);
    const [low, middle, high] = data.quantiles.map((text) => Array.from(unpack(text), (code) => 10 ** decades(code)));
    const x = data.nodes.map((_, index) => index + 1);
    const names = data.nodes.map((node) => plain(paths[node]));
    const culprits = new Set(this.tab.incident.culprits);
    const isHere = alert && alert.x === data.step;
    const pick = (test) => data.nodes.map((_, index) => index).filter((index) => test(codes[index], index));
    const points = (title, chosen, marker, mode = "markers") => ({
      name: title, type: "scatter", mode, x: chosen.map((index) => x[index]), y: chosen.map((index) => 10 ** decades(codes[index])),
      text: chosen.map((index) => names[index]), customdata: chosen.map((index) => paths[data.nodes[index]]),
      hovertemplate: "%{text}<br>norm %{y:.3g}<extra></extra>", marker, line: { width: 2, color: colour("accent") },
    });
    const isWeight = (index) => ndims[data.nodes[index]] >= 2;
    const special = (test, name, y, symbol) => {
      const chosen = pick(test);
      return {
        name: nameOf(codes[chosen[0]] ?? 0) ?? name, type: "scatter", mode: "markers", yaxis: "y9", showlegend: chosen.length > 0,
        x: chosen.map((index) => x[index]), y: chosen.map(() => y), customdata: chosen.map((index) => paths[data.nodes[index]]),
        text: chosen.map((index) => `${names[index]}: ${nameOf(codes[index])}`), hovertemplate: "%{text}<extra></extra>",
        marker: { symbol, size: 11, color: colour(name) },
      };
    };
    const isMany = data.nodes.length > MAX_JOINED;
    const traces = [
      { name: "10 % quantile", type: "scatter", mode: "lines", x, y: low, line: { width: 0 }, hoverinfo: "skip", showlegend: false },
      { name: "usual (10 to 90 %)", type: "scatter", mode: "lines", x, y: high, line: { width: 0 }, fill: "tonexty", fillcolor: colour("band"), hoverinfo: "skip" },
      { name: "median", type: "scatter", mode: "lines", x, y: middle, line: { width: 1, dash: "dot", color: colour("quiet") }, hoverinfo: "skip" },
      points("weights", pick((code, index) => isFinite16(code) && isWeight(index)), { size: isMany ? 4 : 9, color: colour("accent") }, isMany ? "markers" : "lines+markers"),
      points("biases and other vectors", pick((code, index) => isFinite16(code) && !isWeight(index)), { size: isMany ? 4 : 8, symbol: "circle-open", line: { width: isMany ? 1 : 2 }, color: colour("accent") }),
      ...(isHere
        ? [points("named by the alert", pick((code, index) => isFinite16(code) && culprits.has(paths[data.nodes[index]])), { size: 16, symbol: "circle-open", line: { width: 2.5 }, color: colour("guilty") })]
        : []),
      special((code) => code === NAN, "nan", 0.97, "x"),
      special((code) => code === INFINITE, "inf", 0.97, "triangle-up"),
      special((code) => code === ZERO, "zero", 0.03, "triangle-down"),
    ];
    const isLabelled = data.nodes.length <= MAX_LABELS;
    const settings = layout({
      height: heightBelow(this.plot, 380, 620), margin: { l: 64, r: 16, t: 30, b: isLabelled ? 150 : 40 },
      xaxis: axis({
        title: { text: isLabelled ? "" : "parameter, from the first to the last", font: { size: 11 } }, fixedrange: true, range: [0.5, x.length + 0.5],
        ...(isLabelled ? { tickmode: "array", tickvals: x, ticktext: data.nodes.map((node) => plain(paths[node], 26)), tickangle: -35 } : {}),
      }),
      yaxis: axis({ type: "log", title: { text: "gradient norm", font: { size: 11 } }, exponentformat: "power", fixedrange: true }),
      yaxis9: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    });
    const what = `Step ${count(data.step)} of ${count(data.first_step)} to ${count(data.last_step)}: global norm ${number(data.global_norm)}`;
    fill(this.words, `${what}. The band is where each parameter's norm lies in 80 % of the logged steps.`);
    await draw(this.plot, traces, settings, `${what}; ${count(labels.length && data.nodes.length)} parameters.`);
    if (this.plot.dataset.listens) return;
    this.plot.dataset.listens = "true";
    this.plot.on("plotly_click", ({ points: [point] }) => typeof point.customdata === "string" && set({ parameter: point.customdata }));
  }
}
