// The GradGuard tab: TensorBoard calls `render` inside a frame.

import { AlertsView } from "./alerts.js";
import { ask } from "./api.js";
import { DepthView } from "./depth.js";
import { DistributionView } from "./distribution.js";
import { count, fill, h } from "./dom.js";
import { FlowView } from "./flow.js";
import { Incident } from "./incident.js";
import { NormsView } from "./norms.js";
import { RunsView } from "./runs.js";
import { onChange, set, state } from "./state.js";
import { followTheme } from "./theme.js";

const POLL_MS = 10_000;
const REDRAW_MS = 1500;
const VIEWS = {
  runs: ["Runs", RunsView],
  flow: ["Flow", FlowView],
  norms: ["Norms", NormsView],
  distribution: ["Distribution", DistributionView],
  depth: ["Depth profile", DepthView],
  alerts: ["Alerts", AlertsView],
};

class Tab {
  constructor() {
    this.runs = null;
    this.layout = null;
    this.layoutKey = null;
    this.version = null;
    this.drawnAt = -Infinity;
    this.views = {};
    this.picker = h("select", { id: "run", onchange: (event) => this.choose(event.target.value) });
    this.optimizers = h("select", { id: "optimizer", onchange: (event) => set({ optimizer: event.target.value }) });
    this.optimizerLabel = h("label", { for: "optimizer", hidden: true }, "Optimizer ", this.optimizers);
    this.status = h("span", { class: "status", role: "status" });
    this.tabs = h("div", { role: "tablist", "aria-label": "Views", onkeydown: (event) => this.onKey(event) });
    this.incident = new Incident(this);
    this.panel = h("main", { role: "tabpanel", id: "panel", tabindex: "-1" });
    this.note = h("div", { class: "note", hidden: true });
    this.bar = h(
      "header", {},
      h("label", { for: "run" }, "Run ", this.picker), this.optimizerLabel, this.tabs, this.status,
    );
    document.title = "GradGuard";
    document.body.append(this.bar, this.note, this.incident.element, this.panel);
  }

  async start() {
    this.drawTabs();
    this.say("Loading the runs …", "TensorBoard is reading the event files.");
    await this.listRuns();
    onChange((changed) => this.onState(changed));
    followTheme(() => this.view?.update());
    setInterval(() => document.hidden || this.refresh(), POLL_MS);
    window.addEventListener("resize", () => this.onResize());
    listenForReload(() => this.refresh());
    await this.refresh();
    document.body.dataset.ready = "true";
  }

