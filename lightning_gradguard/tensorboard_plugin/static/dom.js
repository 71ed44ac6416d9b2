// Elements from plain values. Texts become text nodes, so that no name or message can become markup.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(Boolean));
  return element;
}

// Plotly reads a little HTML in its texts; names are not HTML.
export function plain(text, length = 40, escapes = true) {
  const short = text.length > length ? `${text.slice(0, length / 2 - 1)}…${text.slice(-length / 2)}` : text;
  if (!escapes) return short;
  return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  const real = Number(value);
  if (Number.isNaN(real)) return "NaN";
  if (!Number.isFinite(real)) return real > 0 ? "∞" : "−∞";
  const size = Math.abs(real);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) return real.toExponential(2).replace("e+", "e");
  return real.toLocaleString("en-US", { maximumSignificantDigits: size >= 1000 ? 6 : 3 });
}

// A sentence with `code` in it.
export function prose(text) {
  return text.split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part));
}

export const count = (value) => Number(value).toLocaleString("en-US");

export const counted = (number, noun) => `${count(number)} ${noun}${Number(number) === 1 ? "" : "s"}`;

export function toggle(label, options, chosen, choose) {
  const select = h(
    "select",
    { onchange: (event) => choose(event.target.value) },
    options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)),
  );
  return h("label", { class: "choice" }, `${label} `, select);
}
