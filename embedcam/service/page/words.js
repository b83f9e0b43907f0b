/* Numbers and names as the page says them. */

const MINUS = "\u2212";
const NAMED = 60;

/** 0.845 */
export function fixed(value, digits = 3) {
  const text = value.toFixed(digits);
  // No "-0.000".
  if (Number(text) === 0) return (0).toFixed(digits);
  return text.replace("-", MINUS);
}

/** +0.031, or 0.000 */
export function signed(value, digits = 3) {
  const text = fixed(value, digits);
  return Number(value.toFixed(digits)) > 0 ? `+${text}` : text;
}

/** Text that can be shown on one line: no control characters, and not without end. */
export function clean(text, most = 400) {
  const plain = text.replace(/[\p{Cc}\p{Cs}\u2028\u2029]/gu, "\ufffd");
  return plain.length > most ? `${plain.slice(0, most)}…` : plain;
}

/** Long names lose their middle, for the ends tell them apart. */
export function shortened(text, most = NAMED) {
  const letters = [...clean(text, 4000)];
  if (letters.length <= most) return letters.join("");
  const half = Math.floor((most - 1) / 2);
  return `${letters.slice(0, half).join("")}…${letters.slice(-half).join("")}`;
}

/** What a result is called: its label, or the last part of its id. */
export function nameOf(result) {
  if (result.label !== null && result.label !== "") return shortened(result.label);
  return shortened(result.id.split("/").pop() || result.id);
}

/** "result 2, label 9, similarity 0.91" */
export function described(result, rank) {
  const label = result.label === null ? nameOf(result) : `label ${shortened(result.label)}`;
  return `result ${rank}, ${label}, similarity ${fixed(result.similarity, 2)}`;
}

/** "1 image", "4,000 images" */
export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** "Row 3, column 5", counted from 1 as people do. */
export function placeOf(row, column) {
  return `row ${row + 1}, column ${column + 1}`;
}

const THIRDS = [
  ["upper left", "top", "upper right"],
  ["left", "middle", "right"],
  ["lower left", "bottom", "lower right"],
];

/** "upper left": which part of a grid these cells are. */
export function whereOf(cells, { rows, columns }) {
  const middle = (axis) => cells.reduce((total, cell) => total + cell[axis] + 0.5, 0) / cells.length;
  return THIRDS[Math.floor((3 * middle(0)) / rows)][Math.floor((3 * middle(1)) / columns)];
}

/** With a capital, and a full stop. */
export function sentence(text) {
  const plain = clean(text);
  const whole = plain.charAt(0).toUpperCase() + plain.slice(1);
  return /[.!?…]$/.test(whole) ? whole : `${whole}.`;
}
