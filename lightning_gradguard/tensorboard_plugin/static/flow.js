// Flow: which part of the model has how large a gradient, when. Modules open and close; rows are in model order.

import { decades, INFINITE, isFinite16, NAN, nameOf, NO_GRADIENT, unpack, ZERO } from "./api.js";
import { count, fill, h, number, toggle } from "./dom.js";
import { axis, draw, heightBelow, layout, MARK_AXIS, markTraces, STEP_AXIS, vertical, zooms } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";

const MAX_ROWS_OPENED = 40;
const MAX_ROWS_OF_ONE = 160; // where all hangs under a module or two, a picture without it would say nothing
const LABELS_PX = 250;
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const CHANGE = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"];

const scale = (colours) => colours.map((one, index) => [index / (colours.length - 1), one]);
const gradient = (colours) => `linear-gradient(to right, ${colours.join(", ")})`;

export class FlowView {
  constructor(tab) {
    this.tab = tab;
    this.tools = h("div", { class: "tools" });
    this.strip = h("div", { class: "plot strip" });
    this.labels = h("div", { class: "labels", role: "tree", "aria-label": "Modules and parameters", style: `width: ${LABELS_PX}px` });
    this.heat = h("div", { class: "plot heat" });
    this.readout = h("div", { class: "readout", role: "status" });
    this.rows = h("div", { class: "rows" }, this.labels, this.heat);
    this.element = h("div", { class: "flow" }, this.tools, this.strip, this.readout, h("div", { class: "scroll" }, this.rows));
  }

  // Modules are opened from the top, as long as there are not too many rows; then those that were opened or closed by hand.
  open() {
    const { parents, parameters } = this.tab.layout;
    const children = new Map();
    parents.forEach((parent, node) => children.set(parent, [...(children.get(parent) ?? []), node]));
    const open = new Set([-1]);
    const given = (state.open ?? "").split(",");
    const isModule = (node) => parameters[node] < 0;
    if (given[0] === "all") parents.forEach((_, node) => isModule(node) && open.add(node));
    else if (given[0] !== "none") {
      let numRows = children.get(-1)?.length ?? 0;
      const queue = [...(children.get(-1) ?? [])];
      for (let node = queue.shift(); node !== undefined; node = queue.shift()) {
        const below = children.get(node) ?? [];
        if (!below.length || numRows + below.length > (numRows <= 2 ? MAX_ROWS_OF_ONE : MAX_ROWS_OPENED)) continue;
        numRows += below.length;
        open.add(node);
        queue.push(...below);
      }
    }
    for (const text of given.filter((part) => /^\d+$/.test(part)).map(Number)) {
      if (open.has(text)) open.delete(text);
      else open.add(text);
    }
    return open;
  }

  visible(open) {
    const { parents } = this.tab.layout;
    const shown = [];
    const isShown = new Set([-1]);
    parents.forEach((parent, node) => {
      if (isShown.has(parent) && open.has(parent)) {
        isShown.add(node);
        shown.push(node);
      }
    });
    return shown;
  }

  flip(node) {
    const parts = (state.open ?? "").split(",").filter(Boolean);
    const text = String(node);
    set({ open: (parts.includes(text) ? parts.filter((part) => part !== text) : [...parts, text]).join(",") || null });
  }

