// Flow: which part of the model has how large a gradient, when. Modules open and close; rows are in model order, or sorted.

import { NAME_OF_ZERO } from "./api.js";
import { count, counted, fill, h, number, plain, toggle } from "./dom.js";
import { CHANGE_COLOURS, Heat, NORM_COLOURS } from "./heat.js";
import { Marks } from "./kinds.js";
import { axis, draw, heightBelow, layout, logAxis, STEP_AXIS, vertical, zooms } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";
import { Labels, openNodes, visibleNodes } from "./tree.js";

const STRIP_PX = 70;
const SORTS = [["", "model order"], ["norm", "largest norm"], ["change", "largest change"], ["alert", "first alert"]];
const HINT = "A cell reaches from its step to the next that is logged. Click it to choose step and parameter; drag to zoom into steps, double-click to see all.";

const gradient = (list) => `linear-gradient(to right, ${list.join(", ")})`;

export class FlowView {
  constructor(tab) {
    this.tab = tab;
    this.search = h("input", {
      type: "search", id: "search", placeholder: "name, or pattern as *.bias", "aria-label": "Search parameters", value: state.search ?? "",
      oninput: (event) => set({ search: event.target.value || null }),
    });
    this.found = h("span", { class: "quiet", role: "status" });
    this.tools = h("div", { class: "tools" });
    this.finder = h("div", { class: "tools" }, this.search, h("span", { id: "sorting" }), this.found);
    this.strip = h("div", { class: "plot strip" });
    this.readout = h("div", { class: "readout", role: "status" });
    this.labels = new Labels();
    this.heat = new Heat(tab, (text) => fill(this.readout, text ?? HINT));
    this.scroll = h("div", { class: "scroll" }, h("div", { class: "rows" }, this.labels.element, this.heat.element));
    this.element = h("div", { class: "flow" }, this.finder, this.tools, this.strip, this.readout, this.scroll);
  }

  get isList() {
    return Boolean(state.search || state.sort);
  }

  async update() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const range = { from: state.from, to: state.to };
    const open = this.isList ? null : openNodes(this.tab.layout);
    const rows = open ? null : await this.tab.ask("rows", { search: state.search, sort: state.sort });
    if (turn !== this.turn) return;
    const nodes = rows ? rows.nodes : visibleNodes(this.tab.layout, open);
    const [flow, norms] = await Promise.all([this.tab.ask("flow", { nodes: nodes.join(","), ...range }), this.tab.ask("norms", range)]);
    if (turn !== this.turn) return;
    this.heat.take(flow);
    this.drawFinder(rows);
    this.drawTools();
    const width = Math.round(Math.min(Math.max(0.28 * window.innerWidth, 96), window.innerWidth > 2400 ? 460 : 250));
    fill(this.readout, HINT);
    this.readout.style.paddingLeft = `${width}px`;
    await this.drawStrip(norms, width);
    if (turn !== this.turn) return;
    // Once, when all above has its height: labels and cells have to agree on it.
    const room = heightBelow(this.scroll, 240);
    const rowHeight = Math.floor(Math.min(Math.max(room / Math.max(flow.nodes.length, 1), 14), window.innerHeight > 1500 ? 48 : 34));
    this.scroll.style.maxHeight = `${room}px`;
    this.labels.draw({ layout: this.tab.layout, nodes: flow.nodes, open, culprits: new Set(this.tab.incident.culprits), rowHeight, width });
    await this.heat.draw(rowHeight);
  }

  drawFinder(rows) {
    if (document.activeElement !== this.search) this.search.value = state.search ?? "";
    fill(this.finder.querySelector("#sorting"), toggle("Sort by", SORTS, state.sort ?? "", (value) => set({ sort: value || null })));
    const some = rows && rows.num_found > rows.nodes.length ? `the first ${count(rows.nodes.length)} of ` : "";
    fill(this.found, rows ? `${some}${counted(rows.num_found, "parameter")}` : "");
  }

  drawTools() {
    const { range } = this.heat.flow;
    const { isChange } = this.heat;
    const ends = isChange ? ["1/1000 of usual", "1000 times"] : range.map((value) => number(10 ** value));
    const special = (name, text) => h("span", { class: "swatch" }, h("i", { style: `background: var(--${name})` }), text);
    fill(
      this.tools,
      toggle("Colour", [["norm", "gradient norm"], ["change", "change from the row's median"]], state.colour ?? "norm", (value) => set({ colour: value })),
      this.heat.hasSmallest &&
        toggle("Cells show the", [["largest", "largest"], ["smallest", "smallest"]], state.cell ?? "largest", (value) => set({ cell: value })),
      h("span", { class: "legend" }, ends[0], h("i", { class: "ramp", style: `background: ${gradient(isChange ? CHANGE_COLOURS() : NORM_COLOURS())}` }), ends[1]),
      special("nan", "NaN"), special("inf", "Inf"), special("zero", NAME_OF_ZERO), special("none", "no gradient"),
      h("span", { class: "spacer" }),
      !this.isList && [
        h("button", { onclick: () => set({ open: "all" }) }, "Open all"),
        h("button", { onclick: () => set({ open: "none" }) }, "Close all")],
      (state.from || state.to) && h("button", { onclick: () => set({ from: null, to: null }) }, "All steps"),
    );
  }

  async drawStrip(norms, width) {
    const marks = new Marks(norms.marks, plain);
    const [top, bottom] = [4, 22];
    const inner = STRIP_PX + marks.height;
    const settings = layout({
      height: inner + top + bottom, margin: { l: width, r: 16, t: top, b: bottom }, showlegend: false,
      shapes: state.step === null ? [] : [vertical(Number(state.step), "select", { dash: "dot" })],
      xaxis: axis({ ...STEP_AXIS, range: this.heat.span, title: undefined, anchor: "y" }),
      yaxis: axis({ ...logAxis([norms.global_norm, norms.explosion_limit], 3), domain: [0, STRIP_PX / inner], title: { text: width > 200 ? "global norm" : "", font: { size: 11 } }, fixedrange: true }),
      yaxis9: marks.axis(STRIP_PX / inner, 1),
    });
    const line = (name, y, more) => ({ name, type: "scatter", mode: norms.steps.length > 1 ? "lines" : "markers", x: norms.steps, y, line: more, hovertemplate: `${name} %{y:.4g}, step %{x:,}<extra></extra>` });
    const traces = [
      line("global norm", norms.global_norm, { width: 1.3, color: colour("accent") }),
      line("explosion limit", norms.explosion_limit, { width: 1, dash: "dash", color: colour("explosion") }),
      ...marks.traces("y9"),
    ];
    const alerts = norms.marks.reduce((sum, mark) => sum + (mark.id ? mark.count : 0), 0);
    await draw(this.strip, traces, settings, `Global gradient norm over ${counted(norms.num_steps, "logged step")}, ${counted(alerts, "alert")}.`);
    if (this.strip.dataset.listens) return;
    this.strip.dataset.listens = "true";
    zooms(this.strip, set);
    this.strip.on("plotly_click", ({ points: [point] }) => set(point.customdata ? { alert: point.customdata, step: point.x } : { step: point.x }));
  }
}
