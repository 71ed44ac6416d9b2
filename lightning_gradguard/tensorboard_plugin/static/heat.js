// The heat map of the flow: one row a module or parameter, one column a step or several.

import { decades, INFINITE, isFinite16, NAN, nameOf, NO_GRADIENT, unpack, ZERO } from "./api.js";
import { count, counted, h, number } from "./dom.js";
import { axis, draw, layout, vertical, zooms } from "./plot.js";
import { set, state } from "./state.js";
import { colour, colours } from "./theme.js";

const MAX_CELLS_WITH_GAPS = 20_000;

export const scale = (list) => list.map((one, index) => [index / (list.length - 1), one]);
export const NORM_COLOURS = () => colours("heat");
export const CHANGE_COLOURS = () => colours("change");

export class Heat {
  constructor(tab, say) {
    this.tab = tab;
    this.say = say;
    this.cursor = null;
    this.element = h("div", {
      class: "plot heat", tabindex: 0, onkeydown: (event) => this.onKey(event),
      onfocus: () => this.element.matches(":focus-visible") && this.moveTo(this.cursor ?? { row: 0, column: this.width - 1 }),
      onblur: () => this.moveTo(null),
    });
  }

  get width() {
    return Math.max((this.flow?.edges.length ?? 1) - 1, 0);
  }

  take(flow) {
    this.flow = flow;
    this.codes = { largest: unpack(flow.largest), smallest: flow.smallest ? unpack(flow.smallest) : null };
  }

  get hasSmallest() {
    return this.codes.smallest !== null;
  }

  get isChange() {
    return state.colour === "change";
  }

  get span() {
    const { edges } = this.flow;
    return edges.length ? [edges[0], edges[edges.length - 1]] : [0, 1];
  }

  async draw(rowHeight) {
    const { nodes, edges, median } = this.flow;
    const width = this.width;
    const shown = (state.cell === "smallest" && this.codes.smallest) || this.codes.largest;
    const cells = (value) => nodes.map((_, row) => Array.from({ length: width }, (_, column) => value(shown[row * width + column], row)));
    const values = cells((code, row) => {
      if (!isFinite16(code)) return null;
      return this.isChange ? (isFinite16(median[row]) ? (code - median[row]) / 1000 : null) : decades(code);
    });
    const kinds = [NO_GRADIENT, ZERO, INFINITE, NAN];
    const specials = cells((code) => (isFinite16(code) ? null : kinds.indexOf(code)));
    const specialColours = ["none", "zero", "inf", "nan"].flatMap((name, index) => [[index / 4, colour(name)], [(index + 1) / 4, colour(name)]]);
    // Lines between the rows, where there are few enough of them for the slower way of drawing.
    const ygap = nodes.length * width < MAX_CELLS_WITH_GAPS ? 1 : 0;
    const common = { type: "heatmap", x: edges, y: nodes.map((_, row) => row), hoverinfo: "none", showscale: false, ygap };
    const [low, high] = this.isChange ? [-3, 3] : this.flow.range;
    const traces = [
      { ...common, z: values, zmin: low, zmax: Math.max(high, low + 0.1), colorscale: scale(this.isChange ? CHANGE_COLOURS() : NORM_COLOURS()) },
      { ...common, z: specials, zmin: -0.5, zmax: 3.5, colorscale: specialColours },
    ];
    const settings = layout({
      height: nodes.length * rowHeight, margin: { l: 0, r: 16, t: 0, b: 0 }, shapes: this.shapes(),
      xaxis: axis({ range: this.span, showticklabels: false, showgrid: false }),
      yaxis: axis({ range: [nodes.length - 0.5, -0.5], showticklabels: false, showgrid: false, fixedrange: true }),
    });
    await draw(this.element, traces, settings, this.describe(), "application");
    this.listen();
  }

