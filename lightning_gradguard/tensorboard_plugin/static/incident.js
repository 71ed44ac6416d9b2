// The line above all views: what went wrong, when, where, why, and what to try.

import { count, fill, h, number, prose } from "./dom.js";
import { kindColour } from "./plot.js";
import { set, state } from "./state.js";

const DONE = {
  log: "written down",
  warn: "warned of, the step was applied",
  skip: "the step was skipped",
  rollback: "rolled back",
  stop: "the step was skipped and the run stopped",
  raise: "the step was skipped and the run failed",
};

export function when(alert) {
  const places = [
    alert.epoch === null ? null : `epoch ${count(alert.epoch)}`,
    alert.batch_idx === null || alert.batch_idx === undefined ? null : `batch ${count(alert.batch_idx)}`,
    alert.micro_batch ? `micro-batch ${count(alert.micro_batch)}` : null,
    alert.rank ? `rank ${count(alert.rank)}` : null,
  ];
  return places.filter(Boolean).join(", ");
}

export const done = (alert) => DONE[alert.action] ?? alert.action;

export function why(alert) {
  const [value, limit] = [Number(alert.value), Number(alert.limit)];
  if (alert.kind === "nonfinite") return "NaN or infinite";
  const ratio = value / limit;
  const times = Number.isFinite(ratio) && ratio >= 2 ? ` (${number(ratio)} times)` : "";
  return `${number(value)}; the limit was ${number(limit)}${times}`;
}

export function badge(kind) {
  return h("span", { class: "badge", style: `--kind: ${kindColour(kind)}` }, kind);
}

// Where in the code, if forensics found it; else the parameters that stand out.
export function where(alert) {
  const culprit = alert.culprit;
  if (culprit) {
    const place = culprit.file ? `${culprit.file}${culprit.line ? `:${culprit.line}` : ""}` : null;
    return [
      h("strong", {}, culprit.module || (culprit.phase === "data" ? "the batch" : "training_step")),
      culprit.op ? h("code", {}, culprit.op) : null,
      place ? h("span", { class: "quiet" }, place) : null,
    ].filter(Boolean);
  }
  const names = (alert.parameters ?? []).map((parameter) => parameter.name);
  if (!names.length && alert.where) names.push(alert.where);
  if (!names.length) return ["the whole model"];
  const shown = names.slice(0, 3).map((name) =>
    h("button", { class: "link name", title: name, onclick: () => set({ parameter: name, view: "flow" }) }, name));
  return [...shown, names.length > 3 ? h("span", { class: "quiet" }, `and ${names.length - 3} more`) : null].filter(Boolean);
}

export class Incident {
  constructor(tab) {
    this.tab = tab;
    this.element = h("section", { class: "incident", "aria-label": "Selected alert", hidden: true });
    this.forget();
  }

  forget() {
    this.alert = null;
    this.numAlerts = 0;
  }

  // The names of the parameters that the selected alert is about, worst first.
  get culprits() {
    return (this.alert?.parameters ?? []).map((parameter) => parameter.name);
  }

  async load() {
    const answer = await this.tab.ask("alert", { id: state.alert });
    this.alert = answer.alert ?? null;
    this.numAlerts = answer.num_alerts ?? 0;
    this.lastStep = answer.last_step ?? null;
    return answer;
  }

  draw() {
    this.element.hidden = false;
    const alert = this.alert;
    this.element.classList.toggle("calm", !alert);
    if (!alert) {
      fill(
        this.element,
        h("div", { class: "headline" }, h("span", { class: "badge fine" }, "no alerts"),
          h("span", {}, this.lastStep === null ? "Nothing is logged yet." : `Nothing was found up to step ${count(this.lastStep)}.`)),
      );
      return;
    }
    const jump = (view) => () => this.go(view);
    fill(
      this.element,
      h("div", { class: "headline" },
        badge(alert.kind),
        h("strong", {}, `at step ${count(alert.x)}`),
        h("span", { class: "quiet" }, [when(alert), done(alert)].filter(Boolean).join(" · ")),
        h("span", { class: "spacer" }),
        h("span", { class: "quiet" }, this.numAlerts > 1 ? `${state.alert ? "chosen" : "newest"} of ${count(this.numAlerts)} alerts` : "the only alert"),
        h("button", { onclick: jump("flow") }, "In flow"),
        h("button", { onclick: jump("norms") }, "In norms"),
        h("button", { onclick: jump("depth") }, "By depth")),
      h("dl", {},
        h("div", {}, h("dt", {}, alert.culprit ? "Where" : "Where it shows most"), h("dd", {}, where(alert))),
        h("div", {}, h("dt", {}, "Why"), h("dd", {}, h("strong", {}, why(alert)), h("span", { class: "quiet" }, prose(alert.message)))),
        h("div", {}, h("dt", {}, "What to try"), h("dd", { class: "prose" }, prose(alert.culprit?.remedy || alert.remedy)))),
    );
  }

  go(view) {
    const patch = { view, alert: this.alert.id, step: this.alert.x, optimizer: this.alert.optimizer };
    if (!this.isInside(this.alert.x)) Object.assign(patch, { from: null, to: null });
    set(patch);
  }

  isInside(step) {
    return (state.from === null || step >= Number(state.from)) && (state.to === null || step <= Number(state.to));
  }
}
