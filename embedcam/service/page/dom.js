/* Elements, made without ever reading text as markup: ids and labels may hold anything. */

/** An element; `text` becomes its text, functions listen, everything else is an attribute. */
export function make(name, given = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") element.textContent = value;
    else if (typeof value === "function") element.addEventListener(key, value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of a drawing. */
export function draw(name, given = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(given)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** The element of the page with this id. */
export function find(id) {
  return document.getElementById(id);
}

/** Says something to those who do not see the page. */
export function announce(text) {
  find("status").textContent = text;
}
