// Runs: one row each, and the norms, limits and losses of those that are chosen in one plot.

import { ask } from "./api.js";
import { count, counted, fill, h, number, plain } from "./dom.js";
import { badge } from "./incident.js";
import { axis, draw, layout, logAxis, STEP_AXIS } from "./plot.js";
import { set, state } from "./state.js";
import { colour } from "./theme.js";

const NUM_CHOSEN = 20;
const MAX_CHOSEN = 50;
const DASHES = ["solid", "dash", "dot", "dashdot"];
// Paul Tol's "bright" and "muted" schemes, which stay apart under colour blindness; beyond them curves differ by their dashes.
const COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999933", "#cc6677", "#44aa99", "#882255"];

const COLUMNS = [
  ["name", "Run", (run) => run.name],
  ["state", "State", (run) => run.state],
  ["step", "Last step", (run) => run.last_step ?? -1],
  ["norm", "Last norm", (run) => Number(run.norms[0] ?? -1)],
  ["loss", "Last loss", (run) => Number(run.loss[0] ?? Infinity)],
  ["clipped", "Clipped", (run) => run.num_clipped ?? -1],
  ["skipped", "Skipped", (run) => run.num_skipped],
  ["alerts", "Alerts", (run) => Object.values(run.kinds).reduce((sum, one) => sum + one, 0)],
  ["first", "First alert", (run) => run.first_alert ?? Infinity],
  ["culprit", "Culprit", (run) => run.culprit ?? ""],
];

export class RunsView {
  constructor(tab) {
    this.tab = tab;
    this.order = ["name", 1];
    this.words = h("p", { class: "words", role: "status" });
    this.plot = h("div", { class: "plot" });
    this.search = h("input", { type: "search", placeholder: "part of a run's name", "aria-label": "Search runs", oninput: () => this.drawTable() });
    this.tools = h("div", { class: "tools" }, this.search,
      h("button", { onclick: () => this.choose(this.listed.slice(0, MAX_CHOSEN).map((run) => run.name)) }, "Draw those listed"),
      h("button", { onclick: () => this.choose([]) }, "Draw none"));
    this.table = h("div", { class: "overview" });
    this.element = h("div", {}, this.words, this.plot, this.tools, this.table);
  }

