// Distribution: how large the elements of one parameter's gradient are, over time, and how many have no logarithm.

import { count, counted, fill, h, plain } from "./dom.js";
import { axis, draw, heightBelow, layout, STEP_AXIS, vertical } from "./plot.js";
import { set, state } from "./state.js";
import { colour, colours } from "./theme.js";
import { scale } from "./heat.js";

// The borders between histograms: in the middle between two steps.
function edgesOf(steps) {
  if (steps.length < 2) return steps.flatMap((step) => [step - 0.5, step + 0.5]);
  const middles = steps.slice(1).map((step, index) => (step + steps[index]) / 2);
  return [2 * steps[0] - middles[0], ...middles, 2 * steps[steps.length - 1] - middles[middles.length - 1]];
}

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
      fill(this.picker, leaves.map((leaf) => h("option", { value: paths[leaf] }, plain(paths[leaf], 120, false))));
    }
    this.picker.value = paths[node];
    const data = await this.tab.ask("distribution", { parameter: parameters[node] });
    if (turn !== this.turn) return;
    const hasHistograms = data.steps.length > 0;
    fill(this.words, `${counted(numels[node], "element")} in ${counted(ndims[node], "dimension")}; `, this.numberOf(data), this.damage(data), this.beyond(data));
    this.plot.hidden = !hasHistograms;
    if (!hasHistograms) return;
    const share = (name, text, more) => ({
      name: text, type: "scatter", mode: "lines+markers", x: data.steps, y: data[name], yaxis: "y2", marker: { size: 5, ...more },
      line: { width: 1.5, color: colour(name) }, hovertemplate: `%{y:.3%} ${text}<extra></extra>`,
    });
    const bad = (name, text, steps, symbol) => ({
      name: `${text} in the gradient`, type: "scatter", mode: "markers", x: steps, y: steps.map(() => 0.5), yaxis: "y9", cliponaxis: false,
      marker: { symbol, size: 10, color: colour(name) }, hovertemplate: `step %{x:,}: ${text} in this gradient<extra></extra>`, showlegend: steps.length > 0,
    });
    const rows = data.edges.slice(1);
    const [isOpenBelow, isOpenAbove] = data.is_open;
    const magnitude = (bin) => {
      if (bin === 0 && isOpenBelow) return `|g| up to 1e${rows[bin]}`;
      if (bin === rows.length - 1 && isOpenAbove) return `|g| from 1e${data.edges[bin]}`;
      return `|g| from 1e${data.edges[bin]} to 1e${rows[bin]}`;
    };
    const largest = data.shares.flat().reduce((most, one) => Math.max(most, one), 0);
    const traces = [
      {
        type: "heatmap", x: edgesOf(data.steps), y: data.edges, z: rows.map((_, bin) => data.shares.map((row) => row[bin] || null)),
        customdata: rows.map((_, bin) => data.shares.map(() => magnitude(bin))), colorscale: scale(colours("share")), zmin: 0, zmax: largest || 1,
        colorbar: { title: { text: "share", font: { size: 11 } }, tickformat: ".2~%", thickness: 12, len: 0.6, y: 0.65, tickfont: { size: 11 } },
        hovertemplate: "step %{x:,}<br>%{customdata}<br>%{z:.2%} of the elements<extra></extra>",
      },
      share("zero", "exactly 0", { symbol: "triangle-down" }), share("nan", "NaN", { symbol: "x" }), share("inf", "Inf", { symbol: "triangle-up" }),
      bad("nan", "NaN", data.nan_steps, "x"), bad("inf", "Inf", data.inf_steps, "triangle-up"),
    ];
    const settings = layout({
      height: heightBelow(this.plot, 380), margin: { l: 64, r: 16, t: 44, b: 40 }, showlegend: true,
      shapes: state.step === null ? [] : [vertical(Number(state.step), "select", { dash: "dot" })],
      xaxis: axis({ ...STEP_AXIS, anchor: "y2", fixedrange: true, range: [data.first_step - 1, data.last_step + 1] }),
      yaxis: axis({ title: { text: "|g|", font: { size: 11 } }, domain: [0.3, 0.95], tickprefix: "10<sup>", ticksuffix: "</sup>", fixedrange: true, ...(data.edges.length > 5 ? { dtick: Math.ceil(data.edges.length / 24) } : {}) }),
      yaxis2: axis({ title: { text: "share", font: { size: 11 } }, domain: [0, 0.22], tickformat: ".0%", rangemode: "tozero", fixedrange: true }),
      yaxis9: { domain: [0.95, 1], range: [0, 1], visible: false, fixedrange: true, anchor: "x" },
    });
    await draw(this.plot, traces, settings, `Gradient magnitudes of ${paths[node]} over ${counted(data.steps.length, "histogram")}.`);
    if (this.plot.dataset.listens) return;
    this.plot.dataset.listens = "true";
    this.plot.on("plotly_click", ({ points }) => set({ step: Math.round(points[0].x) }));
  }

  // Bins end somewhere; what lies beyond is in the last ones.
  beyond({ is_open: [below, above], edges }) {
    const parts = [below && `The lowest row holds all that is smaller, too: up to 1e${edges[1]}.`, above && `The highest row holds all that is larger, too: from 1e${edges[edges.length - 2]} on.`];
    return parts.filter(Boolean).map((text) => ` ${text}`).join("");
  }

  numberOf({ num_histograms: number, num_clipped: clipped, steps }) {
    if (!number) return "no histogram of it has been logged yet (the default is one every 100 steps: histogram_every_n_steps). ";
    const drawn = steps.length < number ? `, ${count(steps.length)} of them drawn` : "";
    const some = clipped < number ? `, ${count(clipped)} of them` : "";
    const after = clipped ? `${some} of the gradient after clipping, as the optimizer got it; skipped steps have none` : "";
    return `${counted(number, "histogram")}${drawn}${after}. `;
  }

  damage({ nan_steps: nan, inf_steps: inf, num_steps: steps }) {
    const seen = [["NaN", nan], ["Inf", inf]].filter(([, where]) => where.length);
    if (!seen.length) return `No NaN or Inf in its gradient at any of ${counted(steps, "logged step")}.`;
    return seen.map(([what, where]) => `${what} at ${count(where.length)} of ${counted(steps, "logged step")}, first at step ${count(where[0])}. `).join("");
  }
}
