// What is being looked at. It lives in TensorBoard's own address, so that a link opens the same view.

const PREFIX = "p.gradguard.";
const KEYS = ["run", "optimizer", "view", "step", "parameter", "alert", "open", "from", "to", "kind", "colour", "cell", "search", "sort", "shown"];

// The page around the frame; the tab also works without one.
function outside() {
  try {
    return window.parent.location.href ? window.parent : window;
  } catch {
    return window;
  }
}

function read() {
  const state = Object.fromEntries(KEYS.map((key) => [key, null]));
  for (const [name, value] of new URLSearchParams(outside().location.hash.slice(1))) {
    const key = name.startsWith(PREFIX) ? name.slice(PREFIX.length) : null;
    if (KEYS.includes(key)) state[key] = value;
  }
  return state;
}

export const state = read();
const listeners = [];

export function onChange(listener) {
  listeners.push(listener);
}

export function set(patch) {
  const changed = Object.keys(patch).filter((key) => String(patch[key] ?? "") !== String(state[key] ?? ""));
  if (!changed.length) return;
  for (const key of changed) state[key] = patch[key] === null || patch[key] === undefined ? null : String(patch[key]);
  write();
  for (const listener of listeners) listener(changed);
}

function write() {
  const page = outside();
  const kept = page.location.hash.slice(1).split("&").filter((part) => part && !part.startsWith(PREFIX));
  if (page !== window && kept[0] !== "gradguard") return; // another tab has come to the front
  const ours = KEYS.filter((key) => state[key]).map((key) => `${PREFIX}${key}=${encodeURIComponent(state[key])}`);
  const { pathname, search } = page.location;
  page.history.replaceState(page.history.state, "", `${pathname}${search}#${[...kept, ...ours].join("&")}`);
}

// Someone has opened a link while the tab was there already.
outside().addEventListener("hashchange", () => {
  const hash = outside().location.hash;
  if (hash.startsWith("#gradguard&")) set(read());
  else write();
});
