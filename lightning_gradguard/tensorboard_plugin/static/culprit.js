// What is known of an alert: its culprit with the source around it, the factors layer by layer, and how to run the step again.

import { count, counted, h, number, prose } from "./dom.js";
import { place, rowsOf, when } from "./incident.js";
import { set } from "./state.js";

export function details(alert, go) {
  return [
    h("p", {}, h("strong", {}, prose(alert.seen))),
    h("p", { class: "quiet" }, [new Date(1000 * alert.time).toLocaleString(), when(alert), alert.done].filter(Boolean).join(" · ")),
    alert.reason && h("p", {}, `It answers the ${alert.reason.kind} at step ${count(alert.reason.x)}: `, prose(alert.reason.seen)),
    alert.culprit && culpritOf(alert.culprit),
    h("p", {}, h("strong", {}, "What to try: "), prose(alert.culprit?.remedy || alert.remedy)),
    alert.bundle && bundleOf(alert.bundle),
    alert.parameters.length > 0 && parametersOf(alert),
    h("div", { class: "tools" },
      h("button", { onclick: go("flow") }, "In flow"), h("button", { onclick: go("norms") }, "In norms"),
      h("button", { onclick: go("depth") }, "By depth"),
      alert.parameters.length > 0 && h("button", { onclick: () => set({ view: "distribution", parameter: alert.parameters[0].name, optimizer: alert.optimizer }) }, "Its distribution")),
  ].filter(Boolean);
}

function culpritOf(culprit) {
  const entries = [
    ["Phase", culprit.phase], ["Cause", culprit.cause], ["Module", culprit.module || "training_step"], ["Operator", culprit.op], ["File", place(culprit)],
    ["Samples", rowsOf(culprit, 50)],
    ["Rank", culprit.rank],
    ["Replay", culprit.reproduced ? `reproduced${culprit.error === null ? "" : `, relative error ${number(culprit.error)}`}` : "not reproduced"],
  ];
  return h("section", { class: "culprit" },
    h("h3", {}, "Culprit"), culprit.message && h("p", {}, prose(culprit.message)),
    h("dl", {}, entries.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
    culprit.frames?.length ? framesOf(culprit.frames) : culprit.source && h("pre", { class: "source" }, culprit.source),
    lines("What went in", culprit.inputs), lines("Before it, oldest first", culprit.before), factors(culprit.table));
}

function framesOf(frames) {
  return [
    h("h3", {}, "Source, innermost call first"),
    frames.map((frame) => h("figure", { class: "frame" },
      h("figcaption", {}, h("span", { title: frame.file }, place(frame) ?? ""), frame.function ? h("span", { class: "quiet" }, ` in ${frame.function}`) : null),
      h("pre", { class: "source" }, frame.lines.map(([at, text]) =>
        h("span", { class: at !== null && at === frame.line ? "line here" : "line" }, h("span", { class: "at", "aria-hidden": "true" }, at === null ? "" : String(at)), text, "\n"))))),
  ];
}

function factors(table) {
  if (!table?.length) return null;
  const [titles, ...rows] = table;
  return [
    h("h3", {}, "Layer by layer"),
    h("div", { class: "wide" }, h("table", { class: "inner" },
      h("thead", {}, h("tr", {}, titles.map((title) => h("th", { scope: "col" }, prose(title))))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, prose(cell)))))))),
  ];
}

function lines(title, texts) {
  return texts?.length ? [h("h3", {}, title), h("pre", {}, texts.join("\n"))] : null;
}

function bundleOf({ path, command }) {
  return h("section", { class: "bundle" },
    h("h3", {}, "Run this step again"),
    h("p", {}, "The step is kept in ", h("code", {}, path), ". Put a function that makes your module in the place of ", h("code", {}, "package.module:function"), ":"),
    h("div", { class: "tools" }, h("code", {}, command), copyButton(command)));
}

function copyButton(text) {
  const button = h("button", {
    onclick: async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        const range = document.createRange();
        range.selectNodeContents(button.previousElementSibling);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        button.textContent = "Marked: press Ctrl+C";
      }
    },
  }, "Copy");
  return button;
}

function parametersOf({ parameters, num_parameters: number_ }) {
  return h("table", { class: "inner" },
    h("caption", {}, number_ > parameters.length ? `The worst ${parameters.length} of ${counted(number_, "parameter")}` : "Parameters, the worst first"),
    h("thead", {}, h("tr", {}, ["Parameter", "Norm", "NaN", "Inf"].map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, parameters.map((parameter) => h("tr", {},
      h("td", { class: "name" }, h("button", { class: "link name", title: parameter.name, onclick: () => set({ parameter: parameter.name, view: "distribution" }) }, parameter.name)),
      h("td", { class: "number" }, number(parameter.norm)), h("td", { class: "number" }, count(parameter.num_nan)), h("td", { class: "number" }, count(parameter.num_inf))))));
}
