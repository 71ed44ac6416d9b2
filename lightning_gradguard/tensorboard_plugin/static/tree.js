// The rows of the flow by name: a tree of modules and parameters, or a list where someone searches or sorts.

import { counted, fill, h } from "./dom.js";
import { set, state } from "./state.js";

const MAX_ROWS_UNFOLDED = 200;
const MAX_ROWS_OPENED = 40;

export function childrenOf(parents) {
  const children = new Map();
  parents.forEach((parent, node) => (children.get(parent) ?? children.set(parent, []).get(parent)).push(node));
  return children;
}

// All modules are open up to 200 rows; of more, those at the top, as long as there are not too many rows. Then those that were
// opened or closed by hand.
export function openNodes({ parents, parameters }) {
  const open = new Set([-1]);
  const given = (state.open ?? "").split(",");
  const isModule = (node) => parameters[node] < 0;
  if (given[0] === "all" || (given[0] !== "none" && parents.length <= MAX_ROWS_UNFOLDED)) parents.forEach((_, node) => isModule(node) && open.add(node));
  else if (given[0] !== "none") {
    const children = childrenOf(parents);
    let numRows = children.get(-1)?.length ?? 0;
    const queue = [...(children.get(-1) ?? [])];
    for (let node = queue.shift(); node !== undefined; node = queue.shift()) {
      const below = children.get(node) ?? [];
      if (!below.length || numRows + below.length > (numRows <= 2 ? MAX_ROWS_UNFOLDED : MAX_ROWS_OPENED)) continue;
      numRows += below.length;
      open.add(node);
      queue.push(...below);
    }
  }
  for (const node of given.filter((part) => /^\d+$/.test(part)).map(Number)) {
    if (open.has(node)) open.delete(node);
    else open.add(node);
  }
  return open;
}

export function visibleNodes({ parents }, open) {
  const shown = new Set([-1]);
  parents.forEach((parent, node) => shown.has(parent) && open.has(parent) && shown.add(node));
  shown.delete(-1);
  return [...shown];
}

export class Labels {
  constructor() {
    this.element = h("div", { class: "labels", role: "tree", "aria-label": "Modules and parameters", onkeydown: (event) => this.onKey(event) });
  }

  // `open` is null for a plain list.
  draw({ layout, nodes, open, culprits, rowHeight, width }) {
    this.layout = layout;
    this.open = open;
    const { labels, paths, depths, parameters, numels } = layout;
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.node : null;
    const stop = focused ?? this.element.querySelector("[tabindex='0']")?.dataset.node;
    const stopNode = nodes.includes(Number(stop)) ? Number(stop) : nodes[0];
    this.element.style.width = `${width}px`;
    fill(
      this.element,
      nodes.map((node) => {
        const isModule = parameters[node] < 0;
        const isOpen = open?.has(node) ?? false;
        const isGuilty = culprits.has(paths[node]) || (isModule && !isOpen && [...culprits].some((name) => name.startsWith(`${paths[node]}.`)));
        return h(
          "button",
          {
            role: "treeitem", class: ["row", isModule && "module", isGuilty && "guilty"].filter(Boolean).join(" "),
            style: `height: ${rowHeight}px; padding-left: ${open ? 8 + Math.min(14 * depths[node], width / 3) : 8}px`, "data-node": node,
            title: isModule ? paths[node] : `${paths[node]} (${counted(numels[node], "element")})`, tabindex: node === stopNode ? 0 : -1,
            "aria-level": open ? depths[node] + 1 : 1, "aria-expanded": isModule ? String(isOpen) : null,
            "aria-selected": String(paths[node] === state.parameter), onclick: () => this.choose(node),
          },
          open && h("span", { class: "twist", "aria-hidden": "true" }, isModule ? (isOpen ? "▾" : "▸") : ""),
          h("span", { class: "text" }, open ? labels[node] : paths[node]),
          isGuilty && h("span", { class: "mark", title: "named by the alert above" }, "◀"),
        );
      }),
    );
    if (focused !== null) this.element.querySelector(`[data-node="${stopNode}"]`)?.focus();
  }

  choose(node) {
    if (this.layout.parameters[node] < 0) this.flip(node);
    else set({ parameter: this.layout.paths[node] });
  }

  flip(node) {
    const parts = (state.open ?? "").split(",").filter(Boolean);
    const text = String(node);
    set({ open: (parts.includes(text) ? parts.filter((part) => part !== text) : [...parts, text]).join(",") || null });
  }

  // One tab stop; arrows, Home and End move inside, as in any tree.
  onKey(event) {
    const row = event.target.closest("[data-node]");
    if (!row) return;
    const node = Number(row.dataset.node);
    const isModule = this.layout.parameters[node] < 0;
    const isOpen = this.open?.has(node) ?? false;
    const parent = this.open && this.element.querySelector(`[data-node="${this.layout.parents[node]}"]`);
    const moves = {
      ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling,
      Home: this.element.firstElementChild, End: this.element.lastElementChild,
      ArrowLeft: isModule && isOpen ? null : parent, ArrowRight: isModule && isOpen ? row.nextElementSibling : null,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const target = moves[event.key];
    if (target) {
      row.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    } else if (isModule && event.key === (isOpen ? "ArrowLeft" : "ArrowRight")) this.flip(node);
  }
}
