// What the server answers, and how its numbers are packed; see wire.py and views.py.

export const NO_GRADIENT = -32768;
export const ZERO = -32767;
export const INFINITE = 32766;
export const NAN = 32767;
// A norm is the root of a sum of squares, and float32 holds no square of less than 1e-22.
export const NAME_OF_ZERO = "0 (or below 1e-22)";
const PER_DECADE = 1000;

export async function ask(route, parameters = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  const response = await fetch(`./${route}?${query}`);
  if (!response.ok) throw new Error(`TensorBoard answered ${response.status} to "${route}".`);
  return response.json();
}

export function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Int16Array.from({ length: bytes.length / 2 }, (_, index) => view.getInt16(2 * index, true));
}

export const isFinite16 = (code) => code > ZERO && code < INFINITE;
export const decades = (code) => (isFinite16(code) ? code / PER_DECADE : null);

export function nameOf(code) {
  if (code === NO_GRADIENT) return "no gradient";
  if (code === ZERO) return NAME_OF_ZERO;
  if (code === INFINITE) return "Inf";
  if (code === NAN) return "NaN";
  return null;
}
