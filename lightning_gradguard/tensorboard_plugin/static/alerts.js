// Alerts: newest first, by kind; each opens what is known of it and leads to its step in the other views.

import { count, fill, h, number, prose } from "./dom.js";
import { badge, done, when, where, why } from "./incident.js";
import { set, state } from "./state.js";

export class AlertsView {
  constructor(tab) {
    this.tab = tab;
    this.offset = 0;
    this.filters = h("div", { class: "tools", role: "group", "aria-label": "Kinds of alerts" });
    this.table = h("div", { class: "alerts" });
    this.element = h("div", {}, this.filters, this.table);
  }

  async update() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const page = await this.tab.ask("alerts", { kind: state.kind, offset: this.offset });
    const open = state.alert ? await this.tab.ask("alert", { id: state.alert }) : null;
    if (turn !== this.turn) return;
    const all = Object.values(page.kinds).reduce((sum, number_) => sum + number_, 0);
    const filter = (kind, text) =>
      h("button", { class: "filter", "aria-pressed": String((state.kind ?? "") === kind), onclick: () => this.choose(kind) }, text);
    fill(
      this.filters,
      filter("", `all ${count(all)}`),
      Object.entries(page.kinds).map(([kind, number_]) => filter(kind, [badge(kind), ` ${count(number_)}`])),
    );
    if (!page.total) {
      fill(this.table, h("section", { class: "empty" }, h("h2", {}, "No alerts"), h("p", {}, "Nothing was found in this run so far. That is the good case.")));
      return;
    }
    const last = page.offset + page.alerts.length;
    fill(
      this.table,
      h("table", {},
        h("thead", {}, h("tr", {}, ["Step", "Kind", "Found", "Where", "Done"].map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, page.alerts.flatMap((alert) => this.rows(alert, open?.alert)))),
      h("div", { class: "tools" },
        h("span", { class: "quiet" }, `${count(page.offset + 1)} to ${count(last)} of ${count(page.total)}, newest first`),
        page.offset > 0 && h("button", { onclick: () => this.turnTo(page.offset - page.page_size) }, "Newer"),
        last < page.total && h("button", { onclick: () => this.turnTo(last) }, "Older")),
    );
  }

  choose(kind) {
    this.offset = 0;
    set({ kind: kind || null });
  }

  turnTo(offset) {
    this.offset = Math.max(offset, 0);
    this.update();
  }

  rows(alert, open) {
    const isOpen = open?.id === alert.id;
    const pressed = () => set(isOpen ? { alert: null } : { alert: alert.id, step: alert.x });
    const row = h(
      "tr", { class: isOpen ? "open" : "", "data-alert": alert.id },
      h("td", { class: "number" }, h("button", { class: "link", "aria-expanded": String(isOpen), onclick: pressed }, `${isOpen ? "▾" : "▸"} ${count(alert.x)}`)),
      h("td", {}, badge(alert.kind)),
      h("td", {}, why(alert)),
      h("td", { class: "name" }, where(alert)),
      h("td", {}, done(alert)),
    );
    return isOpen ? [row, h("tr", { class: "details" }, h("td", { colspan: 5 }, this.details(open)))] : [row];
  }

  details(alert) {
    const jump = (view) => () => this.tab.incident.go(view);
    return [
      h("p", {}, h("strong", {}, prose(alert.message))),
      h("p", { class: "quiet" }, [new Date(1000 * alert.time).toLocaleString(), when(alert)].filter(Boolean).join(" · ")),
      alert.culprit && this.culprit(alert.culprit),
      alert.parameters.length > 0 && this.parameters(alert.parameters),
      h("p", {}, h("strong", {}, "What to try: "), prose(alert.remedy)),
      h("div", { class: "tools" },
        h("button", { onclick: jump("flow") }, "In flow"), h("button", { onclick: jump("norms") }, "In norms"),
        h("button", { onclick: jump("depth") }, "By depth"),
        h("button", { onclick: () => set({ view: "distribution", parameter: alert.parameters[0]?.name ?? null }) }, "Its distribution")),
    ];
  }

  culprit(culprit) {
    const place = culprit.file && `${culprit.file}${culprit.line ? `:${culprit.line}` : ""}`;
    const entries = [
      ["Phase", culprit.phase], ["Cause", culprit.cause], ["Module", culprit.module || "training_step"], ["Operator", culprit.op], ["File", place],
      ["Samples", culprit.samples?.length ? culprit.samples.slice(0, 50).join(", ") : null], ["Rank", culprit.rank],
      ["Replay", culprit.reproduced ? `reproduced${culprit.error === null ? "" : `, relative error ${number(culprit.error)}`}` : "not reproduced"],
    ];
    return h("section", { class: "culprit" },
      h("h3", {}, "Culprit"), culprit.message && h("p", {}, prose(culprit.message)),
      h("dl", {}, entries.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
      culprit.source && h("pre", {}, culprit.source),
      this.lines("What went in", culprit.inputs), this.lines("Before it", culprit.before), this.lines("Layer by layer", culprit.factors), culprit.remedy && h("p", {}, prose(culprit.remedy)));
  }

  lines(title, lines) {
    return lines?.length ? [h("h3", {}, title), h("pre", {}, lines.join("\n"))] : null;
  }

  parameters(parameters) {
    return h("table", { class: "inner" },
      h("thead", {}, h("tr", {}, ["Parameter", "Norm", "NaN", "Inf"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, parameters.map((parameter) => h("tr", {},
        h("td", { class: "name" }, h("button", { class: "link name", title: parameter.name, onclick: () => set({ parameter: parameter.name, view: "distribution" }) }, parameter.name)),
        h("td", { class: "number" }, number(parameter.norm)), h("td", { class: "number" }, count(parameter.num_nan)), h("td", { class: "number" }, count(parameter.num_inf))))));
  }
}
