// Distribution: how large the elements of one parameter's gradient are, over time, and how many have no logarithm.

import { count, fill, h } from "./dom.js";
import { axis, draw, heightBelow, layout, STEP_AXIS, vertical } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";

export class DistributionView {
  constructor(tab) {
    this.tab = tab;
    this.picker = h("select", { id: "parameter", onchange: (event) => set({ parameter: event.target.value }) });
    this.words = h("p", { class: "words" });
    this.plot = h("div", { class: "plot" });
    this.element = h(
      "div", {}, h("div", { class: "tools" }, h("label", { for: "parameter" }, "Parameter ", this.picker)), this.words, this.plot,
    );
  }

  async update() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const { paths, parameters, numels, ndims } = this.tab.layout;
    const leaves = paths.map((_, node) => node).filter((node) => parameters[node] >= 0);
    const culprit = this.tab.incident.culprits.find((name) => paths.includes(name));
    const node = leaves.find((leaf) => paths[leaf] === state.parameter) ?? leaves.find((leaf) => paths[leaf] === culprit) ?? leaves[0];
    if (this.layout !== this.tab.layout) {
      this.layout = this.tab.layout;
      fill(this.picker, leaves.map((leaf) => h("option", { value: paths[leaf] }, paths[leaf])));
    }
    this.picker.value = paths[node];
    const data = await this.tab.ask("distribution", { parameter: parameters[node] });
    if (turn !== this.turn) return;
    const hasHistograms = data.steps.length > 0;
    const worst = ["nan", "inf"].reduce((sum, name) => sum + data[name].filter((share) => typeof share === "number" && share > 0).length, 0);
    fill(
      this.words,
      hasHistograms
        ? `${count(numels[node])} elements in ${ndims[node]} dimension(s), ${count(data.steps.length)} histograms. ` +
          (worst ? `NaN or Inf in ${worst} of them.` : "No NaN or Inf in any of them.")
        : "There is no histogram of this parameter yet. They are logged every 100 steps: GradGuard(histogram_every_n_steps=100).",
    );
    this.plot.hidden = !hasHistograms;
    if (!hasHistograms) return;
    const middle = data.edges.slice(1).map((edge, index) => (edge + data.edges[index]) / 2);
    const share = (name, text) => ({
      name: text, type: "scatter", mode: "lines+markers", x: data.apart_steps, y: data[name], yaxis: "y2", marker: { size: 4 },
      line: { width: 1.5, color: colour(name) }, hovertemplate: `%{y:.3%} ${text}<extra></extra>`,
    });
    const traces = [
      {
        type: "heatmap", x: data.steps, y: middle, z: middle.map((_, bin) => data.shares.map((row) => row[bin] || null)),
        colorscale: [[0, colour("ramp0")], [0.5, colour("ramp1")], [1, colour("ramp2")]], zmin: 0,
        colorbar: { title: { text: "share", font: { size: 11 } }, tickformat: ".0%", thickness: 12, len: 0.6, y: 0.7, tickfont: { size: 11 } },
        hovertemplate: "step %{x:,}<br>|g| about 1e%{y:.2f}<br>%{z:.2%} of the elements<extra></extra>",
      },
      share("zero", "zero"), share("nan", "NaN"), share("inf", "Inf"),
    ];
    const settings = layout({
      height: heightBelow(this.plot, 380, 640), margin: { l: 64, r: 16, t: 10, b: 64 },
      legend: { orientation: "h", x: 0, y: -0.14, yanchor: "top" },
      shapes: state.step === null ? [] : [vertical(Number(state.step), "select", { dash: "dot" })],
      xaxis: axis({ ...STEP_AXIS, anchor: "y2", fixedrange: true }),
      yaxis: axis({ title: { text: "|g|", font: { size: 11 } }, domain: [0.3, 1], tickprefix: "10<sup>", ticksuffix: "</sup>", fixedrange: true }),
      yaxis2: axis({ title: { text: "share", font: { size: 11 } }, domain: [0, 0.2], tickformat: ".0%", rangemode: "tozero", fixedrange: true }),
    });
    await draw(this.plot, traces, settings, `Gradient magnitudes of ${paths[node]} over ${data.steps.length} histograms.`);
    if (this.plot.dataset.listens) return;
    this.plot.dataset.listens = "true";
    this.plot.on("plotly_click", ({ points }) => set({ step: points[0].x }));
  }
}