  async update() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const open = this.open();
    const nodes = this.visible(open);
    const range = { from: state.from, to: state.to };
    const [flow, norms] = await Promise.all([
      this.tab.ask("flow", { nodes: nodes.join(","), ...range }),
      this.tab.ask("norms", range),
    ]);
    if (turn !== this.turn) return;
    this.flow = flow;
    this.codes = { largest: unpack(flow.largest), smallest: flow.smallest ? unpack(flow.smallest) : null };
    this.drawTools();
    this.drawLabels(open);
    await Promise.all([this.drawStrip(norms), this.drawHeat()]);
    this.read(null);
  }

  get isChange() {
    return state.colour === "change";
  }

  get shown() {
    return (state.cell === "smallest" && this.codes.smallest) || this.codes.largest;
  }

  drawTools() {
    const { range } = this.flow;
    const ends = this.isChange ? ["1/1000 of usual", "1000 times"] : range.map((value) => number(10 ** value));
    const special = (name, text) => h("span", { class: "swatch" }, h("i", { style: `background: var(--${name})` }), text);
    fill(
      this.tools,
      toggle("Colour", [["norm", "gradient norm"], ["change", "change from the row's median"]], state.colour ?? "norm", (value) => set({ colour: value })),
      this.codes.smallest &&
        toggle("Cells show the", [["largest", "largest"], ["smallest", "smallest"]], state.cell ?? "largest", (value) => set({ cell: value })),
      h("span", { class: "legend" }, ends[0], h("i", { class: "ramp", style: `background: ${gradient(this.isChange ? CHANGE : VIRIDIS)}` }), ends[1]),
      special("nan", "NaN"), special("inf", "Inf"), special("zero", "exactly 0"), special("none", "no gradient"),
      h("span", { class: "spacer" }),
      h("button", { onclick: () => set({ open: "all" }) }, "Open all"),
      h("button", { onclick: () => set({ open: "none" }) }, "Close all"),
      (state.from || state.to) && h("button", { onclick: () => set({ from: null, to: null }) }, "All steps"),
    );
  }

  get rowHeight() {
    const room = heightBelow(this.rows.parentElement, 240, 600);
    return Math.floor(Math.min(Math.max(room / Math.max(this.flow.nodes.length, 1), 14), 34));
  }

  drawLabels(open) {
    const { labels, paths, depths, parameters, numels } = this.tab.layout;
    const culprits = new Set(this.tab.incident.culprits);
    const focused = document.activeElement?.dataset?.node;
    fill(
      this.labels,
      this.flow.nodes.map((node) => {
        const isModule = parameters[node] < 0;
        const isOpen = open.has(node);
        const isGuilty = culprits.has(paths[node]) || (isModule && !isOpen && [...culprits].some((name) => name.startsWith(`${paths[node]}.`)));
        return h(
          "button",
          {
            role: "treeitem", class: ["row", isModule && "module", isGuilty && "guilty"].filter(Boolean).join(" "),
            style: `height: ${this.rowHeight}px; padding-left: ${8 + 14 * depths[node]}px`, "data-node": node,
            title: isModule ? paths[node] : `${paths[node]} (${count(numels[node])} elements)`,
            "aria-level": depths[node] + 1, "aria-expanded": isModule ? String(isOpen) : null,
            "aria-selected": String(paths[node] === state.parameter),
            onclick: () => (isModule ? this.flip(node) : set({ parameter: paths[node] })),
            onkeydown: (event) => this.onKey(event, node, isModule, isOpen),
          },
          h("span", { class: "twist", "aria-hidden": "true" }, isModule ? (isOpen ? "▾" : "▸") : ""),
          h("span", { class: "text" }, labels[node]),
          isGuilty && h("span", { class: "mark", title: "named by the alert above" }, "◀"),
        );
      }),
    );
    if (focused) this.labels.querySelector(`[data-node="${focused}"]`)?.focus();
  }

  onKey(event, node, isModule, isOpen) {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (step) {
      event.preventDefault();
      event.currentTarget[step]?.focus();
    } else if (isModule && event.key === (isOpen ? "ArrowLeft" : "ArrowRight")) this.flip(node);
  }

  get selection() {
    return state.step === null ? [] : [vertical(Number(state.step), "select", { dash: "dot" })];
  }

  get span() {
    const { edges } = this.flow;
    return edges.length ? [edges[0], edges[edges.length - 1]] : [0, 1];
  }

  async drawStrip(norms) {
    const settings = layout({
      height: 118, margin: { l: LABELS_PX, r: 16, t: 8, b: 30 }, showlegend: false, shapes: this.selection,
      xaxis: axis({ ...STEP_AXIS, range: this.span, title: undefined }),
      yaxis: axis({ type: "log", title: { text: "global norm", font: { size: 11 } }, fixedrange: true, nticks: 4, exponentformat: "power" }),
      yaxis9: MARK_AXIS,
    });
    const traces = [
      { name: "global norm", type: "scatter", mode: "lines", x: norms.steps, y: norms.global_norm, line: { width: 1.3, color: colour("accent") } },
      { name: "limit", type: "scatter", mode: "lines", x: norms.steps, y: norms.explosion_limit, line: { width: 1, dash: "dash", color: colour("explosion") } },
      ...markTraces(norms.marks, 80),
    ];
    const alerts = norms.marks.reduce((sum, mark) => sum + mark.alerts, 0);
    await draw(this.strip, traces, settings, `Global gradient norm over ${count(norms.num_steps)} logged steps, ${alerts} alerts.`);
    this.listen(this.strip, false);
  }

  async drawHeat() {
    const { nodes, edges, median } = this.flow;
    const width = edges.length - 1;
    const shown = this.shown;
    const cells = (value) => nodes.map((_, row) => Array.from({ length: Math.max(width, 0) }, (_, column) => value(shown[row * width + column], row)));
    const values = cells((code, row) => {
      if (!isFinite16(code)) return null;
      return this.isChange ? (isFinite16(median[row]) ? (code - median[row]) / 1000 : null) : decades(code);
    });
    const kinds = [NO_GRADIENT, ZERO, INFINITE, NAN];
    const specials = cells((code) => (isFinite16(code) ? null : kinds.indexOf(code)));
    const specialColours = ["none", "zero", "inf", "nan"].flatMap((name, index) => [[index / 4, colour(name)], [(index + 1) / 4, colour(name)]]);
    const y = nodes.map((_, row) => row);
    // Lines between the rows, where there are few enough of them for the slower way of drawing.
    const ygap = values.length * width < 20_000 ? 1 : 0;
    const common = { type: "heatmap", x: edges, y, hoverinfo: "none", showscale: false, ygap };
    const [low, high] = this.isChange ? [-3, 3] : this.flow.range;
    const traces = [
      { ...common, z: values, zmin: low, zmax: Math.max(high, low + 0.1), colorscale: scale(this.isChange ? CHANGE : VIRIDIS) },
      { ...common, z: specials, zmin: -0.5, zmax: 3.5, colorscale: specialColours },
    ];
    const height = nodes.length * this.rowHeight;
    const settings = layout({
      height, margin: { l: 0, r: 16, t: 0, b: 0 }, shapes: [...this.selection, ...this.boxes()],
      xaxis: axis({ range: this.span, showticklabels: false, showgrid: false }),
      yaxis: axis({ range: [nodes.length - 0.5, -0.5], showticklabels: false, showgrid: false, fixedrange: true }),
    });
    await draw(this.heat, traces, settings, this.describe());
    this.listen(this.heat, true);
  }

  // Outlines: the chosen parameter's row, and the cells that the alert names.
  boxes() {
    const { nodes } = this.flow;
    const { paths } = this.tab.layout;
    const row = nodes.findIndex((node) => paths[node] === state.parameter);
    const outline = (index, x0, x1, name) => ({
      type: "rect", xref: x0 === null ? "paper" : "x", yref: "y", x0: x0 ?? 0, x1: x1 ?? 1, y0: index - 0.5, y1: index + 0.5,
      line: { color: colour(name), width: 2 },
    });
    const boxes = row < 0 ? [] : [outline(row, null, null, "select")];
    const alert = this.tab.incident.alert;
    const column = alert ? this.columnOf(alert.x) : -1;
    if (column < 0) return boxes;
    const culprits = this.tab.incident.culprits;
    nodes.forEach((node, index) => {
      if (culprits.includes(paths[node])) boxes.push(outline(index, this.flow.edges[column], this.flow.edges[column + 1], "guilty"));
    });
    return boxes;
  }

  columnOf(step) {
    const { edges } = this.flow;
    if (!edges.length || step < edges[0] || step >= edges[edges.length - 1]) return -1;
    let column = 0;
    while (column < edges.length - 2 && edges[column + 1] <= step) column += 1;
    return column;
  }

  describe() {
    const numBad = this.codes.largest.filter((code) => code >= INFINITE).length;
    const what = `Heat map of gradient norms: ${count(this.flow.nodes.length)} rows by ${count(Math.max(this.flow.edges.length - 1, 0))} columns of steps.`;
    return numBad ? `${what} ${count(numBad)} cells are NaN or infinite.` : what;
  }

  read(point) {
    const text = point ? this.textOf(point) : "Click a cell to choose its step and parameter; drag to zoom into steps, double-click to see all.";
    fill(this.readout, text);
  }

  textOf({ row, column }) {
    const { nodes, edges } = this.flow;
    const width = edges.length - 1;
    const value = (codes) => {
      const code = codes[row * width + column];
      return nameOf(code) ?? number(10 ** decades(code));
    };
    const { largest, smallest } = this.codes;
    const norm = smallest && value(smallest) !== value(largest) ? `${value(smallest)} to ${value(largest)}` : value(largest);
    const steps = smallest ? `steps ${count(edges[column])} to ${count(edges[column + 1] - 1)}` : `step ${count(edges[column])}`;
    return [h("strong", { class: "name" }, this.tab.layout.paths[nodes[row]]), ` · ${steps} · norm ${norm}`];
  }

  listen(element, isHeat) {
    if (element.dataset.listens) return;
    element.dataset.listens = "true";
    zooms(element, set);
    const place = (event) => ({ row: Math.round(event.points[0].y), column: this.columnOf(event.points[0].x) });
    if (isHeat) {
      element.on("plotly_hover", (event) => this.read(place(event)));
      element.on("plotly_unhover", () => this.read(null));
    }
    element.on("plotly_click", (event) => {
      const [point] = event.points;
      if (!isHeat) return set(point.customdata ? { alert: point.customdata, step: point.x } : { step: point.x });
      const { row, column } = place(event);
      const node = this.flow.nodes[row];
      const mark = this.flow.marks.find((one) => one.column === column);
      const isLeaf = this.tab.layout.parameters[node] >= 0;
      return set({
        step: mark?.x ?? this.flow.edges[column],
        ...(isLeaf ? { parameter: this.tab.layout.paths[node] } : {}),
        ...(mark?.id ? { alert: mark.id } : {}),
      });
    });
  }
}
