// Alerts: newest first, by kind; each opens what is known of it and leads to its step in the other views.

import { details } from "./culprit.js";
import { count, fill, h, prose } from "./dom.js";
import { badge, figures, isConsequence, where } from "./incident.js";
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
      h("table", { class: "list" },
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

  found(alert) {
    if (alert.culprit?.message) return prose(alert.culprit.message);
    return isConsequence(alert) ? prose(alert.seen) : figures(alert);
  }

  rows(alert, open) {
    const isOpen = open?.id === alert.id;
    const pressed = () => set(isOpen ? { alert: null } : { alert: alert.id, step: alert.x });
    const row = h(
      "tr", { class: isOpen ? "open" : "", "data-alert": alert.id },
      h("td", { class: "number" }, h("button", { class: "link", "aria-expanded": String(isOpen), onclick: pressed }, `${isOpen ? "▾" : "▸"} ${count(alert.x)}`)),
      h("td", {}, badge(alert.kind), this.tab.numOptimizers > 1 ? h("div", { class: "quiet" }, `optimizer ${alert.optimizer}`) : null),
      h("td", { class: "found" }, this.found(alert)),
      h("td", { class: "name" }, where(alert)),
      h("td", {}, alert.done),
    );
    return isOpen ? [row, h("tr", { class: "details" }, h("td", { colspan: 5 }, details(open, (view) => () => this.tab.incident.go(view))))] : [row];
  }
}
