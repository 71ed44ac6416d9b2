// What is marked on the axes: each kind has a colour and a shape of its own, and says in words what it is.

import { count } from "./dom.js";
import { colour } from "./theme.js";

const KINDS = {
  nonfinite: { symbol: "x", glyph: "✖", words: "NaN or Inf in the gradients" },
  explosion: { symbol: "triangle-up", glyph: "▲", words: "gradients far too large" },
  vanishing: { symbol: "triangle-down", glyph: "▼", words: "gradients too small in a part of the model" },
  overflow: { symbol: "diamond", glyph: "◆", words: "the GradScaler does not find its scale" },
  rollback: { symbol: "triangle-left", glyph: "◀", words: "training went back to an earlier state" },
  checkpoint: { symbol: "pentagon", glyph: "⬟", words: "a checkpoint was refused" },
  snapshot: { symbol: "hexagon", glyph: "⬢", words: "a snapshot could not be kept" },
  skip: { symbol: "square", glyph: "■", words: "the step was skipped" },
  resume: { symbol: "star", glyph: "★", words: "training was taken up again from a checkpoint" },
};
const OTHER = { symbol: "circle", glyph: "●", words: "" };
const ORDER = Object.keys(KINDS);
const rank = (kind) => (ORDER.includes(kind) ? ORDER.indexOf(kind) : 3.5);

export const kindColour = (kind) => colour(kind in KINDS ? kind : "other");
export const glyph = (kind) => (KINDS[kind] ?? OTHER).glyph;
export const symbolOf = (kind) => (KINDS[kind] ?? OTHER).symbol;
export const wordsOf = (kind) => (KINDS[kind] ?? OTHER).words;

const LANE_PX = 15;

// The marks of a column one below the other, in lanes of their own above a plot.
export class Marks {
  constructor(marks, escape) {
    this.escape = escape;
    const depth = new Map();
    this.placed = [...marks].sort((a, b) => a.column - b.column || rank(a.kind) - rank(b.kind)).map((mark) => {
      const lane = depth.get(mark.column) ?? 0;
      depth.set(mark.column, lane + 1);
      return { ...mark, lane };
    });
    this.lanes = Math.max(0, ...depth.values());
  }

  get height() {
    return this.lanes * LANE_PX;
  }

  axis(from, to) {
    return { domain: [from, to], range: [0, Math.max(this.lanes, 1)], visible: false, fixedrange: true };
  }

  traces(yaxis) {
    const kinds = [...new Set(this.placed.map((mark) => mark.kind))].sort((a, b) => rank(a) - rank(b));
    return kinds.map((kind) => {
      const chosen = this.placed.filter((mark) => mark.kind === kind);
      const { symbol, words } = KINDS[kind] ?? OTHER;
      const text = (mark) => {
        const of = mark.optimizers.length ? ` · optimizer ${mark.optimizers.join(", ")}` : "";
        return `step ${count(mark.x)}: ${this.escape(kind)}${words ? `, ${words}` : ""}${mark.count > 1 ? ` (${count(mark.count)} in this column)` : ""}${of}`;
      };
      return {
        name: this.escape(kind), type: "scatter", mode: "markers", yaxis, cliponaxis: false, showlegend: true,
        x: chosen.map((mark) => mark.x), y: chosen.map((mark) => this.lanes - mark.lane - 0.5), customdata: chosen.map((mark) => mark.id ?? null),
        marker: { symbol, size: kind === "skip" ? 8 : 11, color: kindColour(kind), line: { width: 1, color: colour("plot") } },
        text: chosen.map(text), hovertemplate: "%{text}<extra></extra>",
      };
    });
  }
}
