// TensorBoard doesn't tell its frames which theme it is in, but they may look.

const listeners = [];

function isDark() {
  try {
    return window.parent.document.body.classList.contains("dark-mode");
  } catch {
    return window.matchMedia("(prefers-color-scheme: dark)").matches;
  }
}

function apply() {
  const theme = isDark() ? "dark" : "light";
  if (document.documentElement.dataset.theme === theme) return;
  document.documentElement.dataset.theme = theme;
  for (const listener of listeners) listener();
}

export function followTheme(listener) {
  listeners.push(listener);
  apply();
  try {
    new MutationObserver(apply).observe(window.parent.document.body, { attributes: true, attributeFilter: ["class"] });
  } catch {
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  }
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A list of colours, from one end of a scale to the other.
export const colours = (name) => colour(name).split(/\s+/);