  onResize() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.view?.update());
  }

  get numOptimizers() {
    return this.runs?.find((run) => run.name === state.run)?.optimizers.length ?? 1;
  }

  // Whether an alert is about the optimizer that is looked at.
  isOfOptimizer(alert) {
    return this.numOptimizers < 2 || String(alert.optimizer) === this.optimizers.value;
  }

  get view() {
    return this.layout ? this.views[state.view in VIEWS ? state.view : "flow"] : null;
  }

  async listRuns() {
    const answer = await ask("runs");
    this.runs = answer.runs;
    if (answer.has_plotly && !window.Plotly) await loadPlotly();
    this.hasPlotly = Boolean(window.Plotly);
    const names = this.runs.map((run) => run.name);
    const label = (run) => `${run.name === "." ? "(this folder)" : run.name}${run.has_alerts ? "  ⚠" : ""}`;
    fillOptions(this.picker, this.runs.map((run) => [run.name, label(run)]));
    if (!names.includes(state.run)) {
      // The newest is what people come for.
      const newest = this.runs.reduce((best, run) => (!best || run.last_time > best.last_time ? run : best), null);
      set({ run: newest?.name ?? null });
    }
    this.picker.value = state.run ?? "";
    this.picker.disabled = !names.length;
    const optimizers = this.runs.find((run) => run.name === state.run)?.optimizers ?? [];
    fillOptions(this.optimizers, optimizers.map((index) => [String(index), String(index)]));
    this.optimizerLabel.hidden = optimizers.length < 2;
    this.numOthers = answer.num_others;
  }

  choose(run) {
    set({ run, optimizer: null, step: null, alert: null, from: null, to: null, open: null, kind: null, search: null, sort: null });
  }

  ask(route, more = {}) {
    return ask(route, { run: state.run, optimizer: state.optimizer, ...more });
  }

  // Look for news, and draw it. A long run comes in pieces: what is drawn of it meanwhile is drawn now and then, since to draw
  // takes longer than to read.
  async refresh({ isContinued = false } = {}) {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    try {
      if (!isContinued) await this.listRuns();
      if (!this.runs.length) return this.sayNothingHere();
      const answer = await this.incident.load();
      if (turn !== this.turn) return;
      if (answer.is_empty) return this.say("Loading …", "The first steps of this run are being read.");
      if (answer.layout !== this.layoutKey) {
        this.layout = await this.ask("layout");
        if (turn !== this.turn) return;
        this.layoutKey = answer.layout;
      }
      this.optimizers.value = String(answer.optimizer);
      this.incident.draw();
      const isNews = answer.version !== this.version && (answer.progress === 1 || performance.now() > this.drawnAt + REDRAW_MS);
      // The overview is of all runs, and says how long ago each was written to: every look has news.
      const isOverview = this.panel.dataset.view === "runs" && !isContinued;
      if (isNews || isOverview || !this.panel.dataset.view) {
        this.version = answer.version;
        await this.show();
        this.drawnAt = performance.now();
      }
      this.showProgress(answer);
    } catch (error) {
      this.say("This could not be loaded.", `${error.message} It is tried again in ten seconds.`);
      console.warn(error);
    }
  }

  showProgress(answer) {
    fill(this.status, answer.progress < 1 ? `reading ${Math.round(answer.progress * 100)} %` : "");
    if (answer.progress < 1) setTimeout(() => this.refresh({ isContinued: true }), 0);
  }

  async show() {
    const name = state.view in VIEWS ? state.view : "flow";
    this.note.hidden = this.hasPlotly;
    if (!this.hasPlotly) {
      fill(
        this.note, h("strong", {}, "The plots need plotly. "), "Install it where TensorBoard runs, then start TensorBoard again: ",
        h("code", {}, 'pip install "lightning-gradguard[tensorboard-tab]"'), ". Alerts are shown without it.",
      );
      if (name !== "alerts") return set({ view: "alerts" });
    }
    this.incident.element.hidden = name === "runs";
    this.views[name] ??= new VIEWS[name][1](this);
    if (this.panel.dataset.view !== name || this.panel.firstElementChild !== this.views[name].element) {
      fill(this.panel, this.views[name].element);
      this.panel.dataset.view = name;
    }
    this.drawTabs();
    await this.views[name].update();
  }

  async onState(changed) {
    if (changed.includes("run") || changed.includes("optimizer")) {
      this.layoutKey = this.version = null;
      this.drawnAt = -Infinity; // what stands there is of another
      this.incident.forget();
      return this.refresh();
    }
    if (!this.layout) return;
    if (changed.includes("alert")) await this.incident.load().then(() => this.incident.draw());
    await this.show().catch((error) => console.warn(error));
  }

  drawTabs() {
    const chosen = state.view in VIEWS ? state.view : "flow";
    if (!this.tabs.childElementCount) {
      fill(
        this.tabs,
        Object.entries(VIEWS).map(([name, [title]]) =>
          h("button", { role: "tab", id: `tab-${name}`, "aria-controls": "panel", onclick: () => set({ view: name }) }, title)),
      );
    }
    for (const button of this.tabs.children) {
      const isChosen = button.id === `tab-${chosen}`;
      button.setAttribute("aria-selected", String(isChosen));
      button.tabIndex = isChosen ? 0 : -1;
    }
    this.panel.setAttribute("aria-labelledby", `tab-${chosen}`);
  }

  onKey(event) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const buttons = [...this.tabs.children];
    const next = buttons[(buttons.indexOf(document.activeElement) + move + buttons.length) % buttons.length];
    next.focus();
    next.click();
  }

  say(title, ...lines) {
    this.incident.element.hidden = true;
    delete this.panel.dataset.view;
    fill(this.panel, h("section", { class: "empty" }, h("h2", {}, title), lines.map((line) => (line.nodeType ? line : h("p", {}, line)))));
  }

  sayNothingHere() {
    const others = this.numOthers === 1 ? "There is one run here" : `There are ${count(this.numOthers)} runs here`;
    this.say(
      "No run with GradGuard's data yet",
      this.numOthers ? `${others}, without data of GradGuard.` : "There is no run in this folder yet.",
      "Add the callback to a training that logs to TensorBoard, then come back; this page looks every ten seconds.",
      h("pre", {}, 'from lightning_gradguard import GradGuard\n\ntrainer = Trainer(callbacks=[GradGuard(clip=1.0, explosion="stop")])'),
      "Without Lightning, give `Guard` a sink: Guard(..., sinks=[TensorBoardSink(writer)]).",
    );
  }
}

// A list that is open would close if it were filled anew.
function fillOptions(select, options) {
  const isSame = options.length === select.options.length && options.every(([value, text], index) => select.options[index].value === value && select.options[index].text === text.trim().replace(/\s+/g, " "));
  if (!isSame) fill(select, options.map(([value, text]) => h("option", { value }, text)));
}

function loadPlotly() {
  return new Promise((resolve) => {
    const script = h("script", { src: "./plotly.min.js", onload: resolve, onerror: resolve });
    document.head.append(script);
  });
}

// TensorBoard tells its frames over a channel that they open; this is the one message that is of use here.
function listenForReload(listener) {
  const channel = new MessageChannel();
  channel.port1.onmessage = ({ data }) => {
    const { type, id } = JSON.parse(data);
    if (type === "experimental.DataReloaded") listener();
    channel.port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
  };
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}

export async function render() {
  document.documentElement.lang = "en";
  const loaded = new Promise((resolve) => {
    document.head.append(h("link", { rel: "stylesheet", href: "./static/style.css", onload: resolve, onerror: resolve }));
  });
  followTheme(() => {});
  await loaded;
  await new Tab().start();
}