  // Outlines: the chosen step and row, the cells that the alert names, and the cell that the keyboard is at.
  shapes() {
    const { nodes, edges } = this.flow;
    const { paths } = this.tab.layout;
    const outline = (row, x0, x1, name) => ({
      type: "rect", xref: x0 === null ? "paper" : "x", yref: "y", x0: x0 ?? 0, x1: x1 ?? 1, y0: row - 0.5, y1: row + 0.5,
      line: { color: colour(name), width: 2 },
    });
    const shapes = state.step === null ? [] : [vertical(Number(state.step), "select", { dash: "dot" })];
    const chosen = nodes.findIndex((node) => paths[node] === state.parameter);
    if (chosen >= 0) shapes.push(outline(chosen, null, null, "select"));
    const { alert, culprits } = this.tab.incident;
    const column = alert && this.tab.isOfOptimizer(alert) ? this.columnOf(alert.x) : -1;
    if (column >= 0) {
      const named = new Set(culprits);
      nodes.forEach((node, row) => named.has(paths[node]) && shapes.push(outline(row, edges[column], edges[column + 1], "guilty")));
    }
    if (this.cursor) shapes.push(outline(this.cursor.row, edges[this.cursor.column], edges[this.cursor.column + 1], "text"));
    return shapes;
  }

  columnOf(step) {
    const { edges } = this.flow;
    if (!edges.length || step < edges[0] || step >= edges[edges.length - 1]) return -1;
    const after = edges.findIndex((edge) => edge > step);
    return Math.min(after < 0 ? this.width - 1 : after - 1, this.width - 1);
  }

  describe() {
    const numBad = this.codes.largest.filter((code) => code >= INFINITE).length;
    const what = `Heat map of gradient norms: ${counted(this.flow.nodes.length, "row")} by ${counted(this.width, "column")} of steps. Arrow keys move from cell to cell, Enter chooses one.`;
    return numBad ? `${what} ${counted(numBad, "cell")} with NaN or Inf.` : what;
  }

  textOf({ row, column }) {
    const { nodes, edges } = this.flow;
    const value = (codes) => {
      const code = codes[row * this.width + column];
      return nameOf(code) ?? number(10 ** decades(code));
    };
    const { largest, smallest } = this.codes;
    const norm = smallest && value(smallest) !== value(largest) ? `${value(smallest)} to ${value(largest)}` : value(largest);
    const steps = smallest && edges[column + 1] - 1 > edges[column] ? `steps ${count(edges[column])} to ${count(edges[column + 1] - 1)}` : `step ${count(edges[column])}`;
    return [h("strong", { class: "name" }, this.tab.layout.paths[nodes[row]]), ` · ${steps} · norm ${norm}`];
  }

  choose({ row, column }) {
    const node = this.flow.nodes[row];
    const marks = this.flow.marks.filter((mark) => mark.column === column);
    const marked = marks.find((mark) => mark.id);
    const isLeaf = this.tab.layout.parameters[node] >= 0;
    set({
      step: (marked ?? marks[0])?.x ?? this.flow.edges[column],
      ...(isLeaf ? { parameter: this.tab.layout.paths[node] } : {}),
      ...(marked ? { alert: marked.id } : {}),
    });
  }

  onKey(event) {
    const moves = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
    const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
    if (event.key in moves && this.width) {
      event.preventDefault();
      const { row, column } = this.cursor ?? { row: 0, column: this.width - 1 };
      const [down, right] = moves[event.key];
      this.moveTo({ row: clamp(row + down, this.flow.nodes.length), column: clamp(column + right, this.width) });
    } else if (event.key === "Enter" && this.cursor) this.choose(this.cursor);
  }

  moveTo(cursor) {
    if (!this.element.dataset.drawn || (cursor && !this.width)) return;
    this.cursor = cursor;
    this.say(cursor && this.textOf(cursor));
    window.Plotly.relayout(this.element, { shapes: this.shapes() });
  }

  listen() {
    if (this.element.dataset.listens) return;
    this.element.dataset.listens = "true";
    zooms(this.element, set);
    const place = ({ points: [point] }) => ({ row: Math.round(point.y), column: this.columnOf(point.x) });
    this.element.on("plotly_hover", (event) => this.say(this.textOf(place(event))));
    this.element.on("plotly_unhover", () => this.say(null));
    this.element.on("plotly_click", (event) => this.choose(place(event)));
  }
}