  async update() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const answer = await ask("overview");
    if (turn !== this.turn) return;
    this.runs = answer.runs;
    const curves = await ask("curves", { runs: JSON.stringify(this.chosen) });
    if (turn !== this.turn) return;
    this.drawTable();
    await this.drawPlot(curves.runs);
    const progress = Math.min(answer.progress, curves.progress);
    const alerted = this.runs.filter((run) => run.first_alert !== null).length;
    fill(this.words, `${counted(this.runs.length, "run")}, ${count(alerted)} with alerts; ${count(this.chosen.length)} drawn.`, progress < 1 ? ` Reading, ${Math.round(100 * progress)} % so far.` : "");
    if (progress < 1) setTimeout(() => turn === this.turn && state.view === "runs" && this.update(), 50);
  }

  get chosen() {
    const known = new Set(this.runs.map((run) => run.name));
    if (state.shown) return JSON.parse(state.shown).filter((name) => known.has(name)).slice(0, MAX_CHOSEN);
    return this.runs.slice(0, NUM_CHOSEN).map((run) => run.name);
  }

  choose(names) {
    set({ shown: JSON.stringify(names) });
  }

  paint(index) {
    return { color: COLOURS[index % COLOURS.length], dash: DASHES[Math.floor(index / COLOURS.length) % DASHES.length] };
  }

  get listed() {
    const text = this.search.value.toLowerCase();
    const [column, direction] = this.order;
    const key = COLUMNS.find(([name]) => name === column)[2];
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
    return this.runs.filter((run) => run.name.toLowerCase().includes(text)).sort((a, b) => direction * compare(key(a), key(b)));
  }

  drawTable() {
    const chosen = this.chosen;
    const sort = (name) => {
      this.order = [name, this.order[0] === name ? -this.order[1] : 1];
      this.drawTable();
    };
    const arrow = (name) => (this.order[0] !== name ? "" : this.order[1] > 0 ? " ▴" : " ▾");
    fill(
      this.table,
      h("table", { class: "list" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Draw"), COLUMNS.map(([name, title]) =>
          h("th", { scope: "col", "aria-sort": this.order[0] === name ? (this.order[1] > 0 ? "ascending" : "descending") : "none" }, h("button", { onclick: () => sort(name) }, title, arrow(name)))))),
        h("tbody", {}, this.listed.map((run) => this.row(run, chosen)))),
    );
  }

  row(run, chosen) {
    const index = chosen.indexOf(run.name);
    const flip = () => this.choose(index < 0 ? [...chosen, run.name] : chosen.filter((name) => name !== run.name));
    const line = this.paint(index);
    const dash = { solid: "solid", dash: "dashed", dot: "dotted", dashdot: "dashed" }[line.dash];
    const numbers = (values) => values.map((value) => number(value)).join(" / ") || "–";
    return h("tr", { "data-run": run.name },
      h("td", {}, h("label", {}, h("input", { type: "checkbox", checked: index >= 0, "aria-label": `Draw ${run.name}`, disabled: index < 0 && chosen.length >= MAX_CHOSEN, onchange: flip }),
        h("i", { class: "line-swatch", style: index < 0 ? "visibility: hidden" : `border-top: 3px ${dash} ${line.color}` }))),
      h("td", { class: "name" }, h("button", { class: "link", onclick: () => this.open(run) }, run.name === "." ? "(this folder)" : run.name)),
      h("td", {}, h("span", { class: `state ${run.is_live ? "live" : run.state.startsWith("stopped") ? "bad" : ""}`, title: run.why }, run.state === "no news" ? `no news since ${new Date(1000 * run.last_time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}` : run.state)),
      h("td", { class: "number" }, run.last_step === null ? "–" : count(run.last_step)),
      h("td", { class: "number" }, numbers(run.norms)), h("td", { class: "number" }, numbers(run.loss)),
      h("td", { class: "number" }, run.num_clipped === null ? "–" : count(run.num_clipped)), h("td", { class: "number" }, count(run.num_skipped)),
      h("td", {}, Object.entries(run.kinds).map(([kind, number_]) => [badge(kind), ` ${count(number_)} `])),
      h("td", { class: "number" }, run.first_alert === null ? "–" : count(run.first_alert)),
      h("td", {}, run.culprit ?? "–"));
  }

  open(run) {
    this.tab.choose(run.name);
    set({ view: "flow" });
  }

  async drawPlot(runs) {
    const hasLoss = runs.some((run) => run.loss.some((value) => typeof value === "number"));
    const traces = runs.flatMap((run) => {
      const line = this.paint(this.chosen.indexOf(run.name));
      const name = plain(run.name, 60);
      const curve = (y, what, more) => ({
        name, legendgroup: run.name, type: "scatter", mode: run.steps.length > 1 ? "lines" : "markers", x: run.steps, y, customdata: [run.name],
        hovertemplate: `${name}<br>${what} %{y:.4g}, step %{x:,}<extra></extra>`, showlegend: false, ...more,
      });
      return [
        curve(run.global_norm, "norm", { line: { width: 1.6, ...line }, marker: { color: line.color } }),
        curve(run.explosion_limit, "explosion limit", { line: { width: 1, color: line.color, dash: "dot" }, opacity: 0.8 }),
        ...(hasLoss ? [curve(run.loss, "loss", { line: { width: 1.6, ...line }, marker: { color: line.color }, yaxis: "y2" })] : []),
      ];
    });
    const all = (field) => runs.map((run) => run[field]);
    const losses = all("loss");
    const isLog = losses.flat().every((value) => typeof value !== "number" || value > 0);
    const settings = layout({
      height: hasLoss ? 420 : 280, margin: { l: 72, r: 16, t: 10, b: 40 }, hovermode: "closest",
      xaxis: axis({ ...STEP_AXIS, anchor: hasLoss ? "y2" : "y", fixedrange: true }),
      yaxis: axis({ ...logAxis([...all("global_norm"), ...all("explosion_limit")]), title: { text: "norm (dotted: its limit)", font: { size: 11 } }, domain: hasLoss ? [0.45, 1] : [0, 1], fixedrange: true }),
      ...(hasLoss ? { yaxis2: axis({ ...(isLog ? logAxis(losses, 4) : {}), title: { text: "loss", font: { size: 11 } }, domain: [0, 0.38], fixedrange: true }) } : {}),
    });
    this.plot.hidden = !runs.length;
    if (runs.length) await draw(this.plot, traces, settings, `Gradient norm, explosion limit and loss of ${counted(runs.length, "run")}.`);
  }
}
