// The block above all views: what began it, when, where, why, and what to try.

import { count, fill, h, number, prose } from "./dom.js";
import { glyph, kindColour, wordsOf } from "./kinds.js";
import { set, state } from "./state.js";

export function when(alert) {
  const places = [
    alert.epoch === null ? null : `epoch ${count(alert.epoch)}`,
    alert.batch_idx === null || alert.batch_idx === undefined ? null : `batch ${count(alert.batch_idx)}`,
    alert.micro_batch ? `micro-batch ${count(alert.micro_batch)}` : null,
    alert.rank ? `rank ${count(alert.rank)}` : null,
    // Every optimizer's step is a decision of its own, so with several of them the count is another than the x axis.
    alert.step === alert.x ? null : `decision ${count(alert.step)} in alerts.jsonl`,
  ];
  return places.filter(Boolean).join(", ");
}

// Whether it reports what was done, not what was wrong.
export const isConsequence = (alert) => ["rollback", "snapshot", "checkpoint"].includes(alert.kind);

// What was found, in figures.
export function figures(alert) {
  const [value, limit] = [Number(alert.value), Number(alert.limit)];
  if (alert.kind === "nonfinite") return "NaN or Inf";
  if (isConsequence(alert)) return alert.done;
  if (!Number.isFinite(limit)) return number(value);
  const ratio = value / limit;
  const times = Number.isFinite(ratio) && ratio >= 2 ? ` (${number(ratio)} times)` : "";
  return `${number(value)}; the limit was ${number(limit)}${times}`;
}

export function badge(kind) {
  return h("span", { class: "badge", style: `--kind: ${kindColour(kind)}`, title: wordsOf(kind) }, h("span", { "aria-hidden": "true" }, `${glyph(kind)} `), kind);
}

export function place(culprit) {
  const file = String(culprit.file ?? "").split(/[\\/]/).pop();
  return file ? `${file}${culprit.line ? `:${culprit.line}` : ""}` : null;
}

// The bad rows, as far as they are known; where they are a guess, it says so.
export function rowsOf(culprit, most = 10) {
  const rows = culprit.samples?.length ? culprit.samples : culprit.probable_samples;
  if (!rows?.length) return null;
  const named = `row${rows.length === 1 ? "" : "s"} ${rows.slice(0, most).join(", ")}${rows.length > most ? ` and ${rows.length - most} more` : ""}`;
  return culprit.samples?.length ? named : `probably ${named}`;
}

// Where in the code, if forensics found it; else the parameters that stand out.
export function where(alert) {
  const culprit = alert.culprit;
  if (culprit) {
    const file = place(culprit);
    return [
      h("strong", {}, culprit.module || (culprit.phase === "data" ? "the batch" : "training_step")),
      culprit.op ? h("code", {}, culprit.op) : null,
      file ? h("span", { class: "quiet", title: culprit.file }, file) : null,
      rowsOf(culprit) ? h("span", {}, `${rowsOf(culprit)} of the batch`) : null,
    ].filter(Boolean);
  }
  const names = (alert.parameters ?? []).map((parameter) => parameter.name);
  if (!names.length && alert.where) names.push(alert.where);
  if (!names.length) return ["the whole model"];
  const shown = names.slice(0, 3).map((name) =>
    h("button", { class: "link name", title: name, onclick: () => set({ parameter: name, view: "flow" }) }, name));
  const numMore = (alert.num_parameters ?? names.length) - 3;
  return [...shown, numMore > 0 ? h("span", { class: "quiet" }, `and ${count(numMore)} more`) : null].filter(Boolean);
}

// The cause first, whatever else the message says.
export function cause(alert) {
  const { culprit } = alert;
  if (!culprit?.message) return [h("strong", {}, figures(alert))];
  return [
    h("strong", {}, culprit.cause ? [`${culprit.cause}: `] : [], prose(culprit.message)),
    culprit.source && h("pre", { class: "source" }, culprit.source),
  ].filter(Boolean);
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
        h("div", { class: "headline" }, h("span", { class: "badge fine" }, "✔ no alerts"),
          h("span", {}, this.lastStep === null ? "Nothing is logged yet." : `Nothing was found up to step ${count(this.lastStep)}.`)),
      );
      return;
    }
    const several = this.tab.numOptimizers > 1 ? `optimizer ${alert.optimizer}` : null;
    const told = alert.kind === "rollback" ? [] : [h("div", { class: "quiet" }, alert.culprit?.message ? `${figures(alert)}. ` : "", prose(alert.seen))];
    fill(
      this.element,
      h("div", { class: "headline" },
        badge(alert.kind),
        h("strong", {}, `at step ${count(alert.x)}`),
        several && h("strong", {}, several),
        h("span", { class: "quiet" }, [when(alert), alert.done].filter(Boolean).join(" · ")),
        h("span", { class: "spacer" }),
        this.turns(alert)),
      h("dl", {},
        h("div", {}, h("dt", {}, alert.culprit ? "Where" : "Where it shows most"), h("dd", {}, where(alert))),
        h("div", {}, h("dt", {}, "Why"), h("dd", { class: "prose" }, cause(alert), told, this.reason(alert))),
        h("div", {}, h("dt", {}, "What to try"), h("dd", { class: "prose" }, prose(alert.culprit?.remedy || alert.remedy)))),
    );
  }

  // Why training went back, and the alert of it.
  reason(alert) {
    if (!alert.reason) return alert.kind === "rollback" ? h("div", { class: "quiet" }, prose(alert.found)) : null;
    const open = () => set({ alert: alert.reason.id, step: alert.reason.x });
    return h("div", {}, prose(`${alert.found} It answers: ${alert.reason.seen} `), h("button", { class: "link", onclick: open }, `${alert.reason.kind} at step ${count(alert.reason.x)}`));
  }

  turns(alert) {
    const turn = (id, text, label) => h("button", { disabled: !id, "aria-label": label, onclick: () => set({ alert: id }) }, text);
    const jump = (view) => () => this.go(view);
    const which = this.numAlerts === 1 ? "the only alert" : `alert ${count(alert.number)} of ${count(this.numAlerts)}`;
    return [
      this.numAlerts > 1 && turn(alert.before, "‹", "the alert before"), h("span", { class: "quiet" }, which), this.numAlerts > 1 && turn(alert.after, "›", "the alert after"),
      h("button", { onclick: () => set({ view: "alerts", alert: alert.id, kind: null }) }, "Details"),
      h("button", { onclick: jump("flow") }, "In flow"), h("button", { onclick: jump("norms") }, "In norms"), h("button", { onclick: jump("depth") }, "By depth"),
    ];
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
